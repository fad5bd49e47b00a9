"""The base of labelled texts, pairs and user-defined examples: each example is a row of texts, perhaps with a class."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.config import DataConfig
from transformer.data.files import without_surrogates
from transformer.data.tokenizers import Tokenizer, source_tokenizer
from transformer.form import Form
from transformer.tokenizer import around_text
from transformer.types import Json, PyTree
from transformer.validation import require

if TYPE_CHECKING:
    from transformer.data.datasets import Dataset, Reader

_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")

TOKENIZED = ("tokenizer", "tokenizer_size", "tokenizer_bytes")
"""Options of `transformer prepare` for forms with stored tokens (`prepares`)."""
Find = Callable[[str], Any]
"""The source kind that reads a name (`data.registry.find_source`)."""


@dataclasses.dataclass(frozen=True)
class ExampleForm(Form):
    """A form whose examples are the rows of a file or of a stored dataset.

    A subclass must define `title`, `noun`, `keys`, `example`, `frame`, `length`, `collate` and `show`. The tokens of its
    texts are then stored once. If these are not enough, it defines `encode` instead of `frame`, and each text is encoded
    whenever it is read.
    """

    keys: ClassVar[tuple[str, ...]]
    """Fields of the data config that name the parts of an example."""
    example: ClassVar[type[NamedTuple]]
    """The NamedTuple of an example, with its parts in the order of `keys`."""
    class_part: ClassVar[int | None] = None
    """The part that is a class, if any: its name in a file, its number once the data is open."""
    source_part: ClassVar[int | None] = None
    """The part for the source tokenizer, if a separate one exists."""

    # ---- Files and stored datasets -----------------------------------------------------------------------------------

    def open(self, reader: "Reader") -> "Dataset":
        """Open a stored dataset, or files."""
        return reader.examples(self)

    def prepare(self, reader: "Reader", name: str, files: Mapping[str, Sequence[str]]) -> str:
        """Store the files as a named dataset."""
        return reader.store(self, name, files)

    def read(self, find: Find, names: Sequence[str], config: DataConfig) -> Iterator[tuple[str, Any]]:
        """The examples of files, one file after the other, each with its location; classes as written in the files."""
        keys = self.key_names(config)
        for name in names:
            for location, row in find(name).rows(name, keys, self.title):
                yield (
                    location,
                    self.example._make(self._part(row, index, key, location) for index, key in enumerate(keys)),
                )

    def key_names(self, config: DataConfig) -> tuple[str, ...]:
        """The names of an example's parts in files and datasets."""
        return tuple(getattr(config, option) for option in self.keys)

    def _part(self, row: dict[str, Any], index: int, key: str, location: str) -> str:
        return (
            label_text(field(row, key, location), repr(key), location)
            if index == self.class_part
            else text_field(row, key, location)
        )

    def clean(
        self, found: Iterable[tuple[str, Any]], class_names: tuple[str, ...], notes: list[str], where: str = ""
    ) -> Iterator[Any]:
        """Yield the examples with normalized class names.

        Args:
            found: examples with their locations.
            class_names: the classes of the run that scores the examples; empty without such a run.
            notes: receives, after the last example, lines about changed or skipped examples.
            where: prefix of notes about a single split.

        Raises:
            UserError: the run does not have an example's class.
        """
        del where
        spellings = dict[str, set[str]]()
        for location, example in found:
            if self.class_part is None:
                yield example
                continue
            label = example[self.class_part]
            clean = clean_label(label)
            require(
                not class_names or clean in class_names,
                f"A label must be one of the run's classes, {', '.join(class_names)}, {location} has {clean!r:.80}.",
            )
            spellings.setdefault(clean, set()).add(label)
            yield self.with_class(example, clean)
        notes += [
            f"class {label!r}: {', '.join(map(repr, sorted(written)))} in the files"
            for label, written in sorted(spellings.items())
            if written != {label}
        ]

    def with_class(self, example: Any, name_or_number: str | int) -> Any:
        """The example with another class."""
        return self.example._make(name_or_number if i == self.class_part else part for i, part in enumerate(example))

    def numbered(self, examples: Sequence[Any], class_names: tuple[str, ...]) -> list[Any]:
        """The examples with class numbers instead of names."""
        if self.class_part is None:
            return list(examples)
        numbers = {name: number for number, name in enumerate(class_names)}
        return [self.with_class(example, numbers[example[self.class_part]]) for example in examples]

    def class_names(self, examples: Sequence[Any]) -> tuple[str, ...]:
        """The classes that occur: numbers in ascending order, then names; empty for a form without classes."""
        if self.class_part is None:
            return ()
        names = in_order({example[self.class_part] for example in examples})
        require(len(names) > 1, f"There must be at least two classes, the training split has {', '.join(names)}.")
        return names

    def label(self, example: Any) -> str | int:
        """The class of an example; 0 for a form without classes."""
        return 0 if self.class_part is None else example[self.class_part]

    def text(self, example: Any) -> Any:
        """The text of an example, or its ids; the last text if there are several."""
        return next(part for i, part in reversed(list(enumerate(example))) if i != self.class_part)

    # ---- Batches -----------------------------------------------------------------------------------------------------

    def make_tokenizer(self, config: DataConfig, examples: Callable[[], Iterable[Any]]) -> Tokenizer:
        """Make the tokenizer of training examples: by default, one tokenizer of all their texts."""
        return config.tokenizer.train(
            part for example in examples() for i, part in enumerate(example) if i != self.class_part
        )

    def encode(self, example: Any, tokenizer: Tokenizer, config: DataConfig) -> PyTree:
        """Tokens of an example, cut to the length of a row."""
        return self.frame(self.tokens(example, tokenizer), tokenizer, config)

    def tokens(self, example: Any, tokenizer: Tokenizer) -> Any:
        """The example with the complete ids of its texts instead of the texts."""
        reader = source_tokenizer(tokenizer)
        parts = (
            part if i == self.class_part else (reader if i == self.source_part else tokenizer).encode(part)
            for i, part in enumerate(example)
        )
        return self.example._make(parts)

    def frame(self, tokens: Any, tokenizer: Tokenizer, config: DataConfig) -> Any:
        """The result of `tokens`, cut to the length of a row, with the special ids around each text."""
        raise NotImplementedError(f"{type(self).__name__} must define frame().")

    def length(self, encoded: Any) -> int:
        """The number of positions of an encoded example."""
        raise NotImplementedError(f"{type(self).__name__} must define length().")

    def collate(self, encoded: Sequence[Any], rows: int, length: int) -> PyTree:
        """A batch of encoded examples; the remaining rows are padding."""
        raise NotImplementedError(f"{type(self).__name__} must define collate().")

    def lengths(self, tokens: Any, tokenizer: Tokenizer) -> dict[str, int]:
        """Tokens of each text before truncation, with all but one of the ids around it: a row holds `sequence_length - 1`."""
        return {"texts": len(self.text(tokens)) + sum(map(len, around_text(tokenizer))) - 1}

    def count_cut(self, examples: Iterable[Any], tokenizer: Tokenizer, config: DataConfig) -> dict[str, int]:
        """The number of texts of each kind (of `lengths`) that are longer than a row, and are therefore cut.

        Args:
            examples: results of `tokens`.
            tokenizer: the tokenizer that made them.
            config: has the length of rows.
        """
        cut: Counter[str] = Counter()
        for tokens in examples:
            cut.update(
                {name: int(n > config.sequence_length - 1) for name, n in self.lengths(tokens, tokenizer).items()}
            )
        return dict(cut)


