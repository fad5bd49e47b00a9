"""Labelled texts, pairs and other examples: read from files, stored as named datasets, and opened as either."""

import dataclasses
import functools
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from transformer.config import DataConfig
from transformer.data.builder import Example, builder_class
from transformer.data.example_source import class_numbers, example_source
from transformer.data.example_store import Kept, Read, keep_examples
from transformer.data.example_tokens import open_stored_tokens
from transformer.data.forms.examples import ExampleForm
from transformer.data.identity import ContentHash
from transformer.data.prepare import data_directory, quiet
from transformer.data.registry import find_source
from transformer.data.seen import Stamp, joined
from transformer.data.source import ExampleSource
from transformer.data.sources.tfds import TfdsDataset, stored_builder
from transformer.data.splits import SPLITS
from transformer.data.stored import check_stored
from transformer.storage import explained
from transformer.validation import require

VERSION = "1.0.0"
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def open_examples(
    names: Sequence[str], form: ExampleForm, config: DataConfig, class_names: tuple[str, ...] = ()
) -> ExampleSource:
    """Open a stored dataset, or files; without a validation split, a fixed fraction of training is held out.

    Args:
        names: one dataset, one folder, or files: one or two for pairs, any number for other forms.
        form: the form of the examples.
        config: names the fields and the directory of stored datasets.
        class_names: the classes of the run that scores the examples, which number the labels; by default, the classes that occur.

    Raises:
        UserError: the examples are not readable, or have an unknown class; the message names the file and the line.
    """
    stored = [find_source(name).open_stored(name, form, config, class_names) for name in names]
    if len(names) == 1 and stored[0] is not None:
        return stored[0]
    require(
        not any(stored),
        f"{form.title.capitalize()} are read from one dataset, or from files, got data.source={', '.join(names)}; give one of "
        "them, or prepare one dataset of all.",
    )
    name = " and ".join(name.rpartition("/")[2] for name in names)

    def read(notes: list[str]) -> Iterator[Any]:
        return form.clean(form.read(find_source, names, config), class_names, notes)

    def known(example: Any, classes: Sequence[str]) -> tuple[str, ...]:
        return class_names or form.class_names([form.with_class(example, each) for each in classes])

    kept = keep_examples(form, read, _stamp(names, form, config), config, name, known)
    return _in_memory(form, read, config, name, known) if kept is None else _kept(form, kept, read, config, name, known)


def _stamp(names: Sequence[str], form: ExampleForm, config: DataConfig) -> Stamp:
    reading = (type(form).__qualname__, *form.key_names(config))
    stamps = [find_source(name).stamp(name, reading, config) for name in names]
    # The files that a user-defined form reads are unknown.
    return joined(stamps) if type(form).__module__.startswith("transformer.") else Stamp(stamps[0].path, "")


Known = Callable[[Any, Sequence[str]], tuple[str, ...]]
"""The classes in the order of their numbers, computed from an example and the classes that occur."""


def _kept(form: ExampleForm, kept: Kept, read: Read, config: DataConfig, name: str, known: Known) -> ExampleSource:
    """Open stored examples."""
    class_names = known(kept.records[0], kept.classes)
    if not set(kept.classes) <= set(class_names):
        for _ in read([]):  # stops with an error at the example with another class
            pass
    numbers = class_numbers(kept.classes, class_names, name)

    def number(example: Any) -> Any:
        return form.with_class(example, numbers[example[form.class_part]]) if numbers else example

    def tokens(split: str, tokenizer: Any, store: bool) -> tuple[Sequence[Any], Callable[[Any], Any]] | None:
        shards, folder = kept.records.shards, kept.directory / "tokens"
        found = open_stored_tokens(form, shards, kept.roles, folder, split, tokenizer, name, store)
        return None if found is None else (found, number)

    return example_source(
        name,
        functools.partial(kept.fingerprint, form, class_names),
        {"train": len(kept.records)},
        class_names,
        lambda split: (kept.records, number),
        lambda: np.array(numbers)[kept.labels()] if numbers else None,
        config.validation_fraction,
        "\n".join(kept.notes),
        tokens,
    )


def _in_memory(form: ExampleForm, read: Read, config: DataConfig, name: str, known: Known) -> ExampleSource:
    """Open examples that cannot be stored."""
    notes: list[str] = []
    examples = list(read(notes))
    require(len(examples) > 0, f"A source must hold examples, {name} has none.")
    class_names = known(
        examples[0], sorted({str(form.label(example)) for example in examples}) if form.class_part is not None else ()
    )
    content = ContentHash()
    content.add(form.kind, *class_names)
    for example in examples:
        content.add(*example)
    numbered = form.numbered(examples, class_names)
    return example_source(
        name,
        content.ended,
        {"train": len(examples)},
        class_names,
        lambda split: (numbered, lambda example: example),
        lambda: None if form.class_part is None else [form.label(example) for example in numbered],
        config.validation_fraction,
        "\n".join(notes),
    )


