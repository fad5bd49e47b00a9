"""Span corruption: the model generates the hidden spans of a text from the remaining text (Raffel et al. 2020)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from transformer.data.draws import random_at
from transformer.data.forms.pairs import Pairs
from transformer.data.tokenizers import Tokenizer, source_tokenizer
from transformer.form import Shown
from transformer.objective import OBJECTIVES
from transformer.objectives.seq2seq import TranslatesText, pair_loss, pair_shapes
from transformer.tokenizer import sentinel_ids, target_start
from transformer.types import Array, Batch, LossOutput, Noise, PairBatch, PyTree
from transformer.validation import require, require_at_least

if TYPE_CHECKING:
    import flax.linen as nn

    from transformer.config import Config
    from transformer.data.tokenizers import Vocabulary

_KEY = 9  # separates these random numbers from others with the same seed


@OBJECTIVES.register
@dataclasses.dataclass(frozen=True)
class SpanCorruption(TranslatesText):
    """Cross-entropy of the hidden spans of a text (Raffel et al. 2020, section 3.3.4)."""

    kind = "span_corruption"
    reads = "text"

    noise_density: float = 0.15
    """Share of hidden tokens."""
    mean_span_length: float = 3.0
    """Mean number of tokens in a hidden span."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.noise_density < 1,
            f"SpanCorruption.noise_density must be above 0 and below 1, got {self.noise_density}.",
        )
        require_at_least(self, 1, "mean_span_length")

    def num_hidden(self, length: int) -> tuple[int, int]:
        """How many of `length` tokens are hidden, and in how many spans; none in a single token."""
        hidden = min(max(1, round(self.noise_density * length)), max(0, length - 1))
        return hidden, min(max(1, round(hidden / self.mean_span_length)), hidden, length - hidden)

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
        """`pair_loss` of the remaining text and its hidden spans."""
        return pair_loss(self, model, params, carry, batch, key, train)

    def check(self, config: "Config") -> None:
        """Sources and targets fit in a row."""
        length, (hidden, spans) = config.data.sequence_length, self.num_hidden(config.data.sequence_length)
        require(
            spans < hidden < length - spans,
            f"Sources and targets of span_corruption must fit in data.sequence_length={length}, but {hidden} tokens in {spans} "
            f"spans give {length - hidden + spans + 1} and {hidden + spans + 1}; change objective.noise_density, set a larger "
            "objective.mean_span_length or longer rows.",
        )

    def extra_tokens(self, vocabulary: "Vocabulary", length: int) -> int:
        """One sentinel per span, minus the sentinels that the tokenizer has."""
        require(
            source_tokenizer(vocabulary) is vocabulary,
            "The span_corruption objective hides spans of one text and needs one vocabulary, got a tokenizer with one for "
            "sources and one for targets; leave out training.init_from, or start from a run with data.share_vocabulary=True.",
        )
        spans = self.num_hidden(length)[1]
        return max(0, spans - len(getattr(vocabulary, "sentinels", ())))

    @classmethod
    def uses(cls, setting: str) -> bool:
        """Its rows are one text each, of any number of documents."""
        return setting not in ("data.max_segments", "data.best_fit") and super().uses(setting)

    def max_segments(self, config: "Config") -> int:
        """One: each row holds a single source and target."""
        return 1

    def batch_shapes(self, config: "Config") -> PairBatch:
        """The visible and the hidden tokens, each with the sentinels and end-of-text."""
        length = config.data.sequence_length
        hidden, spans = self.num_hidden(length)
        shapes = pair_shapes(config.data.batch_size, length - hidden + spans + 1, hidden + spans + 1)
        return shapes._replace(source_segment_ids=None, segment_ids=None)

    def show(self, batch: PairBatch, tokenizer: Tokenizer, class_names: Sequence[str]) -> Iterator[Shown]:
        """The remaining text above its hidden spans."""
        return Pairs().show(batch, tokenizer, class_names)

    def changes(self, tokenizer: Tokenizer, length: int, seed: int) -> Mapping[str, Any]:
        """Hide random spans of each row, and convert rows to sources and targets."""
        return {"noise": hide_spans(self, seed), "convert": span_pairs(self, tokenizer, length), "joined": True}


def hide_spans(objective: SpanCorruption, seed: int) -> Noise:
    """Set weight 1 for the tokens of random spans of a row and 0 for the others (Raffel et al. 2020, section 3.3.4).

    Spans do not touch. All placements of the given number of spans and tokens are equally likely. A row is one text, as in
    the authors' data: its documents are not separated, prompts are part of them, and an end-of-text between them is a token
    like any other.
    """

    def noise(batch: Batch, row: int, place: tuple[int, ...]) -> None:
        random = random_at(seed, _KEY, *place)
        length = int(np.count_nonzero(batch.segment_ids[row]))
        hidden, spans = objective.num_hidden(length)
        batch.weights[row] = 0
        if spans > 0:
            # Visible and hidden runs alternate; only the visible runs at the two ends may be empty.
            lengths = np.zeros(2 * spans + 1, int)
            lengths[::2] = _cut(length - hidden + 2, spans + 1, random)
            lengths[[0, -1]] -= 1
            lengths[1::2] = _cut(hidden, spans, random)
            batch.weights[row, :length] = np.repeat(np.arange(2 * spans + 1) % 2, lengths)

    return noise


def _cut(length: int, parts: int, random: np.random.RandomState) -> Int[np.ndarray, " parts"]:
    """Lengths of at least 1 that add up to `length`; all such sequences are equally likely."""
    ends = np.sort(random.permutation(length - 1)[: parts - 1]) + 1
    return np.diff(ends, prepend=0, append=length)


def span_pairs(objective: SpanCorruption, tokenizer: Tokenizer, length: int) -> Callable[[Batch], PairBatch]:
    """A function that converts rows of `length` tokens to sources and targets; tokens with a weight are hidden.

    In the source, a sentinel replaces each hidden span. The target holds each sentinel, followed by the tokens it replaced. Both
    end with end-of-text. Sentinels are the tokenizer's, then the ids after the vocabulary, in order.
    """
    hidden, spans = objective.num_hidden(length)

    def convert(batch: Batch) -> PairBatch:
        rows = len(batch.inputs)
        source, source_segment_ids = np.zeros((2, rows, length - hidden + spans + 1), np.int32)
        target = np.zeros((rows, hidden + spans + 2), np.int32)
        segment_ids = np.zeros((rows, hidden + spans + 1), np.int32)
        for row in range(rows):
            valid = batch.segment_ids[row] > 0
            tokens, is_hidden = batch.inputs[row][valid], batch.weights[row][valid] > 0
            (starts,) = np.nonzero(np.diff(is_hidden, prepend=False) & is_hidden)
            if len(starts) == 0:
                continue
            sentinels = sentinel_ids(tokenizer, len(starts))
            visible = tokens.copy()
            visible[starts] = sentinels
            kept = np.append(visible[~is_hidden | np.isin(np.arange(len(tokens)), starts)], tokenizer.end_of_text)
            output = np.insert(tokens, starts, sentinels)[np.insert(is_hidden, starts, True)]
            output = np.concatenate([[target_start(tokenizer)], output, [tokenizer.end_of_text]])
            source[row, : len(kept)], source_segment_ids[row, : len(kept)] = kept, 1
            target[row, : len(output)], segment_ids[row, : len(output) - 1] = output, 1
        inputs, targets = target[:, :-1] * segment_ids, target[:, 1:]
        return PairBatch(source, source_segment_ids, inputs, targets, segment_ids.astype(np.float32), segment_ids)

    return convert
