"""An open source: splits of text records or of examples, read at random."""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from transformer.data.documents import CONVERSATION, plain_text
from transformer.data.long_text import Text
from transformer.data.records import RandomAccess
from transformer.data.splits import cut
from transformer.data.stored import readable
from transformer.validation import require

WHOLE = "all"
"""The name of all splits together, in sequence."""


class Record(NamedTuple):
    """A document, or a piece of a document that is too long; `last` marks the final piece."""

    text: str
    prompt: str
    continues: bool
    last: bool


class Joined(RandomAccess[Any]):
    """Several sequences concatenated as one."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts, self._starts = parts, [0, *itertools.accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def _read(self, index: int) -> Any:
        part = bisect.bisect_right(self._starts, index) - 1
        return self._parts[part][index - self._starts[part]]


@dataclasses.dataclass(frozen=True)
class _Opened:
    """Base of both kinds of open sources."""

    name: str
    fingerprint: str
    """A hash of the content and the split rule, but not of a path."""
    sizes: dict[str, int]
    """The number of documents or examples of each split."""
    description: str
    open_split: Callable[[str], Sequence[Any]]

    @property
    def split_names(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.sizes)

    def _open(self, split: str, hint: str) -> Sequence[Any]:
        if split == WHOLE and WHOLE not in self.sizes:
            parts = [self.open_split(name) for name in self.split_names]
            return parts[0] if len(parts) == 1 else Joined(parts)
        names = ", ".join(self.split_names) or "none"
        require(split in self.sizes, f"A split must be one of {names} for {self.name}, got {split!r}; {hint}.")
        return self.open_split(split)


@dataclasses.dataclass(frozen=True)
class Source(_Opened):
    """An open corpus of running text."""

    tokens_in: epath.Path | None = None
    """The folder of its tokens, if the text is stored."""
    encoded: Callable[[str, Any], Any] | None = None
    """For token files: returns the encoded documents of a split for a tokenizer (`data.tokens.Tokens`)."""

    def records(self, split: str) -> Sequence[Record]:
        """The records of a split (or of all: `WHOLE`), in the order of the text, read at random.

        Raises:
            UserError: there is no such split, or no text in it.
        """
        return self._open(split, "for local text, data.validation_fraction and data.test_fraction make the other ones")


@dataclasses.dataclass(frozen=True)
class ExampleSource(_Opened):
    """An open dataset of labelled texts, pairs or other examples."""

    class_names: tuple[str, ...]
    tokens: Callable[[str, Any, bool], Sequence[Any] | None] | None = None
    """For stored examples: returns the examples of a split as `ExampleForm.tokens` makes them for a tokenizer, with class ids.
    With a true last argument, missing tokens are stored now; else the result is None without them."""

    def examples(self, split: str) -> Sequence[Any]:
        """The examples of a split (or of all: `WHOLE`), read at random.

        Raises:
            UserError: there is no such split.
        """
        return self._open(split, "data.validation_fraction takes a validation split from training where there is none")


def split_text(source: Source, split: str) -> Iterator[str]:
    """The documents of a split, whole and in order, each after its prompt."""
    for prompt, text in whole_documents(source, split):
        yield plain_text(prompt, text)


def whole_documents(source: Source, split: str) -> Iterator[tuple[str, str]]:
    """The prompt and text of each document of a split, in order, with its pieces joined again."""
    prompt, pieces = "", list[str]()
    for record in source.records(split):
        if not record.continues:
            prompt = record.prompt
        pieces.append(record.text)
        if record.last:
            yield prompt, "".join(pieces)
            pieces = []


def pieces(text: Text, prompt: str, record_bytes: int) -> Iterator[Record]:
    """A document as records of about `record_bytes` bytes."""
    parts = iter([str(text)]) if prompt == CONVERSATION else cut(text, record_bytes)
    part, continues = next(parts), False
    for following in parts:
        yield Record(part, "" if continues else prompt, continues, False)
        part, continues = following, True
    yield Record(part, "" if continues else prompt, continues, True)


class Converted(RandomAccess[Any]):
    """Stored examples, or a selection of them, each converted when it is read."""

    def __init__(
        self,
        stored: Sequence[Any],
        convert: Callable[[Any], Any],
        chosen: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self._stored, self._convert = stored, convert
        self._chosen = range(len(stored)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def _read(self, index: int) -> Any:
        with readable():
            example = self._stored[int(self._chosen[index])]
        return self._convert(example)