# ---- From files to a dataset -----------------------------------------------------------------------------------------


def prepare_examples(form: ExampleForm, name: str, files: Mapping[str, Sequence[str]], config: DataConfig) -> str:
    """Store examples as the TFDS dataset `name` in `config.data_dir`, which `tfds.data_source(name)` then reads.

    Args:
        form: the form of the examples.
        name: the dataset's name, in lower case.
        files: the files of each split, for `form.read`; empty splits are omitted.
        config: names the fields and the directory.

    Returns:
        A description of the dataset for the user.

    Raises:
        UserError: the files cannot be read as examples, or another dataset has this name.
    """
    require(
        _NAME.fullmatch(name) is not None,
        f"A dataset's name must be lower-case letters, digits and underscores, got {name!r}.",
    )
    draft, notes = _read_draft(form, files, config)
    target = data_directory(config) / name / VERSION
    if target.exists():
        there = stored_builder(name, config).info.metadata or {}
        require(
            there.get("fingerprint") == draft.fingerprint,
            f"A dataset's name must be new, {target} holds other examples; choose another name, or remove it.",
        )
    else:
        with explained(f"The dataset {name} in {data_directory(config)}"), quiet():
            draft.write(name, target)
    stored = TfdsDataset().open_stored(name, form, dataclasses.replace(config, validation_fraction=0.0), ())
    return "\n".join([stored.description, *dict.fromkeys(notes)])


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A dataset to be written."""

    kind: str
    """The dataset's form."""
    features: dict[str, Any]
    splits: dict[str, Callable[[], Iterator[Any]]]
    """The examples of each split; each call reads them again."""
    fingerprint: str
    """A hash of the examples of all splits, in order."""

    def write(self, name: str, target: epath.Path) -> None:
        """Write the dataset to a temporary folder, read it back, and rename it."""
        aside = target.parent.parent / f".{name}-{uuid.uuid4().hex}"
        again = ContentHash()
        try:
            builder = builder_class(name)(
                features=self.features,
                splits={split: functools.partial(self._rows, split) for split in self.splits},
                version=VERSION,
                data_dir=str(aside),
                metadata={"fingerprint": self.fingerprint, "kind": self.kind},
            )
            builder.download_and_prepare()
            rows = {split: functools.partial(self._rows, split, again) for split in self.splits}
            check_stored(builder.data_path, self.features, rows)
            require(
                again.hexdigest() == self.fingerprint,
                f"Files must stay as they are while they are prepared, the files of {name} changed; start again.",
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            builder.data_path.rename(target)
        finally:
            if aside.exists():
                aside.rmtree()

    def _rows(self, split: str, content: ContentHash | None = None) -> Iterator[Example]:
        for example in self.splits[split]():
            if content is not None:
                content.add(split, *example)
            yield dict(zip(self.features, example, strict=True))


def _read_draft(form: ExampleForm, files: Mapping[str, Sequence[str]], config: DataConfig) -> tuple[_Draft, list[str]]:
    """The examples of files, and notes about changed or skipped examples."""
    keys = form.key_names(config)
    require(
        len(set(keys)) == len(keys) and "" not in keys,
        f"Fields must have names of their own, data.{' and data.'.join(form.keys)} are {' and '.join(map(repr, keys))}.",
    )
    notes: list[str] = []

    def read(split: str, notes: list[str]) -> Iterator[Any]:
        return form.clean(form.read(find_source, files[split], config), (), notes, f"{split}: ")

    content, first, classes = ContentHash(), dict[str, Any](), dict[str, set[str]]()
    for split in filter(files.get, SPLITS):
        for example in read(split, notes):
            content.add(split, *example)
            first.setdefault(split, example)
            classes.setdefault(split, set()).add(str(form.label(example)))
        require(split in first, f"A split must hold examples, {split} from {', '.join(files[split])} has none.")
    require("train" in first, "A dataset must have a training split, got no file for it.")
    features: dict[str, Any] = dict.fromkeys(keys, tfds.features.Text())
    if form.class_part is not None:
        names = form.class_names([form.with_class(first["train"], name) for name in classes["train"]])
        for split, found in classes.items():
            unknown = sorted(found - set(names))
            require(not unknown, f"Every class must occur in the training split, {split} has {', '.join(unknown)} too.")
        features[keys[form.class_part]] = tfds.features.ClassLabel(names=list(names))
    splits = {split: functools.partial(read, split, []) for split in first}
    return _Draft(form.kind, features, splits, content.hexdigest()), notes
