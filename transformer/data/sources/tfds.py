"""TFDS datasets on disk as sources, found by name."""

import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from transformer.config import DataConfig
from transformer.data.builder import Example
from transformer.data.example_source import class_numbers, example_source
from transformer.data.example_tokens import open_stored_tokens, roles_of
from transformer.data.forms.examples import ExampleForm
from transformer.data.identity import ContentHash, sampled
from transformer.data.prepare import data_directory, quiet
from transformer.data.shards import Shards
from transformer.data.source import Converted, ExampleSource, Record, Source, pieces
from transformer.data.source_kind import Rows, SourceKind
from transformer.data.stored import NAME, find_stored, in_order, open_stored, readable
from transformer.data.tasks import Run
from transformer.data.token_shards import TextRecords
from transformer.types import UserError
from transformer.validation import counted, require

_FEW_RECORDS = 64  # records of a smaller split are cut into pieces, which give shuffling enough records


class TfdsDataset(SourceKind):
    """A dataset prepared by TFDS: `name`, `name/config` or `name:1.0.0`."""

    is_path = False

    def accepts(self, name: str) -> bool:
        """Recognize the form of the name."""
        return NAME.fullmatch(name) is not None

    def rows(self, name: str, keys: tuple[str, ...], what: str) -> Rows:
        """Refuse: a dataset name is no file."""
        del keys
        raise UserError(f"A file or folder of {what} must exist, {name!r} does not.")

    def fingerprint(self, name: str, config: DataConfig) -> str:
        """The dataset's fingerprint; there is nothing to prepare."""
        return self.open_text(name, config).fingerprint

    def open_text(self, name: str, config: DataConfig, run: Run | None = None) -> Source:
        """Open the dataset with its own splits; there is nothing to prepare."""
        del run
        builder = stored_builder(name, config)
        features = _features(name, builder, [config.text_key], ["text_key"])
        given = [features[key] for key in (config.text_key, config.prompt_key) if key in features]
        plain = _in_records(builder) and all(map(_is_text, given))

        def open_split(split: str) -> Sequence[Record]:
            info = builder.info.splits[split]
            few = config.record_bytes * (info.num_examples < _FEW_RECORDS)
            if plain:
                return TextRecords(
                    Shards(info.filepaths, info.shard_lengths), (config.text_key, config.prompt_key), few
                )
            records = Converted(tfds_split(builder, split, config), functools.partial(_whole, config))
            if not few:
                return records
            return [piece for record in records for piece in pieces(record.text, record.prompt, config.record_bytes)]

        sizes, full_name = tfds_sizes(builder), builder.info.full_name
        description = f"{full_name}: " + ", ".join(
            f"{split} {counted(count, 'record')}" for split, count in sizes.items()
        )
        content = ContentHash()
        hash_tfds(content, builder, config, lambda example: _whole(config, example)[:2])
        keys = (config.text_key, config.prompt_key, config.record_bytes)
        tokens_in = _tokens_in("text_records", content.hexdigest(), builder, config, *keys)
        return Source(full_name, content.hexdigest(), sizes, description, open_split, tokens_in if plain else None)

    def open_stored(
        self, name: str, form: ExampleForm, config: DataConfig, class_names: tuple[str, ...]
    ) -> ExampleSource:
        """Open the dataset with its own splits; labels are renumbered in the order of `class_names`."""
        builder, keys, labelled = stored_builder(name, config), form.key_names(config), form.class_part
        features = _features(name, builder, keys, form.keys)
        own = (
            ()
            if labelled is None
            else _class_names(name, features[keys[labelled]], form.keys[labelled], keys[labelled])
        )
        numbers = class_numbers(own, class_names or own, name)
        content = ContentHash()
        content.add(form.kind, *own)
        content.add((builder.info.metadata or {}).get("fingerprint", ""))
        hash_tfds(content, builder, config, lambda example: [_present(example[key]) for key in keys])

        plain = _in_records(builder) and all(_is_text(features[key]) for i, key in enumerate(keys) if i != labelled)
        folder = _tokens_in("example_records", content.hexdigest(), builder, config, form.kind, *keys)

        def tokens(split: str, tokenizer: Any, store: bool) -> tuple[Sequence[Any], Callable[[Any], Any]] | None:
            info = builder.info.splits[split]
            shards, roles = Shards(info.filepaths, info.shard_lengths), roles_of(form, keys)
            found = open_stored_tokens(form, shards, roles, folder, split, tokenizer, builder.info.full_name, store)
            return None if found is None else (found, numbered)

        def numbered(example: Any) -> Any:
            return example if labelled is None else form.with_class(example, number(example[labelled]))

        def number(label: int) -> int:
            require(
                0 <= label < len(own),
                f"A labelled text must have one of the {len(own)} classes of {name!r}, got label {label}, as in splits "
                "without labels; choose another split.",
            )
            return numbers[label]

        def to_example(example: Example) -> Any:
            parts = (example[key] for key in keys)
            return form.example._make(
                number(int(p)) if i == labelled else p.decode("utf-8", "replace") for i, p in enumerate(parts)
            )

        return example_source(
            builder.info.full_name,
            content.ended,
            tfds_sizes(builder),
            class_names or own,
            lambda split: (tfds_split(builder, split, config), to_example),
            lambda: None if labelled is None else _labels(builder, "train", keys[labelled], config),
            config.validation_fraction,
            tokens=tokens if plain else None,
        )


