"""`transformer prepare FILES`: turn text, labelled text or pairs into a TFDS dataset on disk."""

import dataclasses

from transformer.cli.options import Given, PrepareOptions
from transformer.config import DataConfig
from transformer.data.examples import prepare_examples
from transformer.data.registry import open_sources
from transformer.terminal import printable


def main(options: PrepareOptions, given: Given) -> None:
    """Prepare the dataset and say what it holds."""
    del given
    shared = {field.name for field in dataclasses.fields(DataConfig)}
    values = {name: value for name, value in dataclasses.asdict(options).items() if name in shared}
    if options.kind == "text":
        for source in open_sources(DataConfig(source=options.files, **values)):
            print(printable(source.description, lines=True))
        return
    files = {"train": options.files, "validation": options.validation, "test": options.test}
    print(printable(prepare_examples(options.kind, options.name, files, DataConfig(**values)), lines=True))
