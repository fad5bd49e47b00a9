"""Datasets of labelled texts and of text pairs: prepared from files, and opened by name with TFDS."""

import dataclasses
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds

from transformer.config import DataConfig
from transformer.data.builder import Example, builder_class
from transformer.data.example_files import LabelledText, TextPair, clean_label, read_labelled, read_pairs
from transformer.data.forms import TextExample
from transformer.data.identity import ContentHash
from transformer.data.prepare import (
    Converted,
    data_directory,
    hash_tfds,
    quiet,
    tfds_builder,
    tfds_sizes,
    tfds_split,
)
from transformer.data.splits import SPLIT_RULE, SPLITS, hold_out
from transformer.data.stored import check_stored, in_order
from transformer.storage import explained
from transformer.validation import require

Kind = Literal["labelled", "pairs"]
VERSION = "1.0.0"
_KEYS = {"labelled": ("text_key", "label_key"), "pairs": ("source_key", "target_key")}  # of `DataConfig`
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class ExampleSource:
    """A dataset of labelled texts or pairs."""

    name: str
    fingerprint: str
    kind: Kind
    split_names: tuple[str, ...]
    description: str
    class_names: tuple[str, ...]
    open_split: Callable[[str], Sequence[TextExample]]
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Split -> its examples."""

    def examples(self, split: str) -> Sequence[TextExample]:
        """The examples of a split, read at random.

        Raises:
            UserError: there is no such split.
        """
        require(
            split in self.split_names,
            f"A split must be one of {', '.join(self.split_names)} for {self.name}, got {split!r}; "
            "data.validation_fraction takes a validation split from the training one where the dataset has none.",
        )
        return self.open_split(split)


# ---- From files to a dataset -----------------------------------------------------------------------------------------


def prepare_examples(kind: Kind, name: str, files: Mapping[str, Sequence[str]], config: DataConfig) -> str:
    """Store examples as the TFDS dataset `name` in `config.data_dir`, which `tfds.data_source(name)` then reads.

    Args:
        kind: of the examples.
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
    keys = [getattr(config, option) for option in _KEYS[kind]]
    require(
        len(set(keys)) == len(keys) and "" not in keys,
        f"Fields must have names of their own, data.{' and data.'.join(_KEYS[kind])} are {' and '.join(map(repr, keys))}.",
    )
    splits: dict[str, list[Any]] = {}
    notes: list[str] = []
    for split in SPLITS:
        if files.get(split):
            splits[split] = list(_read(kind, files[split], config))
            if kind == "pairs":
                splits[split] = _without_blanks(splits[split], split, notes)
            require(
                len(splits[split]) > 0, f"A split must hold examples, {split} from {', '.join(files[split])} has none."
            )
    require("train" in splits, "A dataset must have a training split, got no file for it.")
    if kind == "labelled":
        splits = _with_clean_labels(splits, notes)
    content = ContentHash()
    for split, examples in splits.items():
        for example in examples:
            content.add(split, *example)
    fingerprint = content.hexdigest()

    features: dict[str, Any] = dict.fromkeys(keys, tfds.features.Text())
    if kind == "labelled":
        names = sorted({example.label for example in splits["train"]}, key=_numbers_first)
        for split, examples in splits.items():
            unknown = sorted({example.label for example in examples} - set(names))
            require(not unknown, f"Every class must occur in the training split, {split} has {', '.join(unknown)} too.")
        require(len(names) > 1, f"There must be at least two classes, the training split has {', '.join(names)}.")
        features[config.label_key] = tfds.features.ClassLabel(names=names)

    def rows(examples: list[Any]) -> Callable[[], Iterator[Example]]:
        return lambda: (dict(zip(features, example, strict=True)) for example in examples)

    directory = data_directory(config)
    target = directory / name / VERSION
    if target.exists():
        there = tfds_builder(name, config).info.metadata or {}
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
                    metadata={"fingerprint": fingerprint, "kind": kind},
                )
                builder.download_and_prepare()
                check_stored(builder.data_path, features, builder.splits)
                target.parent.mkdir(parents=True, exist_ok=True)
                builder.data_path.rename(target)
        finally:
            if aside.exists():
                aside.rmtree()
    return "\n".join(
        [open_examples(name, kind, dataclasses.replace(config, validation_fraction=0.0)).description, *notes]
    )


def _with_clean_labels(splits: dict[str, list[Any]], notes: list[str]) -> dict[str, list[Any]]:
    """The same examples with `clean_label`; a note for each class that was written otherwise too."""
    spellings: dict[str, set[str]] = {}
    for examples in splits.values():
        for example in examples:
            spellings.setdefault(clean_label(example.label), set()).add(example.label)
    notes += [
        f"class {label!r}: {', '.join(map(repr, sorted(written)))} in the files"
        for label, written in sorted(spellings.items())
        if written != {label}
    ]
    return {
        split: [example._replace(label=clean_label(example.label)) for example in examples]
        for split, examples in splits.items()
    }


