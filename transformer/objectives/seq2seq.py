"""Sequence to sequence: the cross-entropy of each target token, given the source and the previous target tokens."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from transformer.config import DataConfig
from transformer.data.forms.pairs import source_tokens
from transformer.data.tokenizers import note_unknown, source_tokenizer
from transformer.evaluation.translation import translation_scores
from transformer.generation.beams import BeamConfig, beam_config, beam_search
from transformer.generation.likelihood import Query, target_scores
from transformer.generation.sampling import GREEDY, SamplingConfig
from transformer.generation.translate import translate
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.objective import OBJECTIVES, shaped
from transformer.objectives.bases import TokenObjective, read_whole
from transformer.objectives.continuation import ranked_columns
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import chunked, predicted_statistics
from transformer.tokenizer import around_source, drawable, stop_ids, target_start
from transformer.trained import Trained
from transformer.types import Array, LossOutput, PairBatch, PyTree, Reading
from transformer.validation import require

if TYPE_CHECKING:
    import flax.linen as nn

    from transformer.config import Config
    from transformer.data.tokenizers import Tokenizer, Vocabulary


_BATCHES_AT_ONCE = 8  # sources are sorted by length within this many batches


class TranslatesText(TokenObjective):
    """An objective whose encoder-decoder generates one target for a text."""

    model_class = EncoderDecoder
    settings = ("model.decoder_layers",)
    num_stacks = 2
    draws_nothing = "a translator takes the most likely token each time"

    def encode(self, text: str, tokenizer: "Tokenizer", data: DataConfig) -> Array:
        """As much of the source as fits in a row, then end-of-text."""
        return source_tokens(tokenizer, text, data)

    def reads_texts(self, segment_ids_BT: Array) -> tuple[str, Mapping[str, Any]]:
        """The encoder's."""
        return "encode", {"segment_ids_BS": segment_ids_BT}

    def generate(
        self,
        run: Trained,
        prompt: str,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        note: Callable[[str], None],
        beams: BeamConfig | None = None,
    ) -> Iterator[str]:
        """The translation of the prompt; a note reports an unread part. `sampling` contributes its repetition penalty only."""
        del seed
        data, room = run.config.data, run.config.data.sequence_length
        tokens = source_tokenizer(run.tokenizer).encode(prompt)
        require(
            prompt.strip() != "" and len(tokens) > 0,
            f"A translator needs a text to translate, got {prompt!r}; give --prompt, or pipe it in.",
        )
        note_unknown(source_tokenizer(run.tokenizer), tokens, note)
        source = source_tokens(run.tokenizer, prompt, data)
        read = len(source) - sum(map(len, around_source(source_tokenizer(run.tokenizer))))
        if read < len(tokens):
            parts = {"head": "the first", "tail": "the last", "head_tail": "the first and last"}[data.truncate]
            note(f"the model reads {read} of the text's {len(tokens)} tokens, {parts} ones; the others were cut.")
        length = max_new_tokens or room
        require(0 < length <= room, f"max_new_tokens must be at most the model's {room}, got {length}.")
        if beams:
            return iter(["\n".join(text for text, _ in next(best_translations(run, [source], 1, length, beams)))])
        sampling = dataclasses.replace(GREEDY, repetition_penalty=sampling.repetition_penalty)
        return translations(run, [source], 1, length, sampling)

    def reading(self, run: Trained, text: str, target: str | None = None) -> Reading:
        """The text as a source, uncut, and a target: by default, the model's own translation."""
        tokenizer, data = run.tokenizer, run.config.data
        reader = source_tokenizer(tokenizer)
        begin, end = around_source(reader)
        source_S = read_whole(np.concatenate([begin, reader.encode(text), end]), data.sequence_length)
        room, start = data.sequence_length, target_start(tokenizer)
        if target is None:
            options: Any = {"max_new_tokens": room - 1, "batch_size": 1, **_special_ids(tokenizer, run.config)}
            (said,) = translate(run.model, run.params, [source_S], **options)
        else:
            said = tokenizer.encode(target)
        target_T = read_whole(np.concatenate([[start], said]), room, "A target")
        ids = {"encoder": source_S, "decoder": target_T}
        return Reading(ids, (source_S[None], target_T[None]), predicts="next token", of="decoder")