# ---- Fields of a row -------------------------------------------------------------------------------------------------


def field(row: dict[str, Any], key: str, location: str) -> Json:
    """A required field of a row."""
    require(
        key in row,
        f"Each example must have {key!r}, {location} has {', '.join(f'{name!r:.40}' for name in row) or 'nothing'}.",
    )
    return row[key]


def text_field(row: dict[str, Any], key: str, location: str) -> str:
    """A required text field of a row."""
    text = field(row, key, location)
    require(isinstance(text, str), f"{key!r} must be text, {location} has {type(text).__name__}.")
    return without_surrogates(text)


def label_text(value: object, key: str, location: str) -> str:
    """A label as text, from any kind of file; numbers and truth values keep their JSON form (`0.0`, `true`)."""
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    label = json.dumps(value) if number else value
    require(
        isinstance(label, str) and clean_label(label) != "",
        f"{key} must be the name or number of a class, {location} has {value!r:.80}.",
    )
    return without_surrogates(str(label))


def clean_label(label: str) -> str:
    """A class name without newlines, tabs and surrounding white space: TFDS stores one stripped name per line.

    Newlines and tabs inside become spaces.

    >>> clean_label(" two\\nlines ")
    'two lines'
    """
    return _BREAKS.sub(" ", label).strip()


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in order: numbers ascending, then the others."""
    return tuple(sorted(names, key=_numbers_first))


def _numbers_first(name: str) -> tuple[bool, float, str]:
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (not math.isfinite(number), number if math.isfinite(number) else 0.0, name)


# ---- Rows ------------------------------------------------------------------------------------------------------------


def buckets(config: DataConfig) -> tuple[int, ...]:
    """The possible lengths of batches: one program is compiled for each."""
    length = config.sequence_length
    return config.buckets or tuple(sorted({-(-length // 4), -(-length // 2), length}))


def truncate(tokens: Int[np.ndarray, " n"], room: int, keep: str) -> Int[np.ndarray, " m"]:
    """At most `room` tokens: the first (`head`), the last (`tail`), or half of each (`head_tail`)."""
    if len(tokens) <= room:
        return tokens
    head = {"head": room, "tail": 0, "head_tail": (room + 1) // 2}[keep]
    return np.concatenate([tokens[:head], tokens[len(tokens) - (room - head) :]])


def framed(
    tokens: Int[np.ndarray, " n"], around: tuple[tuple[int, ...], tuple[int, ...]], config: DataConfig
) -> Int[np.ndarray, " m"]:
    """Tokens with the special ids around a text, cut to the length of a row."""
    begin, end = around
    room = config.sequence_length - len(begin) - len(end)
    require(
        room >= 1,
        f"A row must have room for a text and the {len(begin) + len(end)} ids around it, got "
        f"data.sequence_length={config.sequence_length}.",
    )
    return np.concatenate([begin, truncate(tokens, room, config.truncate), end]).astype(np.int32)


def padded(sequences: Sequence[np.ndarray], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [rows, length]; the remaining rows are padding."""
    tokens_BT, segment_ids_BT = np.zeros((2, rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)], segment_ids_BT[row, : len(sequence)] = sequence, 1
    return tokens_BT, segment_ids_BT


def by_length(sequences: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Indices of sequences of similar length, at most `batch_size` per group; each index occurs once."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))
