"""Pairs of a source text and a target text."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.config import DataConfig
from transformer.data.forms.examples import TOKENIZED, ExampleForm, Find, framed, padded
from transformer.data.tokenizers import PairTokenizer, Tokenizer, source_tokenizer
from transformer.form import FORMS, Shown
from transformer.tokenizer import around_source, target_start
from transformer.types import PairBatch, UserError
from transformer.validation import counted, require


class TextPair(NamedTuple):
    """A source text and its target text."""

    source: str
    target: str


@FORMS.register
@dataclasses.dataclass(frozen=True)
class Pairs(ExampleForm):
    """Pairs of texts."""

    kind = "pairs"
    title = "pairs"
    noun = "pair"
    settings = ("data.source_key", "data.target_key", "data.share_vocabulary", "data.truncate", "data.buckets")
    prepares = ("name", "validation", "test", "source_key", "target_key", *TOKENIZED)
    keys = ("source_key", "target_key")
    example = TextPair
    source_part = 0

    def read(self, find: Find, names: Sequence[str], config: DataConfig) -> Iterator[tuple[str, TextPair]]:
        """Pairs of one file, or of the corresponding lines of two files."""
        require(
            len(names) in (1, 2), f"Pairs are read from one file, or two with a line for each, got {len(names)} files."
        )
        if len(names) == 1:
            yield from super().read(find, names, config)
            return
        keys = self.key_names(config)
        sides = [find(name).rows(name, (key,), self.title) for name, key in zip(names, keys, strict=True)]
        for count, (source, target) in enumerate(itertools.zip_longest(*sides)):
            if source is None or target is None:
                counts = [
                    count + sum(1 for row in (one, *side) if row)
                    for one, side in ((source, sides[0]), (target, sides[1]))
                ]
                raise UserError(
                    f"Two files of pairs must have as many lines, {names[0]} has {counts[0]:,} and {names[1]} {counts[1]:,}."
                )
            yield source[0], TextPair(source[1][keys[0]], target[1][keys[1]])

    def clean(
        self, found: Iterable[tuple[str, Any]], class_names: tuple[str, ...], notes: list[str], where: str = ""
    ) -> Iterator[TextPair]:
        """Yield the pairs that have no blank side."""
        left_out = 0
        for _, pair in found:
            if pair.source.strip() and pair.target.strip():
                yield pair
            else:
                left_out += 1
        if left_out:
            verb = "is" if left_out == 1 else "are"
            notes.append(f"{where}{counted(left_out, 'pair')} with an empty side {verb} left out")

    def make_tokenizer(self, config: DataConfig, examples: Callable[[], Iterable[TextPair]]) -> Tokenizer:
        """Make one tokenizer for both sides, or one for each."""
        train = config.tokenizer.train
        sources, targets = (pair.source for pair in examples()), (pair.target for pair in examples())
        if config.share_vocabulary:
            return train(itertools.chain(sources, targets))
        return PairTokenizer(train(sources), train(targets))

    def frame(
        self, tokens: Any, tokenizer: Tokenizer, config: DataConfig
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
        """The source ends with end-of-text, the target starts and ends with it; pretrained models may use other ids there."""
        target = tokens.target[: config.sequence_length - 1]
        target = np.concatenate([[target_start(tokenizer)], target, [tokenizer.end_of_text]])
        return framed(tokens.source, around_source(source_tokenizer(tokenizer)), config), target

    def length(self, encoded: Any) -> int:
        """The length of the longer side."""
        return max(len(encoded[0]), len(encoded[1]) - 1)

    def collate(self, encoded: Sequence[Any], rows: int, length: int) -> PairBatch:
        """Stack the sources, the decoder inputs, and the targets."""
        sources, targets = [source for source, _ in encoded], [target for _, target in encoded]
        inputs_BT, segment_ids_BT = padded([target[:-1] for target in targets], rows, length)
        targets_BT, _ = padded([target[1:] for target in targets], rows, length)
        weights_BT = segment_ids_BT.astype(np.float32)
        return PairBatch(*padded(sources, rows, length), inputs_BT, targets_BT, weights_BT, segment_ids_BT)

    def lengths(self, tokens: Any, tokenizer: Tokenizer) -> dict[str, int]:
        """The lengths of both sides."""
        around = sum(map(len, around_source(source_tokenizer(tokenizer))))
        return {"sources": len(tokens.source) + around - 1, "targets": len(tokens.target)}

    def max_segments(self, data: DataConfig) -> int:
        """On either side, one text, then padding."""
        return 1

    def show(self, batch: PairBatch, tokenizer: Tokenizer, class_names: Sequence[str]) -> Iterator[Shown]:
        """Each source above its target."""
        reader = source_tokenizer(tokenizer)
        for row in range(len(batch.inputs)):
            source, target = batch.source[row], batch.targets[row]
            source = source if batch.source_segment_ids is None else source[batch.source_segment_ids[row] > 0]
            target = target if batch.segment_ids is None else target[batch.segment_ids[row] > 0]
            lengths = f"{len(source)} of {batch.source.shape[1]} and {len(target)} of {batch.inputs.shape[1]} tokens"
            yield Shown(
                f"row {row}: {lengths}",
                [[(_with_sentinels(source, reader), "green")], [(_with_sentinels(target, tokenizer), "cyan")]],
            )


def source_tokens(tokenizer: Tokenizer, text: str, config: DataConfig) -> Int[np.ndarray, " n"]:
    """The ids of a source: the text, cut to the length of a row, then end-of-text."""
    reader = source_tokenizer(tokenizer)
    return framed(reader.encode(text), around_source(reader), config)


def _with_sentinels(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of tokens; ids beyond the vocabulary, which stand for hidden spans, are written <0>, <1>, ..."""
    parts = []
    for part in np.split(tokens, np.flatnonzero(tokens >= tokenizer.vocab_size)):
        sentinel = f"<{part[0] - tokenizer.vocab_size}>" if len(part) and part[0] >= tokenizer.vocab_size else ""
        parts.append(sentinel + tokenizer.decode(part))
    return "".join(parts)
