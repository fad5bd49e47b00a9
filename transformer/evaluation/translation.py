"""BLEU and chrF of translations, by sacrebleu."""

from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from transformer.validation import require


def translation_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus scores of decoded texts, with one reference each.

    Returns:
        `bleu` (Papineni et al. 2002; cased, detokenized, tokenized again by 13a) and `chrf` (Popović 2015), 0 to 100, and the
        signatures that make them comparable (Post 2018).

    Raises:
        UserError: there is nothing to score.

    Example:
        >>> translation_scores(["Ein Hund läuft im Gras."], ["Ein Hund läuft im Gras."])["bleu"]
        100.0
    """
    require(len(hypotheses) > 0, "BLEU and chrF need at least one translation, got none; choose another split.")
    bleu, chrf = BLEU(tokenize="13a"), CHRF()
    return {
        "bleu": round(bleu.corpus_score(list(hypotheses), [list(references)]).score, 2),
        "chrf": round(chrf.corpus_score(list(hypotheses), [list(references)]).score, 2),
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }
