"""The base of every kind of source: how a name in `data.source` is read, as running text, labelled texts or pairs."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformer.config import DataConfig
from transformer.data.documents import Corpus, Document, make_corpus
from transformer.data.files import without_surrogates
from transformer.data.prepare import corpus_fingerprint, open_corpus
from transformer.data.source import ExampleSource, Reads, Source
from transformer.types import UserError
from transformer.validation import require

_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")

Rows = Iterator[tuple[str, dict[str, Any]]]
"""The rows of a file: the place of each, for messages, and its fields."""


class LabelledText(NamedTuple):
    """A text and the name of its class."""

    text: str
    label: str


class TextPair(NamedTuple):
    """A text and what it is turned into."""

    source: str
    target: str


class SourceKind:
    """One way to read a name in `data.source`. One's own derives from this and is made known by `register_source`.

    What it must bring is `accepts` and, for running text, labelled texts, pairs and prediction alike, `rows`. Running text that
    is not in rows is read by `documents`.
    """

    is_path = True
    """Its names are of files or folders: those that a run's directory names are read only if this user has trained on them."""

    def accepts(self, name: str) -> bool:
        """Whether this kind reads the name; the first kind that does is taken."""
        raise NotImplementedError(f"{type(self).__name__} must define accepts().")

    def rows(self, name: str, keys: tuple[str, ...], what: str) -> Rows:
        """Each row with its place.

        Args:
            name: of the source.
            keys: the fields that are wanted.
            what: is read, for messages: labelled texts, pairs, ...

        Raises:
            UserError: they cannot be read; the message has the file and the line.
        """
        del keys
        raise UserError(f"A file of {what} must be .jsonl, .csv, .tsv (or these with .gz, .bz2, .xz), got {name}.")

    # ---- Running text ------------------------------------------------------------------------------------------------

    def title(self, name: str) -> tuple[str, str]:
        """What the corpus is called, and its version."""
        return name, "1.0.0"

    def documents(self, name: str, config: DataConfig) -> Iterator[Document]:
        """The documents of running text; blank ones are left out. By default each row is one."""
        for place, row in self.rows(name, (config.text_key,), "running text"):
            document = _document(row, place, config)
            yield document._replace(name=f"{self.title(name)[0]}:{place.rpartition(' ')[2]}")

    def corpus(self, name: str, config: DataConfig) -> Corpus:
        """The running text of a name.

        Raises:
            UserError: there is none.
        """
        try:
            return make_corpus(
                *self.title(name), lambda: self.documents(name, config), self.describe_empty(name, config)
            )
        except OSError as error:
            raise UserError(f"A source must be readable, {name} is not: {error}.") from error

    def describe_empty(self, name: str, config: DataConfig) -> str:
        """What is missing where there is no running text, for messages."""
        return f"{name} has no line with a non-empty {config.text_key!r}"

    def open_text(self, name: str, config: DataConfig) -> Source:
        """Running text, prepared now if it was not before."""
        return open_corpus(self.corpus(name, config), config)

    def fingerprint(self, name: str, config: DataConfig) -> str:
        """That of `open_text`, without preparing it."""
        return corpus_fingerprint(self.corpus(name, config), config)

    # ---- Examples ----------------------------------------------------------------------------------------------------

    def labelled(self, name: str, config: DataConfig) -> Iterator[tuple[str, LabelledText]]:
        """Labelled texts, each with its place; labels are as they are written."""
        for place, row in self.rows(name, (config.text_key, config.label_key), "labelled texts"):
            label = label_text(field(row, config.label_key, place), repr(config.label_key), place)
            yield place, LabelledText(text_field(row, config.text_key, place), label)

    def pairs(self, name: str, config: DataConfig) -> Iterator[tuple[str, TextPair]]:
        """Pairs, each with its place."""
        for place, row in self.rows(name, (config.source_key, config.target_key), "pairs"):
            yield place, TextPair(*(text_field(row, key, place) for key in (config.source_key, config.target_key)))

    def open_stored(
        self, name: str, reads: Reads, config: DataConfig, class_names: tuple[str, ...]
    ) -> ExampleSource | None:
        """Examples that are stored with splits of their own; None where they are read by `labelled` and `pairs`."""
        del name, reads, config, class_names
        return None


def field(row: dict[str, Any], key: str, place: str) -> Any:
    """A field that a row must have."""
    require(
        key in row,
        f"Each example must have {key!r}, {place} has {', '.join(f'{name!r:.40}' for name in row) or 'nothing'}.",
    )
    return row[key]


def text_field(row: dict[str, Any], key: str, place: str) -> str:
    """A field that must be text."""
    text = field(row, key, place)
    require(isinstance(text, str), f"{key!r} must be text, {place} has {type(text).__name__}.")
    return without_surrogates(text)


def label_text(value: Any, key: str, place: str) -> str:
    """A label as text, whatever kind of file it comes from; a number or truth value of JSON as JSON writes it (`0.0`, `true`)."""
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    label = json.dumps(value) if number else value
    require(
        isinstance(label, str) and clean_label(label) != "",
        f"{key} must be the name or number of a class, {place} has {value!r:.80}.",
    )
    return without_surrogates(str(label))


def clean_label(label: str) -> str:
    """A class's name: newlines and tabs within are a space, and there is no white space at its ends.

    TFDS stores names one a line, and without white space at their ends.

    >>> clean_label(" two\\nlines ")
    'two lines'
    """
    return _BREAKS.sub(" ", label).strip()


def _document(row: dict[str, Any], place: str, config: DataConfig) -> Document:
    text: Any = row.get(config.text_key)
    prompt: Any = row.get(config.prompt_key, "")
    require(
        isinstance(text, str) and isinstance(prompt, str),
        f"data.text_key={config.text_key!r} must name a string in each line (and data.prompt_key={config.prompt_key!r} "
        f"too, where present); {place} has {', '.join(f'{k:.40} ({type(v).__name__})' for k, v in row.items())}.",
    )
    return Document(without_surrogates(text), without_surrogates(prompt), "")
