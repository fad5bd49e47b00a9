"""Pairs: a source, and the target that it is turned into."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.config import DataConfig
from transformer.data.forms.examples import ExampleForm, Find, framed, padded
from transformer.data.tokenizers import PairTokenizer, Tokenizer, source_tokenizer
from transformer.form import FORMS, Shown
from transformer.tokenizer import around_source, target_start
from transformer.types import PairBatch
from transformer.validation import counted, require


class TextPair(NamedTuple):
    """A text and what it is turned into."""

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
    prepares = ("name", "validation", "test", "source_key", "target_key")
    keys = ("source_key", "target_key")
    example = TextPair

    def read(self, find: Find, names: Sequence[str], config: DataConfig) -> Iterator[tuple[str, TextPair]]:
        """Pairs of one file, or of two files of which line n of one belongs to line n of the other."""
        require(
            len(names) in (1, 2), f"Pairs are read from one file, or two with a line for each, got {len(names)} files."
        )
        if len(names) == 1:
            yield from super().read(find, names, config)
            return
        sides = [
            [(place, row[key]) for place, row in find(name).rows(name, (key,), self.title)]
            for name, key in zip(names, self.key_names(config), strict=True)
        ]
        require(
            len(sides[0]) == len(sides[1]),
            f"Two files of pairs must have as many lines, {names[0]} has {len(sides[0]):,} and {names[1]} {len(sides[1]):,}.",
        )
        for (place, source), (_, target) in zip(*sides, strict=True):
            yield place, TextPair(source, target)

    def clean(
        self, found: Iterable[tuple[str, Any]], class_names: tuple[str, ...], where: str = ""
    ) -> tuple[list[TextPair], list[str]]:
        """Pairs that are not blank."""
        pairs = [pair for _, pair in found]
        full = [pair for pair in pairs if pair.source.strip() and pair.target.strip()]
        left_out = len(pairs) - len(full)
        verb = "is" if left_out == 1 else "are"
        note = f"{where}{counted(left_out, 'pair')} with an empty side {verb} left out"
        return full, [note] if left_out else []

    def make_tokenizer(self, config: DataConfig, examples: Callable[[], Iterable[TextPair]]) -> Tokenizer:
        """One of both sides, or one for each."""
        train = config.tokenizer.train
        sources, targets = (pair.source for pair in examples()), (pair.target for pair in examples())
        if config.share_vocabulary:
            return train(itertools.chain(sources, targets))
        return PairTokenizer(train(sources), train(targets))

    def encode(
        self, example: TextPair, tokenizer: Tokenizer, config: DataConfig
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
        """The source ends with end-of-text, the target starts and ends with it; a pretrained model may have other ids there."""
        target = tokenizer.encode(example.target)[: config.sequence_length - 1]
        target = np.concatenate([[target_start(tokenizer)], target, [tokenizer.end_of_text]])
        return source_tokens(tokenizer, example.source, config), target

    def length(self, encoded: Any) -> int:
        """That of the longer side."""
        return max(len(encoded[0]), len(encoded[1]) - 1)

    def collate(self, encoded: Sequence[Any], rows: int, length: int) -> PairBatch:
        """Sources, and targets as they are read and as they follow."""
        sources, targets = [source for source, _ in encoded], [target for _, target in encoded]
        inputs_BT, segment_ids_BT = padded([target[:-1] for target in targets], rows, length)
        targets_BT, _ = padded([target[1:] for target in targets], rows, length)
        weights_BT = segment_ids_BT.astype(np.float32)
        return PairBatch(*padded(sources, rows, length), inputs_BT, targets_BT, weights_BT, segment_ids_BT)

    def lengths(self, example: TextPair, tokenizer: Tokenizer) -> dict[str, int]:
        """Of both sides."""
        reader = source_tokenizer(tokenizer)
        around = sum(map(len, around_source(reader)))
        return {
            "sources": len(reader.encode(example.source)) + around - 1,
            "targets": len(tokenizer.encode(example.target)),
        }

    def max_segments(self, data: DataConfig) -> int:
        """One text, then padding, on either side."""
        return 1

    def show(self, batch: PairBatch, tokenizer: Any, class_names: Sequence[str]) -> Iterator[Shown]:
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
    """A source as a translator reads it: as much as a row has room for, then end-of-text."""
    reader = source_tokenizer(tokenizer)
    return framed(reader.encode(text), around_source(reader), config)


def _with_sentinels(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of tokens, with <0>, <1>, ... for ids after the tokenizer's, which stand for hidden spans."""
    parts = []
    for part in np.split(tokens, np.flatnonzero(tokens >= tokenizer.vocab_size)):
        sentinel = f"<{part[0] - tokenizer.vocab_size}>" if len(part) and part[0] >= tokenizer.vocab_size else ""
        parts.append(sentinel + tokenizer.decode(part))
    return "".join(parts)
