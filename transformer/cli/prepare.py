"""`transformer prepare FILES`: turn text, labelled text or pairs into a TFDS dataset on disk."""

import dataclasses

from transformer.cli.options import Given, PrepareOptions
from transformer.config import DataConfig
from transformer.data.datasets import Reader
from transformer.form import FORMS
from transformer.terminal import printable
from transformer.tokenizer import TOKENIZERS


def main(options: PrepareOptions, given: Given) -> None:
    """Prepare the dataset and say what it holds."""
    del given
    shared = {field.name for field in dataclasses.fields(DataConfig)}
    values = {name: value for name, value in dataclasses.asdict(options).items() if name in shared}
    sizes = {"size": options.tokenizer_size} if options.tokenizer_size else {}
    values["tokenizer"] = TOKENIZERS.find(options.tokenizer or "bytes")(**sizes)
    files = {"train": options.files, "validation": options.validation, "test": options.test}
    described = FORMS.find(options.kind)().prepare(Reader(DataConfig(**values)), options.name, files)
    if options.tokenizer:
        described += "\n" + Reader(DataConfig(**{**values, "source": options.files})).running_text().store_tokens()
    print(printable(described, lines=True))
