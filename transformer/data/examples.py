"""Labelled texts and pairs: read from files, stored as datasets with a name, and opened as either."""

import dataclasses
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from transformer.config import DataConfig
from transformer.data.builder import Example, builder_class
from transformer.data.example_source import example_source
from transformer.data.forms import TextExample
from transformer.data.identity import ContentHash
from transformer.data.prepare import data_directory, quiet
from transformer.data.registry import find_source, read_labelled, read_pairs
from transformer.data.source import ExampleSource, Reads
from transformer.data.source_kind import LabelledText, clean_label
from transformer.data.sources.tfds import KEYS, TfdsDataset, stored_builder
from transformer.data.splits import SPLITS
from transformer.data.stored import check_stored
from transformer.storage import explained
from transformer.validation import require

VERSION = "1.0.0"
_NAME = re.compile(r"[a-z][a-z0-9_]*")


# ---- Examples of files -----------------------------------------------------------------------------------------------


def open_examples(
    names: Sequence[str], reads: Reads, config: DataConfig, class_names: tuple[str, ...] = ()
) -> ExampleSource:
    """A stored dataset, or files; where there is no validation split, a fixed share of training is taken for it.

    Args:
        names: one dataset, one folder, or files: of labelled texts one after the other, of pairs one or two.
        reads: labelled or pairs.
        config: names the fields and the directory of stored datasets.
        class_names: of a run that scores them, whose numbers the labels are given; else the classes are those that occur.

    Raises:
        UserError: they cannot be read, or have a class that the run has not; the message has the file and the line.
    """
    stored = [find_source(name).open_stored(name, reads, config, class_names) for name in names]
    if len(names) == 1 and stored[0] is not None:
        return stored[0]
    require(
        not any(stored),
        f"Labelled texts and pairs are read from one dataset, or from files, got data.source={', '.join(names)}; give one of "
        "them, or prepare one dataset of all.",
    )
    notes: list[str] = []
    examples = list(_read(reads, names, config, class_names, notes))
    require(len(examples) > 0, f"A source must hold examples, {', '.join(names)} has none.")
    known = class_names or (_class_names(examples) if reads == "labelled" else ())
    content = ContentHash()
    content.add(reads, *known)
    for example in examples:
        content.add(*example)
    if reads == "labelled":
        numbers = {name: number for number, name in enumerate(known)}
        converted = [TextExample(text, label=numbers[label]) for text, label in examples]
    else:
        converted = [TextExample(source, target=target) for source, target in examples]
    return example_source(
        " and ".join(name.rpartition("/")[2] for name in names),
        reads,
        content,
        {"train": len(examples)},
        known,
        lambda split: (converted, lambda example: example),
        lambda: [example.label for example in converted],
        config.validation_fraction,
        "\n".join(notes),
    )


def _read(
    reads: Reads,
    names: Sequence[str],
    config: DataConfig,
    class_names: tuple[str, ...],
    notes: list[str],
    what: str = "",
) -> list[Any]:
    """Labelled texts with clean labels, or pairs that are not blank; notes of what was changed or left out."""
    if reads == "pairs":
        pairs = [pair for _, pair in read_pairs(names, config)]
        full = [pair for pair in pairs if pair.source.strip() and pair.target.strip()]
        if len(full) < len(pairs):
            notes.append(f"{what}{len(pairs) - len(full):,} pairs with an empty side are left out")
        return full
    texts, spellings = [], dict[str, set[str]]()
    for place, (text, label) in read_labelled(names, config):
        clean = clean_label(label)
        require(
            not class_names or clean in class_names,
            f"A label must be one of the run's classes, {', '.join(class_names)}, {place} has {clean!r:.80}.",
        )
        spellings.setdefault(clean, set()).add(label)
        texts.append(LabelledText(text, clean))
    notes += [
        f"class {label!r}: {', '.join(map(repr, sorted(written)))} in the files"
        for label, written in sorted(spellings.items())
        if written != {label}
    ]
    return texts


