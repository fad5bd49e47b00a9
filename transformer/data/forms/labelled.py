"""Labelled texts: a text and its class."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.config import DataConfig
from transformer.data.forms.examples import TOKENIZED, ExampleForm, Find, framed, padded
from transformer.data.tokenizers import Tokenizer
from transformer.form import FORMS, Shown
from transformer.tokenizer import around_text
from transformer.types import LabelledBatch


class LabelledText(NamedTuple):
    """A text, and the name or the number of its class."""

    text: str
    label: str | int


@FORMS.register
@dataclasses.dataclass(frozen=True)
class LabelledTexts(ExampleForm):
    """Labelled texts."""

    kind = "labelled"
    title = "labelled texts"
    noun = "text"
    settings = ("data.text_key", "data.label_key", "data.truncate", "data.buckets")
    prepares = ("name", "validation", "test", "text_key", "label_key", *TOKENIZED)
    keys = ("text_key", "label_key")
    example = LabelledText
    class_part = 1

    def read(self, find: Find, names: Sequence[str], config: DataConfig) -> Iterator[tuple[str, LabelledText]]:
        """The rows of files, and the texts of folders with one folder for each class."""
        for name in names:
            found = find(name).class_folders(name)
            yield from super().read(find, [name], config) if found is None else found

    def frame(self, tokens: Any, tokenizer: Tokenizer, config: DataConfig) -> tuple[Int[np.ndarray, " n"], int]:
        """The text as a classifier reads it, and its class."""
        return framed(tokens.text, around_text(tokenizer), config), int(tokens.label)

    def length(self, encoded: Any) -> int:
        """That of the text."""
        return len(encoded[0])

    def collate(self, encoded: Sequence[Any], rows: int, length: int) -> LabelledBatch:
        """Texts, and their classes."""
        labels, weights = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        labels[: len(encoded)], weights[: len(encoded)] = [label for _, label in encoded], 1
        return LabelledBatch(*padded([tokens for tokens, _ in encoded], rows, length), labels, weights)

    def max_segments(self, data: DataConfig) -> int:
        """One text, then padding."""
        return 1

    def show(self, batch: LabelledBatch, tokenizer: Any, class_names: Sequence[str]) -> Iterator[Shown]:
        """Each text, under its class."""
        for row, tokens in enumerate(batch.inputs):
            read = tokens if batch.segment_ids is None else tokens[batch.segment_ids[row] > 0]
            heading = f"row {row}: class {class_names[batch.labels[row]]}, {len(read)} of {len(tokens)} tokens"
            yield Shown(heading, [[(tokenizer.decode(read), "green")]])


def text_tokens(tokenizer: Tokenizer, text: str, config: DataConfig) -> Int[np.ndarray, " n"]:
    """A text as a classifier reads it: end-of-text, which it may pool, then as much as a row has room for.

    A pretrained tokenizer has ids of its own in the place of end-of-text, and perhaps some after the text.
    """
    return framed(tokenizer.encode(text), around_text(tokenizer), config)
