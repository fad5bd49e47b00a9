"""A TFDS builder that writes pieces of documents as ArrayRecord files, without TensorFlow."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

Example = dict[str, Any]


class TextRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents in pieces: one that `continues` goes on where the record before it stopped, the `last` ends it."""

    url_infos: Mapping[str, Any] = {}  # nothing is downloaded; looking for checksums wants another package

    def __init__(
        self, *, name: str, version: str, splits: Mapping[str, Callable[[], Iterator[Example]]], data_dir: str
    ) -> None:
        self._splits = splits
        config = tfds.core.BuilderConfig(name=name, version=version)
        super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "text": tfds.features.Text(),
                "prompt": tfds.features.Text(),
                "continues": tfds.features.Scalar(np.int32),
                "last": tfds.features.Scalar(np.int32),
                "name": tfds.features.Text(),
            }
        )
        # The order of records is the order of the text; training shuffles, evaluation must not.
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Example]]]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(examples) for split, examples in self._splits.items()}

    def _generate_examples(self, examples: Callable[[], Iterator[Example]]) -> Iterator[tuple[int, Example]]:
        yield from enumerate(examples())