def _class_names(examples: Sequence[LabelledText]) -> tuple[str, ...]:
    """The classes that occur, in order: numbers by their size, then names."""
    names = sorted({example.label for example in examples}, key=_numbers_first)
    require(len(names) > 1, f"There must be at least two classes, the training split has {', '.join(names)}.")
    return tuple(names)


def _numbers_first(name: str) -> tuple[bool, float, str]:
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (not math.isfinite(number), number if math.isfinite(number) else 0.0, name)


# ---- From files to a dataset -----------------------------------------------------------------------------------------


def prepare_examples(reads: Reads, name: str, files: Mapping[str, Sequence[str]], config: DataConfig) -> str:
    """Store examples as the TFDS dataset `name` in `config.data_dir`, which `tfds.data_source(name)` then reads.

    Args:
        reads: labelled or pairs.
        name: of the dataset, lower case.
        files: for each split, what `read_labelled` or `read_pairs` reads; empty splits are left out.
        config: names the fields and the directory.

    Returns:
        What the dataset holds, for the user.

    Raises:
        UserError: the files cannot be read as examples, or another dataset has this name.
    """
    require(
        _NAME.fullmatch(name) is not None,
        f"A dataset's name must be lower-case letters, digits and underscores, got {name!r}.",
    )
    keys = [getattr(config, option) for option in KEYS[reads]]
    require(
        len(set(keys)) == len(keys) and "" not in keys,
        f"Fields must have names of their own, data.{' and data.'.join(KEYS[reads])} are {' and '.join(map(repr, keys))}.",
    )
    splits: dict[str, list[Any]] = {}
    notes: list[str] = []
    for split in SPLITS:
        if files.get(split):
            splits[split] = _read(reads, files[split], config, (), notes, f"{split}: ")
            require(
                len(splits[split]) > 0, f"A split must hold examples, {split} from {', '.join(files[split])} has none."
            )
    require("train" in splits, "A dataset must have a training split, got no file for it.")
    content = ContentHash()
    for split, examples in splits.items():
        for example in examples:
            content.add(split, *example)
    fingerprint = content.hexdigest()

    features: dict[str, Any] = dict.fromkeys(keys, tfds.features.Text())
    if reads == "labelled":
        names = _class_names(splits["train"])
        for split, examples in splits.items():
            unknown = sorted({example.label for example in examples} - set(names))
            require(not unknown, f"Every class must occur in the training split, {split} has {', '.join(unknown)} too.")
        features[config.label_key] = tfds.features.ClassLabel(names=list(names))

    def rows(examples: list[Any]) -> Callable[[], Iterator[Example]]:
        return lambda: (dict(zip(features, example, strict=True)) for example in examples)

    directory = data_directory(config)
    target = directory / name / VERSION
    if target.exists():
        there = stored_builder(name, config).info.metadata or {}
        require(
            there.get("fingerprint") == fingerprint,
            f"A dataset's name must be new, {target} holds other examples; choose another name, or remove it.",
        )
    else:
        aside = directory / f".{name}-{uuid.uuid4().hex}"
        try:
            with explained(f"The dataset {name} in {directory}"), quiet():
                builder = builder_class(name)(
                    features=features,
                    splits={split: rows(examples) for split, examples in splits.items()},
                    version=VERSION,
                    data_dir=str(aside),
                    metadata={"fingerprint": fingerprint, "kind": reads},
                )
                builder.download_and_prepare()
                check_stored(builder.data_path, features, builder.splits)
                target.parent.mkdir(parents=True, exist_ok=True)
                builder.data_path.rename(target)
        finally:
            if aside.exists():
                aside.rmtree()
    stored = TfdsDataset().open_stored(name, reads, dataclasses.replace(config, validation_fraction=0.0), ())
    return "\n".join([stored.description, *dict.fromkeys(notes)])
