"""TFDS builders that write examples as ArrayRecord files, without TensorFlow."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

Example = dict[str, Any]
Splits = Mapping[str, Callable[[], Iterator[Example]]]

TEXT_FEATURES = {
    "text": tfds.features.Text(),
    "prompt": tfds.features.Text(),
    "continues": tfds.features.Scalar(np.int32),
    "last": tfds.features.Scalar(np.int32),
    "name": tfds.features.Text(),
}
"""Documents in pieces: one that `continues` goes on where the record before it stopped, the `last` ends it."""


class Examples(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Examples in the order given: training shuffles, evaluation must not."""

    url_infos: Mapping[str, Any] = {}  # nothing is downloaded; looking for checksums wants another package

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
    """`Examples` under a dataset's name, which TFDS finds it by."""
    return type(name, (Examples,), {"name": name}, skip_registration=True)