def translations(
    run: Trained, sources: Sequence[Array], batch_size: int, length: int, sampling: SamplingConfig = GREEDY
) -> Iterator[str]:
    """The most likely target of each source, up to a number of tokens."""
    ids = _special_ids(run.tokenizer, run.config)
    options: Any = {"max_new_tokens": length, "batch_size": batch_size, "sampling": sampling}
    targets = translate(run.model, run.params, sources, **ids, **options)
    return (run.tokenizer.decode(target) for target in targets)


def best_translations(
    run: Trained, sources: Sequence[Array], batch_size: int, length: int, beams: BeamConfig
) -> Iterator[list[tuple[str, float]]]:
    """The best targets of each source by beam search, with their scores."""
    ids = _special_ids(run.tokenizer, run.config)
    options: Any = {"max_new_tokens": length, "batch_size": batch_size, **dataclasses.asdict(beams)}
    found = beam_search(run.model, run.params, sources, **ids, **options)
    return ([(run.tokenizer.decode(tokens), score) for tokens, score in found.best(row)] for row in range(len(sources)))


def _special_ids(tokenizer: Any, config: "Config") -> dict[str, Any]:
    """Start and end ids of targets, and the ids that may be generated."""
    extra = config.objective.extra_tokens(tokenizer, config.data.sequence_length)
    allowed = drawable(tokenizer, config.model.vocab_size, extra)
    return {"end_of_text": stop_ids(tokenizer), "start": target_start(tokenizer), "drawable": allowed}


