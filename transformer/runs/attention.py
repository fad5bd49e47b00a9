"""A page with the attention of a run's model, trained and as initialized, and its candidates for each token."""

from typing import Any

import jax
import numpy as np

from transformer.analysis.attention import TextAttention, read_attention
from transformer.analysis.attention_page import Candidates, render_page
from transformer.analysis.tokens import token_text, token_texts
from transformer.data.tokenizers import source_tokenizer
from transformer.memory import check_params
from transformer.parts import Parts
from transformer.runs.saved import Loaded
from transformer.types import PyTree
from transformer.validation import require

_BEFORE = 4  # previous tokens, which affect how a candidate is decoded


def attention_page(
    run: Loaded, text: str, *, target: str | None = None, top_k: int = 8, initial: bool = True, name: str = ""
) -> str:
    """An HTML page of a model's attention to a text; it needs no network.

    Args:
        run: the model.
        text: not blank, and no longer than the model's maximum.
        target: for a translator, the translation for its decoder (None: its own); for a prefix language model, the text after
            the prefix.
        top_k: number of candidates for each token, or of classes.
        initial: also show the same model with its initial parameters, as the run's seed makes them.
        name: the name of the model, for the heading.

    Raises:
        UserError: the text does not fit, or the run's model has no attention to show.

    Example:
        `pathlib.Path("attention.html").write_text(attention_page(load("runs/python_stdlib"), "def main():"))`
    """
    require(top_k >= 1, f"top_k must be at least 1, got {top_k}.")
    reading = run.reading(text, target=target)
    seen = read_attention(run.model, run.params, reading)
    before = read_attention(run.model, initial_params(run), reading._replace(predicts="")) if initial else None
    reader = {"encoder": source_tokenizer(run.tokenizer)}
    texts = {stack: token_texts(reader.get(stack, run.tokenizer), ids) for stack, ids in reading.ids.items()}
    return render_page(
        seen,
        texts,
        heading=name or run.config.workdir or run.config.objective.kind,
        about=_about(run, seen),
        candidates=None if seen.logits is None else _candidates(run, seen, top_k),
        initial=before,
        initial_name=_initial_name(run) if initial else "",
    )


def initial_params(run: Loaded) -> PyTree:
    """The initial parameters for a run's seed: those before the first step, unless the run started from another run.

    Raises:
        UserError: they do not fit into memory next to the trained ones.
    """
    config = run.config
    check_params(config)
    parts = Parts(config, run.tokenizer, class_names=run.class_names, own_batches=True)
    return parts.init_params(jax.random.key(config.training.seed))


def _initial_name(run: Loaded) -> str:
    began = run.step > 0 and run.config.training.init_from == ""
    return "before training" if began else "initialised at random"


def _about(run: Loaded, seen: TextAttention) -> str:
    config, model = run.config, run.config.model
    heads = sorted({len(weights) for found in seen.maps for weights in found.weights})
    depths = [len(found.weights) for found in seen.maps if found.queries == found.keys]
    tokens = " and ".join(f"{len(ids)}" for ids in seen.reading.ids.values())
    step = f", step {run.step:,}" if run.step else ""
    return (
        f"{config.objective.kind.replace('_', ' ')}, {' and '.join(map(str, depths))} layer{'s' * (depths != [1])} of "
        f"{' or '.join(map(str, heads))} head{'s' * (heads != [1])}, "
        f"{model.embed_dim} wide{step}, while it reads {tokens} token{'s' * (tokens != '1')}."
    )


def _candidates(run: Loaded, seen: TextAttention, top_k: int) -> Candidates:
    """The most likely tokens, or classes, for each row of logits, with their probabilities."""
    reading, names = seen.reading, run.class_names
    assert seen.logits is not None
    ids = [int(index) for index in reading.ids[reading.of]] if reading.of else []
    rows: list[Any] = []
    for at, logits_V in enumerate(np.asarray(seen.logits, np.float64)):
        if np.isnan(logits_V).any():
            rows.append([])
            continue
        probabilities_V = np.exp(logits_V - logits_V.max())
        probabilities_V /= probabilities_V.sum()
        place = at + reading.ahead
        own = ids[place] if place < len(ids) else -1
        before = ids[max(0, place - _BEFORE) : place]
        best = np.argsort(-probabilities_V, kind="stable")[:top_k]
        rows.append(
            [
                (
                    token_text(run.tokenizer, int(index), before) if reading.of else names[index],
                    round(float(probabilities_V[index]), 5),
                    int(index) == own,
                )
                for index in best
            ]
        )
    return rows
