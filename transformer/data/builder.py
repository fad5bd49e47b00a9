"""TFDS builders that write examples as ArrayRecord files, and descriptions of existing files, without TensorFlow."""

import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import naming
from tensorflow_datasets.core import splits as tfds_splits

from transformer.data.shards import UNFINISHED, count_records
from transformer.data.stored import INFO
from transformer.storage import write_whole

Example = dict[str, Any]
Splits = Mapping[str, Callable[[], Iterator[Example]]]

TEXT_FEATURES = {
    "text": tfds.features.Text(),
    "prompt": tfds.features.Text(),
    "continues": tfds.features.Scalar(np.int32),
    "last": tfds.features.Scalar(np.int32),
    "name": tfds.features.Text(),
}
"""Documents in pieces: a record that `continues` follows the one before it, and the `last` one ends the document."""


class Examples(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Examples in the given order: training shuffles, evaluation must not."""

    # Nothing is downloaded; a lookup of checksums requires another package.
    url_infos: dict[str, Any] | None = {}  # noqa: RUF012 (as the base class declares it)

    def __init__(
        self,
        *,
        features: Mapping[str, Any],
        splits: Splits,
        version: str,
        data_dir: str,
        config_name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._features, self.splits, self._metadata = features, splits, metadata
        config = tfds.core.BuilderConfig(name=config_name, version=version) if config_name else None
        if not config:
            self.VERSION = tfds.core.Version(version)
        super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self._features),
            metadata=tfds.core.MetadataDict(self._metadata) if self._metadata else None,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Example]]]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(examples) for split, examples in self.splits.items()}

    def _generate_examples(self, examples: Callable[[], Iterator[Example]]) -> Iterator[tuple[int, Example]]:
        yield from enumerate(examples())


def builder_class(name: str) -> type[Examples]:
    """`Examples` under a dataset's name, by which TFDS finds it."""
    return type(name, (Examples,), {"name": name}, skip_registration=True)


def shard_path(directory: epath.Path, name: str, split: str, shard: int, num_shards: int) -> epath.Path:
    """The path at which TFDS looks for a shard."""
    return directory / f"{name}-{split}.array_record-{shard:05}-of-{num_shards:05}"


def describe(
    directory: epath.Path, name: str, features: Mapping[str, Any], splits: Mapping[str, Sequence[epath.Path]]
) -> None:
    """Describe the shards in a directory as a dataset, and remove remains of killed writers. The description makes it visible."""
    with tempfile.TemporaryDirectory() as aside:
        builder: Any = builder_class(name)(features=features, splits={}, version="1.0.0", data_dir=aside)
        infos = [
            tfds_splits.SplitInfo(
                name=split,
                shard_lengths=[count_records(path) for path in paths],
                num_bytes=sum(path.stat().length for path in paths),
                filename_template=naming.ShardedFileTemplate(
                    data_dir=directory, dataset_name=name, split=split, filetype_suffix="array_record"
                ),
            )
            for split, paths in splits.items()
        ]
        builder.info.set_splits(tfds_splits.SplitDict(infos))
        builder.info.write_to_directory(aside)
        for file in sorted(pathlib.Path(aside).iterdir(), key=lambda file: file.name == INFO):
            write_whole(directory / file.name, file.read_bytes())
    for path in directory.iterdir():
        if path.name.endswith(UNFINISHED):
            path.unlink(missing_ok=True)
