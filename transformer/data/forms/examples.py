"""What labelled texts, pairs and one's own examples have in common: each is a row of texts, and perhaps a class."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from transformer.config import DataConfig
from transformer.data.files import without_surrogates
from transformer.data.tokenizers import Tokenizer, source_tokenizer
from transformer.form import Form
from transformer.tokenizer import around_text
from transformer.validation import require

_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")

TOKENIZED = ("tokenizer", "tokenizer_size", "tokenizer_bytes")
"""Options of `transformer prepare`, for `prepares` of a form whose tokens are stored."""
Find = Callable[[str], Any]
"""The kind of source that reads a name (`data.registry.find_source`)."""


@dataclasses.dataclass(frozen=True)
class ExampleForm(Form):
    """A form whose examples are a row each, of a file or of a stored dataset.

    What one's own must bring is `title`, `noun`, `keys`, `example`, `frame`, `length`, `collate` and `show`. The tokens of its
    texts are then stored once. Where these are not enough, it brings `encode` in the place of `frame`, and each text is encoded
    whenever it is read.
    """

    keys: ClassVar[tuple[str, ...]]
    """Fields of the data's config that name the parts of an example."""
    example: ClassVar[Callable[..., Any]]
    """The NamedTuple of an example, made of its parts in the order of `keys`."""
    class_part: ClassVar[int | None] = None
    """Which part is a class, if one is: by its name in a file, by its number once the data is open."""
    source_part: ClassVar[int | None] = None
    """Which part the tokenizer of sources reads, if there is one beside that of targets."""

    # ---- Files and stored datasets -----------------------------------------------------------------------------------

    def open(self, reader: Any) -> Any:
        """A stored dataset, or files."""
        return reader.examples(self)

    def prepare(self, reader: Any, name: str, files: Mapping[str, Sequence[str]]) -> str:
        """As a dataset that has a name."""
        return reader.store(self, name, files)

    def read(self, find: Find, names: Sequence[str], config: DataConfig) -> Iterator[tuple[str, Any]]:
        """The examples of files, one file after the other, each with its place; classes are as they are written."""
        keys = self.key_names(config)
        for name in names:
            for place, row in find(name).rows(name, keys, self.title):
                yield place, self.example(*(self._part(row, index, key, place) for index, key in enumerate(keys)))

    def key_names(self, config: DataConfig) -> tuple[str, ...]:
        """The names of an example's parts in files and datasets."""
        return tuple(getattr(config, option) for option in self.keys)

    def _part(self, row: dict[str, Any], index: int, key: str, place: str) -> str:
        return (
            label_text(field(row, key, place), repr(key), place)
            if index == self.class_part
            else text_field(row, key, place)
        )

    def clean(
        self, found: Iterable[tuple[str, Any]], class_names: tuple[str, ...], notes: list[str], where: str = ""
    ) -> Iterator[Any]:
        """Examples with clean names of classes, one after the other.

        Args:
            found: examples with their places.
            class_names: of a run that scores them, if one does.
            notes: is given, behind the last example, lines about what was changed or left out.
            where: begins each note that is about a single split.

        Raises:
            UserError: an example has a class that the run has not.
        """
        del where
        spellings = dict[str, set[str]]()
        for place, example in found:
            if self.class_part is None:
                yield example
                continue
            label = example[self.class_part]
            clean = clean_label(label)
            require(
                not class_names or clean in class_names,
                f"A label must be one of the run's classes, {', '.join(class_names)}, {place} has {clean!r:.80}.",
            )
            spellings.setdefault(clean, set()).add(label)
            yield self.with_class(example, clean)
        notes += [
            f"class {label!r}: {', '.join(map(repr, sorted(written)))} in the files"
            for label, written in sorted(spellings.items())
            if written != {label}
        ]

    def with_class(self, example: Any, name_or_number: str | int) -> Any:
        """An example with another class."""
        return self.example(*(name_or_number if i == self.class_part else part for i, part in enumerate(example)))

    def numbered(self, examples: Sequence[Any], class_names: tuple[str, ...]) -> list[Any]:
        """Examples with the numbers of their classes."""
        if self.class_part is None:
            return list(examples)
        numbers = {name: number for number, name in enumerate(class_names)}
        return [self.with_class(example, numbers[example[self.class_part]]) for example in examples]

    def class_names(self, examples: Sequence[Any]) -> tuple[str, ...]:
        """The classes that occur, in order: numbers by their size, then names; of a form without classes, none."""
        if self.class_part is None:
            return ()
        names = in_order({example[self.class_part] for example in examples})
        require(len(names) > 1, f"There must be at least two classes, the training split has {', '.join(names)}.")
        return names

    def label(self, example: Any) -> str | int:
        """The class of an example, 0 where there are none."""
        return 0 if self.class_part is None else example[self.class_part]

    def text(self, example: Any) -> Any:
        """The text of an example, or its ids; of several, the last."""
        return next(part for i, part in reversed(list(enumerate(example))) if i != self.class_part)

    # ---- Batches -----------------------------------------------------------------------------------------------------

    def make_tokenizer(self, config: DataConfig, examples: Callable[[], Iterable[Any]]) -> Tokenizer:
        """The tokenizer of training examples: by default, one of all their texts."""
        return config.tokenizer.train(
            part for example in examples() for i, part in enumerate(example) if i != self.class_part
        )

    def encode(self, example: Any, tokenizer: Tokenizer, config: DataConfig) -> Any:
        """Tokens of an example, as many as a row has room for."""
        return self.frame(self.tokens(example, tokenizer), tokenizer, config)

    def tokens(self, example: Any, tokenizer: Tokenizer) -> Any:
        """An example with the ids of its texts, whole, in the place of these."""
        reader = source_tokenizer(tokenizer)
        parts = (
            part if i == self.class_part else (reader if i == self.source_part else tokenizer).encode(part)
            for i, part in enumerate(example)
        )
        return self.example(*parts)

    def frame(self, tokens: Any, tokenizer: Tokenizer, config: DataConfig) -> Any:
        """What `tokens` gives, as many as a row has room for, with the ids that stand around them."""
        raise NotImplementedError(f"{type(self).__name__} must define frame().")

    def length(self, encoded: Any) -> int:
        """Positions that an encoded example needs."""
        raise NotImplementedError(f"{type(self).__name__} must define length().")

    def collate(self, encoded: Sequence[Any], rows: int, length: int) -> Any:
        """A batch of encoded examples, whose rows beyond them are filler."""
        raise NotImplementedError(f"{type(self).__name__} must define collate().")

    def lengths(self, tokens: Any, tokenizer: Tokenizer) -> dict[str, int]:
        """Tokens of each text before it is cut, with the ids around it but one: a row has room for `sequence_length - 1`."""
        return {"texts": len(self.text(tokens)) + sum(map(len, around_text(tokenizer))) - 1}

    def count_cut(self, examples: Iterable[Any], tokenizer: Tokenizer, config: DataConfig) -> dict[str, int]:
        """How many texts of each kind (of `lengths`) are longer than a row has room for, and so are cut.

        Args:
            examples: as `tokens` gives them.
            tokenizer: that made them.
            config: of the rows.
        """
        cut: Counter[str] = Counter()
        for tokens in examples:
            cut.update(
                {name: int(n > config.sequence_length - 1) for name, n in self.lengths(tokens, tokenizer).items()}
            )
        return dict(cut)


