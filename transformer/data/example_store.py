"""Examples of files: stored once as records under a hash of their content, and read at random."""

import array
import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import UInt

from transformer.config import DataConfig
from transformer.data.builder import describe, shard_path
from transformer.data.encoded import pack_fields, token_type
from transformer.data.example_parts import CLASS, Roles, unpack_parts
from transformer.data.example_tokens import roles_of
from transformer.data.forms.examples import ExampleForm, in_order
from transformer.data.identity import ContentHash
from transformer.data.prepare import data_directory, quiet
from transformer.data.progress import progress
from transformer.data.records import RandomAccess
from transformer.data.seen import Stamp
from transformer.data.shards import Shards, count_shards, holds, write_shard
from transformer.data.stored import open_stored
from transformer.data.tokens import READ_ONLY
from transformer.storage import write_whole
from transformer.types import UserError

_FORMAT = 1  # version of stored examples; a change stores all of them again
_SHARD_BYTES = 32 << 20  # size of a shard, which is in memory while it is written
_NAME, _SPLIT, _CLASSES, _POINTER = "examples", "train", "classes", "prepared.json"

Read = Callable[[list[str]], Iterator[Any]]
"""Reads the examples of files, with class names; fills the list with notes after the last example."""


class ExampleRecords(RandomAccess[Any]):
    """Stored examples with class numbers."""

    def __init__(self, shards: Shards, form: ExampleForm, roles: Roles) -> None:
        self.shards, self._form, self._roles = shards, form, roles

    def __len__(self) -> int:
        return len(self.shards)

    def _read(self, index: int) -> Any:
        return self._form.example._make(unpack_parts(self.shards[index], self._roles))


class Kept(NamedTuple):
    """The stored examples of files."""

    directory: epath.Path
    """The examples' folder, which also holds their tokens and fingerprints."""
    records: ExampleRecords
    roles: Roles
    classes: tuple[str, ...]
    """The class names, in the order of their numbers."""
    notes: list[str]
    """Notes for the user."""

    def labels(self) -> UInt[np.ndarray, " n"]:
        """The class of each example, read without the examples."""
        stored = Shards([self.directory / _NAME / _CLASSES], [1])
        return np.frombuffer(stored[0], token_type(len(self.classes)))

    def fingerprint(self, form: ExampleForm, known: tuple[str, ...], *parts: str | int) -> str:
        """The hash of a source: its kind, classes, examples and the given parts; stored after the first computation."""
        key = ContentHash().ended(*known, *parts)
        note = self.directory / f"fingerprint-{key[:16]}"
        with contextlib.suppress(OSError):
            return note.read_text()
        content = ContentHash()
        content.add(form.kind, *known)
        for example in self.records:
            named = form.with_class(example, self.classes[example[form.class_part]]) if self.classes else example
            content.add(*named)
        found = content.ended(*parts)
        with contextlib.suppress(OSError):
            write_whole(note, found)
        return found


def keep_examples(
    form: ExampleForm,
    read: Read,
    stamp: Stamp,
    config: DataConfig,
    name: str,
    check: Callable[[Any, Sequence[str]], object],
) -> Kept | None:
    """The stored examples of files; they are stored now unless they already are.

    Args:
        form: the form of the examples.
        read: reads them.
        stamp: the state of their files; files already read in this state are not read again if their examples are stored.
        config: has the directory.
        name: the name of the source, for messages.
        check: receives an example and the names of all classes before anything is written, and may raise.

    Returns:
        None if the examples cannot be stored: the directory is not writable, or a user-defined form has parts that are not text.

    Raises:
        UserError: there are no examples, they change while they are read, or the disk is full.
    """
    identity = stamp.known()
    if identity is None or not (_directory(form, identity, config) / _POINTER).exists():
        survey = _survey(form, read, name, check)
        if survey is None:
            return None
        identity = survey.identity
        directory = _directory(form, identity, config)
        try:
            if not (directory / _POINTER).exists():
                _write(form, read, survey, directory, name)
        except OSError as error:
            if error.errno in READ_ONLY:
                return None
            raise UserError(f"Examples must be stored below data.data_dir, {directory} failed: {error}.") from error
        stamp.note(identity)
    return _open(form, _directory(form, identity, config))


def _directory(form: ExampleForm, identity: str, config: DataConfig) -> epath.Path:
    kind = re.sub(r"\W+", "_", form.kind, flags=re.ASCII)
    return data_directory(config) / "example_records" / f"{kind}-{identity[:16]}"


