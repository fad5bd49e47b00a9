"""Datasets that TFDS stored on disk, found by name and opened without running or importing code that they name.

TFDS itself imports the code of a dataset, and the module of each feature's class in `features.json`. This module treats a
dataset as data: its description is checked against the known kinds of features before TFDS reads it.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from transformer.types import UserError
from transformer.validation import require

NAME = re.compile(r"(?P<name>[a-zA-Z]\w*)(/(?P<config>[\w.+-]+))?(:(?P<version>(\d+|\*)(\.(\d+|\*)){2}))?")
"""The syntax of a dataset name: `name`, `name/config`, either with `:1.0.0`; a number may be `*`."""

_READ_AT_ONCE = 1024
_MOST_CLASSES = 1_000_000
INFO, _FEATURES = "dataset_info.json", "features.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CONTENT = {
    tfds.features.FeaturesDict: "featuresDict",
    tfds.features.Text: "text",
    tfds.features.ClassLabel: "classLabel",
    tfds.features.Tensor: "tensor",
    tfds.features.Scalar: "tensor",
    tfds.features.Sequence: "sequence",
    tfds.features.Dataset: "sequence",
    tfds.features.Translation: "translation",
    tfds.features.TranslationVariableLanguages: "translation",
}
_TYPES = ("string", "bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))
_TYPES += ("float16", "bfloat16", "float32", "float64")  # for other types TFDS would import TensorFlow
_KINDS = {f"{kind.__module__}.{kind.__name__}": field for kind, field in _CONTENT.items()}
"""The permitted class names, each with the field that describes it; no other class is looked up."""


def find_stored(name: str, data_dir: epath.Path) -> epath.Path | None:
    """The directory of a dataset's latest or given version in `data_dir`; None if there is none.

    Raises:
        UserError: the name is malformed, or the dataset has several configurations and the name has none.
    """
    parts = NAME.fullmatch(name)
    if parts is None:
        raise UserError(f"The name of a TFDS dataset must be written name, name/config or name:1.0.0, got {name!r}.")
    # TFDS accepts the name of a class too.
    snake_case = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", parts["name"]).lower()
    for folder in dict.fromkeys((data_dir / parts["name"], data_dir / snake_case)):
        if (folder / (parts["config"] or "") / INFO).exists():  # a version in the position of a configuration
            return folder / (parts["config"] or "")
        if parts["config"]:
            found = _latest(folder / parts["config"], parts["version"])
        else:
            found = _latest(folder, parts["version"]) or _only_config(name, folder, parts["version"])
        if found is not None:
            return found
    return None


def open_stored(directory: epath.Path) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a stored dataset, for reading.

    Raises:
        UserError: the description is damaged, or has features other than text, classes, numbers and nests of them.
    """
    info, features = (_read_json(directory / file) for file in (INFO, _FEATURES))
    require("features" not in info, f"Features must be described in {_FEATURES}, {directory / INFO} has some too.")
    _check_feature(features, str(directory / _FEATURES), "the features")
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # any error of a parser of external files
        raise UserError(f"A stored dataset must be whole, {directory} cannot be opened: {error}") from error


def check_stored(
    directory: epath.Path, features: Mapping[str, Any], splits: Mapping[str, Callable[[], Iterator[dict[str, Any]]]]
) -> None:
    """Read a dataset back, and compare class names and every example with the originals.

    Raises:
        UserError: something differs; the dataset must not be used.
    """
    builder = open_stored(directory)
    kinds: Any = builder.info.features  # TFDS declares the base class of features, which has no names

    def as_given(key: str, value: Any) -> Any:
        feature = kinds[key]
        if isinstance(feature, tfds.features.ClassLabel):
            return feature.names[value]
        return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else int(value)

    for key, feature in features.items():
        if isinstance(feature, tfds.features.ClassLabel):
            _require_same(list(feature.names), list(kinds[key].names), "the classes")
    for split, examples in splits.items():
        stored = in_order(builder.as_data_source(split))  # pyright: ignore[reportCallIssue] (the stub hides the parameters)
        for number, (given, found) in enumerate(itertools.zip_longest(examples(), stored), 1):
            found = found and {key: as_given(key, found[key]) for key in features}
            _require_same(given, found, f"example {number:,} of {split}")