def _features(name: str, builder: Any, keys: Sequence[str], options: Sequence[str]) -> Any:
    """The features of a dataset, which must include the keys in the named options."""
    features = builder.info.features
    there = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    for key, option in zip(keys, options, strict=True):
        require(
            key in there,
            f"data.{option} must be a feature of {name!r}, got {key!r}; it has {', '.join(sorted(there))}.",
        )
    return features


def _is_text(feature: Any) -> bool:
    """Whether records hold the feature as one text, which is read without TFDS."""
    return feature.shape == () and np.dtype(feature.np_dtype) == np.dtype(object)


def _in_records(builder: Any) -> bool:
    return builder.info.file_format is not None and builder.info.file_format.file_suffix == "array_record"


def _tokens_in(folder: str, fingerprint: str, builder: Any, config: DataConfig, *reading: str | int) -> epath.Path:
    """The folder for the tokens of a stored dataset, whose own folder stays unchanged."""
    label = re.sub(r"\W+", "_", builder.info.full_name, flags=re.ASCII).strip("_").lower()[:80]
    key = ContentHash().ended(fingerprint, builder.info.full_name, *reading)
    return data_directory(config) / folder / f"{label}-{key[:16]}" / "tokens"


def _class_names(name: str, label: Any, option: str, key: str) -> tuple[str, ...]:
    require(
        isinstance(label, tfds.features.ClassLabel),
        f"data.{option} must name a ClassLabel of {name!r}, {key!r} is {type(label).__name__}.",
    )
    names = tuple(label.names)
    require(
        len(set(names)) == len(names),
        f"Classes must have different names, {name!r} has {', '.join(names)}; prepare it again.",
    )
    return names


# ---- What is on disk -------------------------------------------------------------------------------------------------


def stored_builder(name: str, config: DataConfig) -> tfds.core.DatasetBuilder:
    """The builder of a dataset on disk.

    Raises:
        UserError: TFDS does not know the dataset, or it has not been prepared.
    """
    data_dir = data_directory(config)
    directory = find_stored(name, data_dir)
    if directory is None:
        base = re.split("[/:]", name)[0]
        require(
            base in tfds.list_builders(with_community_datasets=False),
            f"A source must be a file or folder that exists, python_stdlib, or a TFDS name; {name!r} is neither a file "
            f"or folder in {os.getcwd()} nor a dataset that TFDS knows or finds in {data_dir}.",
        )
        raise UserError(
            f"A TFDS dataset must be prepared before training, {name!r} is not in {data_dir} (nor is a file or folder of "
            f"this name in {os.getcwd()}): prepare it once with {_how_to_prepare(name, config)}, or point data.data_dir at "
            "where it is."
        )
    with quiet():
        builder = open_stored(directory)
    require(len(builder.info.splits) > 0, f"A stored dataset must have splits, {directory} has none.")
    return builder


def tfds_split(builder: tfds.core.DatasetBuilder, split: str, config: DataConfig, **options: Any) -> Sequence[Any]:
    """The examples of a split, read at random; `options` go to TFDS's `as_data_source`.

    Raises:
        UserError: the dataset is not stored as ArrayRecord.
    """
    try:
        with quiet(), readable():
            return builder.as_data_source(split, **options)  # pyright: ignore[reportCallIssue] (the stub hides the parameters)
    except NotImplementedError:
        name = builder.info.full_name
        raise UserError(
            f"A TFDS dataset must be stored as ArrayRecord, {name!r} in {data_directory(config)} is not: "
            f"prepare it in another data_dir with {_how_to_prepare(name, config)}."
        ) from None


def tfds_sizes(builder: tfds.core.DatasetBuilder) -> dict[str, int]:
    """The number of examples of each split that is not empty."""
    return {split: info.num_examples for split, info in builder.info.splits.items() if info.num_examples}


def hash_tfds(
    content: ContentHash,
    builder: tfds.core.DatasetBuilder,
    config: DataConfig,
    convert: Callable[[Example], Sequence[str | int]],
) -> None:
    """Hash the content of a stored dataset: sizes and evenly spaced examples of each split (all of a small one).

    The name is not hashed: another dataset of the same name, in another folder, must differ.
    """
    for split, count in sorted(tfds_sizes(builder).items()):
        content.add(split, count, builder.info.splits[split].num_bytes)
        for example in in_order(tfds_split(builder, split, config), sampled(count)):
            content.add(*convert(example))


def _how_to_prepare(name: str, config: DataConfig) -> str:
    return (
        f"`tfds build {name.partition(':')[0]} --file_format=array_record --data_dir={data_directory(config)}` (only that "
        "command needs `pip install tensorflow importlib_resources`, in any environment)"
    )


def _whole(config: DataConfig, example: Example) -> Record:
    text, prompt = example[config.text_key], example.get(config.prompt_key, b"")
    require(
        isinstance(text, bytes) and isinstance(prompt, bytes),
        f"data.text_key={config.text_key!r} and data.prompt_key={config.prompt_key!r} must name text features, "
        f"got {type(text).__name__} and {type(prompt).__name__}.",
    )
    return Record(text.decode("utf-8", "replace"), prompt.decode("utf-8", "replace"), continues=False, last=True)


def _present(value: Any) -> Any:
    require(
        value is not None,
        "A stored dataset must be whole, one example has no value. Remove it and prepare it again.",
    )
    return value


def _labels(builder: Any, split: str, key: str, config: DataConfig) -> np.ndarray:
    """The class of each example, without decoding the texts."""
    label: Any = tfds.features.FeaturesDict({key: builder.info.features[key]})
    raw = tfds_split(builder, split, config, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return np.array([int(label.deserialize_example_np(example)[key]) for example in in_order(raw)])