def _open(form: ExampleForm, directory: epath.Path) -> Kept:
    with quiet():
        info: Any = open_stored(directory / _NAME).info
    roles, split = roles_of(form, form.example._fields), info.splits[_SPLIT]
    classes = next((tuple(info.features[field].names) for field, role in roles.items() if role == CLASS), ())
    records = ExampleRecords(Shards(split.filepaths, split.shard_lengths), form, roles)
    return Kept(directory, records, roles, classes, json.loads((directory / _POINTER).read_text())["notes"])


# ---- Storing ---------------------------------------------------------------------------------------------------------


class _Survey(NamedTuple):
    """The results of the first reading."""

    identity: str
    num_bytes: int
    classes: tuple[str, ...]
    """The class names, in the order of their numbers."""
    labels: UInt[np.ndarray, " n"]
    """The class of each example."""
    notes: list[str]


class _Hash:
    """A hash of examples, updated as they are read."""

    def __init__(self, form: ExampleForm) -> None:
        self._content = ContentHash()
        self._content.add(_FORMAT, form.kind, *form.example._fields)

    def add(self, example: Any) -> None:
        self._content.add(*example)

    def ended(self, notes: Sequence[str]) -> str:
        # Notes, such as spellings of classes, are not part of the examples, and are printed at every start.
        return self._content.ended("notes", *notes)


def _survey(form: ExampleForm, read: Read, name: str, check: Callable[[Any, Sequence[str]], object]) -> _Survey | None:
    content, notes, num_bytes, example = _Hash(form), list[str](), 0, None
    numbers, labels = dict[str, int](), array.array("I")
    for example in read(notes):
        try:
            num_bytes += sum(len(part.encode()) for part in example)
        except (AttributeError, UnicodeEncodeError):
            return None
        content.add(example)
        if form.class_part is not None:
            labels.append(numbers.setdefault(example[form.class_part], len(numbers)))
    if example is None:
        raise UserError(f"A source must hold examples, {name} has none.")
    classes = in_order(numbers)
    check(example, classes)
    ranks = np.zeros(max(1, len(numbers)), token_type(max(1, len(classes))))
    for rank, label in enumerate(classes):
        ranks[numbers[label]] = rank
    return _Survey(content.ended(notes), num_bytes, classes, ranks[np.array(labels, np.int64)], notes)


def _write(form: ExampleForm, read: Read, survey: _Survey, directory: epath.Path, name: str) -> None:
    """Write shards, then their description, then the pointer that makes them visible; files are hashed again."""
    folder, roles = directory / _NAME, roles_of(form, form.example._fields)
    folder.mkdir(parents=True, exist_ok=True)
    count = count_shards(survey.num_bytes, _SHARD_BYTES)
    paths = [shard_path(folder, _NAME, _SPLIT, shard, count) for shard in range(count)]
    content, notes = _Hash(form), list[str]()
    numbers = {label: number for number, label in enumerate(survey.classes)}
    records, shard, written = list[bytes](), 0, 0
    with progress(f"examples of {name}", survey.num_bytes) as advance:
        for example in read(notes):
            content.add(example)
            while shard < min(written * count // max(1, survey.num_bytes), count - 1):
                _flush(paths[shard], records)
                shard, records = shard + 1, []
            size = sum(len(part.encode()) for part in example)
            written += size
            parts = (
                numbers.get(part, -1) if role == CLASS else part
                for role, part in zip(roles.values(), example, strict=True)
            )
            records.append(pack_fields(dict(zip(roles, parts, strict=True))))
            advance(size)
    if content.ended(notes) != survey.identity:
        shutil.rmtree(directory, ignore_errors=True)
        raise UserError(f"A source must stay as it is while it is read, {name} changed; start again.")
    for path in paths[shard:]:
        _flush(path, records)
        records = []
    if survey.classes:
        write_shard(folder / _CLASSES, [survey.labels.tobytes()])
    with quiet():
        describe(folder, _NAME, _features(roles, survey.classes), {_SPLIT: paths})
    write_whole(directory / _POINTER, json.dumps({"notes": survey.notes}))


def _flush(path: epath.Path, records: Sequence[bytes]) -> None:
    if not holds(path, records):
        write_shard(path, records)


def _features(roles: Roles, classes: Sequence[str]) -> dict[str, Any]:
    return {
        name: tfds.features.ClassLabel(names=list(classes)) if role == CLASS else tfds.features.Text()
        for name, role in roles.items()
    }