def _without_blanks(pairs: list[TextPair], split: str, notes: list[str]) -> list[TextPair]:
    """The pairs with text on both sides; a note of how many others there were."""
    full = [pair for pair in pairs if pair.source.strip() and pair.target.strip()]
    if len(full) < len(pairs):
        notes.append(f"{split}: {len(pairs) - len(full):,} pairs with an empty side are left out")
    return full


def _read(kind: Kind, paths: Sequence[str], config: DataConfig) -> Iterator[LabelledText | TextPair]:
    if kind == "labelled":
        return read_labelled(paths, text_key=config.text_key, label_key=config.label_key)
    return read_pairs(paths, source_key=config.source_key, target_key=config.target_key)


def _numbers_first(name: str) -> tuple[bool, float, str]:
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return (not math.isfinite(number), number if math.isfinite(number) else 0.0, name)


# ---- From a dataset's name to examples -------------------------------------------------------------------------------


def open_examples(name: str, kind: Kind, config: DataConfig) -> ExampleSource:
    """A prepared dataset; where it has no validation split, a fixed share of the training one is taken for it.

    Raises:
        UserError: it is not there, or its features are not what `kind` needs.
    """
    builder = tfds_builder(name, config)
    features = builder.info.features
    keys = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    needed = [getattr(config, option) for option in _KEYS[kind]]
    for key, option in zip(needed, _KEYS[kind], strict=True):
        require(
            key in keys, f"data.{option} must be a feature of {name!r}, got {key!r}; it has {', '.join(sorted(keys))}."
        )
    class_names: tuple[str, ...] = ()
    if kind == "labelled":
        label: Any = features[config.label_key]
        require(
            isinstance(label, tfds.features.ClassLabel),
            f"data.label_key must name a ClassLabel of {name!r}, {config.label_key!r} is {type(label).__name__}.",
        )
        class_names = tuple(label.names)
        require(
            len(set(class_names)) == len(class_names),
            f"Classes must have different names, {name!r} has {', '.join(class_names)}; prepare it again.",
        )
    content = ContentHash()
    content.add(kind, *class_names)
    content.add((builder.info.metadata or {}).get("fingerprint", ""))
    hash_tfds(content, builder, config, lambda example: [_present(example[key]) for key in needed])
    sizes = tfds_sizes(builder)
    carved = "train" in sizes and "validation" not in sizes and config.validation_fraction > 0
    if carved:
        classes = _labels(builder, "train", config) if kind == "labelled" else np.zeros(sizes["train"], np.int64)
        taken = hold_out(classes, config.validation_fraction)
        sizes |= {"train": sizes["train"] - len(taken), "validation": len(taken)}

    def to_example(example: Example) -> TextExample:
        first = example[needed[0]].decode("utf-8", "replace")
        if kind == "labelled":
            label = int(example[needed[1]])
            require(
                0 <= label < len(class_names),
                f"A labelled text must have one of the {len(class_names)} classes of {name!r}, got label {label}, as in splits "
                "without labels; choose another split.",
            )
            return TextExample(first, label=label)
        return TextExample(first, target=example[needed[1]].decode("utf-8", "replace"))

    def open_split(split: str) -> Sequence[TextExample]:
        stored = tfds_split(builder, "train" if carved and split == "validation" else split, config)
        indices = np.arange(len(stored))
        if carved and split in ("train", "validation"):
            held_out = np.isin(indices, taken)
            indices = indices[held_out if split == "validation" else ~held_out]
        return Converted(stored, to_example, indices)

    full_name = builder.info.full_name
    description = f"{full_name}: " + ", ".join(f"{split} {count:,} examples" for split, count in sizes.items())
    if class_names:
        description += f"; classes {', '.join(class_names)}"
    content.add(SPLIT_RULE, *(part for size in sizes.items() for part in size))  # how much is held out
    return ExampleSource(
        full_name, content.hexdigest(), kind, tuple(sizes), description, class_names, open_split, sizes
    )


def _present(value: Any) -> Any:
    require(
        value is not None,
        "A stored dataset must be whole, one example has no value. Remove it and prepare it again.",
    )
    return value


def _labels(builder: Any, split: str, config: DataConfig) -> np.ndarray:
    """The class of each example, without decoding the texts."""
    label: Any = tfds.features.FeaturesDict({config.label_key: builder.info.features[config.label_key]})
    raw = tfds_split(builder, split, config, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return np.array([int(label.deserialize_example_np(example)[config.label_key]) for example in in_order(raw)])
