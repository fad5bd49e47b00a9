"""`transformer prepare SOURCE`: turn text into a TFDS dataset on disk, as training would do at its start."""

import dataclasses
from typing import Any

import tyro

from transformer.config import DataConfig
from transformer.data.prepare import open_sources


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
    """Turn text into a TFDS dataset (ArrayRecord) on disk, as training would do at its start."""

    source: tyro.conf.Positional[str]
    """A text file, a folder of text files, a .jsonl file, or python_stdlib."""
    validation_fraction: float = DataConfig.validation_fraction
    """Part held out for validation."""
    test_fraction: float = DataConfig.test_fraction
    """Part held out for testing."""
    record_bytes: int = DataConfig.record_bytes
    """Longer documents are stored in pieces of about this size."""
    text_key: str = DataConfig.text_key
    """Field of a .jsonl record that holds the text."""
    prompt_key: str = DataConfig.prompt_key
    """Field of a .jsonl record that holds a prompt."""
    data_dir: str = DataConfig.data_dir
    """Where prepared datasets live; empty means ~/tensorflow_datasets (or TFDS_DATA_DIR)."""


def main(arguments: list[str]) -> None:
    """Prepare the dataset and say what it holds."""
    options = tyro.cli(PrepareArguments, prog="transformer prepare", args=arguments)
    values: dict[str, Any] = dataclasses.asdict(options) | {"source": (options.source,)}
    for source in open_sources(DataConfig(**values)):
        print(source.description)