def _require_same(given: Any, found: Any, location: str) -> None:
    require(
        given == found,
        f"What was stored must come back as it was given, {location} came back as {_short(found)} for {_short(given)}. "
        "Nothing is kept: prepare it again. If the error remains, the files change while they are read, or hold values that "
        "cannot be stored.",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def in_order(stored: Any, indices: Sequence[int] | None = None) -> Iterator[Any]:
    """All examples of a TFDS data source, or those at `indices`, read in groups, which takes a tenth of the time."""
    indices = range(len(stored)) if indices is None else indices
    for start in range(0, len(indices), _READ_AT_ONCE):
        with readable():
            examples = stored.__getitems__(list(indices[start : start + _READ_AT_ONCE]))
        yield from examples


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turn a failed read of stored examples into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (
        RuntimeError,
        ValueError,
        OSError,
    ) as error:  # ArrayRecord's errors for damaged or truncated files
        raise UserError(
            f"A stored dataset must be whole, its examples cannot be read: {error}. Prepare it again."
        ) from error


def _latest(folder: epath.Path, version: str | None) -> epath.Path | None:
    wanted = re.compile(re.escape(version or "*.*.*").replace(r"\*", r"\d+"))
    there = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    fitting = [name for name in there if _VERSION.fullmatch(name) and wanted.fullmatch(name)]
    stored = [name for name in fitting if (folder / name / INFO).exists()]
    return folder / max(stored, key=lambda name: tuple(map(int, name.split(".")))) if stored else None


def _only_config(name: str, folder: epath.Path, version: str | None) -> epath.Path | None:
    children = sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    found = {child.name: latest for child in children if (latest := _latest(child, version)) is not None}
    require(
        len(found) <= 1,
        f"A dataset with several configurations must be named with one, {name!r} has {', '.join(found)}: "
        f"for example {name.partition(':')[0]}/{next(iter(found), '')}.",
    )
    return next(iter(found.values()), None)


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"A stored dataset must be whole, {path} cannot be read: {error}.") from None
    require(isinstance(content, dict), f"A stored dataset must be described by a JSON object, {path} is none.")
    return content


def _check_feature(feature: Any, path: str, location: str) -> None:
    """Refuse everything except the exact form that TFDS writes for a known kind."""
    require(
        isinstance(feature, dict), f"A feature must be described by a JSON object, {path} has another for {location}."
    )
    name = feature.get("pythonClassName")
    field = _KINDS.get(name) if isinstance(name, str) else None
    require(
        field is not None,
        f"A feature must be of a known kind ({', '.join(kind.__name__ for kind in _CONTENT)}), {path} has {name!r} for "
        f"{location}; the code that a dataset names is never imported.",
    )
    content = feature.get(field, {})
    strange = sorted(set(feature) - {"pythonClassName", "description", "valueRange", field})
    require(
        isinstance(content, dict) and not strange,
        f"A feature must be described as TFDS does, {path} has {', '.join(strange) or 'no object'} for {location}.",
    )
    match field:
        case "featuresDict":
            parts = content.get("features", {})
            require(isinstance(parts, dict), f"Features must have names, {path} has none for {location}.")
            for key, part in parts.items():
                # TFDS uses the name in a file name.
                require(
                    "/" not in key,
                    f"A feature's name must have no slash, {path} has {key!r} in {location}: rename the field.",
                )
                _check_feature(part, path, repr(key))
        case "sequence":
            _check_feature(content.get("feature"), path, f"the elements of {location}")
        case "tensor":
            require(
                content.get("dtype") in _TYPES,
                f"A feature must have a known type, {path} has {content.get('dtype')!r} for {location}.",
            )
        case "classLabel":
            count = str(content.get("numClasses", 0))
            require(
                count.isdecimal() and len(count) < 19 and int(count) <= _MOST_CLASSES,
                f"A dataset must have at most {_MOST_CLASSES:,} classes, {path} has {count} for {location}.",
            )