@OBJECTIVES.register
@dataclasses.dataclass(frozen=True)
class Seq2Seq(TranslatesText):
    """Cross-entropy of a target, given its source."""

    kind = "seq2seq"
    reads = "pairs"
    predicts_from = "source_key"
    scored_keys = ("source_key", "target_key")

    def loss(
        self,
        model: "nn.Module",
        vocabulary: "Vocabulary",
        params: PyTree,
        carry: PyTree,
        batch: PairBatch,
        key: Array,
        train: bool,
    ) -> LossOutput:
        """`pair_loss` of sources and targets."""
        return pair_loss(self, model, params, carry, batch, key, train)

    def batch_shapes(self, config: "Config") -> PairBatch:
        """One pair per row."""
        return pair_shapes(config.data.batch_size, config.data.sequence_length, config.data.sequence_length)

    def model_settings(self, vocabulary: "Vocabulary | None", class_names: tuple[str, ...]) -> Mapping[str, Any]:
        """Sources have a separate embedding if they have a separate vocabulary."""
        del class_names
        reader = None if vocabulary is None else source_tokenizer(vocabulary)
        return {"source_vocab_size": 0 if reader is None or reader is vocabulary else reader.vocab_size}

    def tokenizer_settings(self, tokenizer: "Tokenizer") -> Mapping[str, Any]:
        """Whether source and target share one vocabulary."""
        return {"share_vocabulary": source_tokenizer(tokenizer) is tokenizer}

    def generation_scores(
        self, model: Any, params: PyTree, tokenizer: "Tokenizer", data: Any, split: str, config: "Config"
    ) -> dict[str, Any]:
        """BLEU and chrF of the translations of a whole split."""
        examples, room = data.source.examples(split), config.data.sequence_length
        sources = [self.encode(example.source, tokenizer, config.data) for example in examples]
        targets = translate(model, params, sources, **_special_ids(tokenizer, config), max_new_tokens=room)
        return translation_scores(
            [tokenizer.decode(target) for target in targets], [example.target for example in examples]
        )

    def predict(
        self,
        run: Trained,
        texts: Sequence[str],
        names: Sequence[str],
        batch_size: int,
        max_new_tokens: int = 0,
        beams: int = 0,
        length_penalty: float = 1.0,
        num_best: int = 1,
    ) -> Iterator[dict[str, Any]]:
        """The `translation`, of at most `max_new_tokens` (0 means the model's length). Beams add `score`, `translation_2`,
        `score_2` and so on.
        """
        del names
        search = beam_config(beams, length_penalty, num_best)
        room, at_once = run.config.data.sequence_length, _BATCHES_AT_ONCE * batch_size
        length = max_new_tokens or room
        require(0 < length <= room, f"max_new_tokens must be at most the model's {room}, got {max_new_tokens}.")
        for start in range(0, len(texts), at_once):
            sources = [self.encode(text, run.tokenizer, run.config.data) for text in texts[start : start + at_once]]
            if search is None:
                yield from ({"translation": text} for text in translations(run, sources, batch_size, length))
            else:
                for found in best_translations(run, sources, batch_size, length, search):
                    said, scores = zip(*found, strict=True)
                    yield ranked_columns("translation", said, scores, search)

    def score(
        self, run: Trained, texts: Sequence[tuple[str, str]], names: Sequence[str], batch_size: int, stride: int
    ) -> Iterator[tuple[Array, Array]]:
        """Log-probability of each translation token, its end included, given its source (the prompt) and the previous tokens."""
        del stride
        tokenizer, data, pairs = run.tokenizer, run.config.data, []
        start = np.array([target_start(tokenizer)], np.int32)
        for (source, target), name in zip(texts, names, strict=True):
            require(source.strip() != "", f"A translation is scored with its source, the prompt of {name} is blank.")
            tokens = np.append(tokenizer.encode(target), tokenizer.end_of_text).astype(np.int32)
            require(
                len(tokens) <= data.sequence_length,
                f"A translation must fit in the model's {data.sequence_length} tokens, {name} has {len(tokens)} with its end; "
                "shorten it.",
            )
            pairs.append((self.encode(source, tokenizer, data), Query(start, tokens)))
        scores = target_scores(run, pairs, batch_size=batch_size)
        return ((query.tokens, found) for (_, query), found in zip(pairs, scores, strict=True))

    def next_command(self, prompt: str) -> tuple[str, ...]:
        """Translate a text."""
        del prompt
        return ("generate", "--prompt", "a text to translate")


def pair_loss(
    objective: TokenObjective,
    model: "nn.Module",
    params: PyTree,
    carry: PyTree,
    batch: PairBatch,
    key: Array,
    train: bool,
) -> LossOutput:
    """The loss of an `EncoderDecoder` on a `PairBatch`, with teacher forcing (Vaswani et al. 2017, section 3.1).

    Its statistics are sums over target tokens, end-of-text included (`predicted_statistics`).
    """
    predicted, routing = model.apply(
        {"params": params},
        batch.source,
        batch.inputs,
        source_segment_ids_BS=batch.source_segment_ids,
        target_segment_ids_BT=batch.segment_ids,
        train=train,
        rngs={"dropout": key} if train else {},
        head=not chunked(objective),
        mutable="routing",
    )
    statistics = predicted_statistics(model, params, predicted, batch.targets, batch.weights, objective)
    statistics = add_routing(statistics, routing, objective)
    return (statistics["objective"], statistics["weight"]), (carry, jax.lax.stop_gradient(statistics))


def pair_shapes(rows: int, source: int, target: int) -> PairBatch:
    """Shapes of a batch of pairs with these numbers of tokens."""
    source_BS, target_BT = shaped((rows, source), np.int32), shaped((rows, target), np.int32)
    return PairBatch(source_BS, source_BS, target_BT, target_BT, shaped((rows, target), np.float32), target_BT)