# ---- Fields of a row -------------------------------------------------------------------------------------------------


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


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes: numbers by their size, then the others."""
    return tuple(sorted(names, key=_numbers_first))


def _numbers_first(name: str) -> tuple[bool, float, str]:
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (not math.isfinite(number), number if math.isfinite(number) else 0.0, name)


# ---- Rows ------------------------------------------------------------------------------------------------------------


def buckets(config: DataConfig) -> tuple[int, ...]:
    """The lengths that batches may have: one program is compiled for each."""
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
    """Tokens between the ids that stand around a text, as many as a row has room for."""
    begin, end = around
    room = config.sequence_length - len(begin) - len(end)
    require(
        room >= 1,
        f"A row must have room for a text and the {len(begin) + len(end)} ids around it, got "
        f"data.sequence_length={config.sequence_length}.",
    )
    return np.concatenate([begin, truncate(tokens, room, config.truncate), end]).astype(np.int32)


def padded(sequences: Sequence[np.ndarray], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [rows, length]; rows beyond the sequences are filler."""
    tokens_BT, segment_ids_BT = np.zeros((2, rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)], segment_ids_BT[row, : len(sequence)] = sequence, 1
    return tokens_BT, segment_ids_BT


def by_length(sequences: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Indices of sequences of similar length, at most `batch_size` at a time; each index once."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))
