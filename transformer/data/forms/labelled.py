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
        """The rows of files, and the texts of a folder with one subfolder per class."""
        for name in names:
            found = find(name).class_folders(name)
            yield from super().read(find, [name], config) if found is None else found

    def frame(self, tokens: Any, tokenizer: Tokenizer, config: DataConfig) -> tuple[Int[np.ndarray, " n"], int]:
        """The ids of the text for a classifier, and its class."""
        return framed(tokens.text, around_text(tokenizer), config), int(tokens.label)

    def length(self, encoded: Any) -> int:
        """The length of the text."""
        return len(encoded[0])

    def collate(self, encoded: Sequence[Any], rows: int, length: int) -> LabelledBatch:
        """Stack the texts and their classes."""
        labels, weights = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        labels[: len(encoded)], weights[: len(encoded)] = [label for _, label in encoded], 1
        return LabelledBatch(*padded([tokens for tokens, _ in encoded], rows, length), labels, weights)

    def max_segments(self, data: DataConfig) -> int:
        """One text per row, then padding."""
        return 1

    def show(self, batch: LabelledBatch, tokenizer: Tokenizer, class_names: Sequence[str]) -> Iterator[Shown]:
        """Each text below its class."""
        for row, tokens in enumerate(batch.inputs):
            read = tokens if batch.segment_ids is None else tokens[batch.segment_ids[row] > 0]
            heading = f"row {row}: class {class_names[batch.labels[row]]}, {len(read)} of {len(tokens)} tokens"
            yield Shown(heading, [[(tokenizer.decode(read), "green")]])


def text_tokens(tokenizer: Tokenizer, text: str, config: DataConfig) -> Int[np.ndarray, " n"]:
    """The ids of a text for a classifier: end-of-text, which may be pooled, then the text, cut to the length of a row.

    A pretrained tokenizer has its own ids instead of end-of-text, and perhaps ids after the text.
    """
    return framed(tokenizer.encode(text), around_text(tokenizer), config)
