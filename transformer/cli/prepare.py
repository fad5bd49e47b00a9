"""`transformer prepare FILES`: turn text, labelled text or pairs into a TFDS dataset on disk."""

import dataclasses
from typing import Literal

import tyro

from transformer.config import DataConfig
from transformer.data.examples import prepare_examples
from transformer.data.prepare import open_sources
from transformer.types import UserError
from transformer.validation import require

_OF_KINDS = {
    "text": ("text_key", "prompt_key", "validation_fraction", "test_fraction", "record_bytes"),
    "labelled": ("name", "validation", "test", "text_key", "label_key"),
    "pairs": ("name", "validation", "test", "source_key", "target_key"),
}


@dataclasses.dataclass(frozen=True)
class PrepareArguments:
    """Turn text into a TFDS dataset (ArrayRecord) on disk.

    Running text is also prepared by training itself. Labelled texts (.jsonl, .csv, .tsv, or a folder with one folder for
    each class) and pairs (.jsonl, .csv, .tsv, or two files that belong together line by line) are prepared here, under a
    name that --data.source then takes. Files may be compressed (.gz, .bz2, .xz).
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """The text (a file, a folder, a .jsonl file, or python_stdlib), or the files of the training split."""
    kind: Literal["text", "labelled", "pairs"] = "text"
    """Running text, texts with a class, or pairs of texts."""
    name: str = ""
    """Labelled texts and pairs: name of the dataset."""
    validation: tuple[str, ...] = ()
    """Labelled texts and pairs: files of the validation split; without, training holds out a part."""
    test: tuple[str, ...] = ()
    """Labelled texts and pairs: files of the test split."""
    text_key: str = DataConfig.text_key
    """Running and labelled text: field of the text."""
    prompt_key: str = DataConfig.prompt_key
    """Running text: field of a .jsonl record that holds a prompt."""
    label_key: str = DataConfig.label_key
    """Labelled texts: field of the class."""
    source_key: str = DataConfig.source_key
    """Pairs: field of the source."""
    target_key: str = DataConfig.target_key
    """Pairs: field of the target."""
    validation_fraction: float = DataConfig.validation_fraction
    """Running text: part held out for validation."""
    test_fraction: float = DataConfig.test_fraction
    """Running text: part held out for testing."""
    record_bytes: int = DataConfig.record_bytes
    """Running text: longer documents are stored in pieces of about this size."""
    data_dir: str = DataConfig.data_dir
    """Where prepared datasets live; empty means ~/tensorflow_datasets (or TFDS_DATA_DIR)."""


def main(arguments: list[str]) -> None:
    """Prepare the dataset and say what it holds."""
    options = tyro.cli(PrepareArguments, prog="transformer prepare", args=arguments)
    require(len(options.files) > 0, "There must be something to prepare, got no file.")
    of_some = {name for names in _OF_KINDS.values() for name in names}
    for field in dataclasses.fields(options):
        if field.name in of_some.difference(_OF_KINDS[options.kind]) and getattr(options, field.name) != field.default:
            kinds = " or ".join(kind for kind, names in _OF_KINDS.items() if field.name in names)
            flag = f"--{field.name.replace('_', '-')}"
            raise UserError(
                f"{flag} is for --kind {kinds}, got --kind {options.kind}; leave it out, or say which kind it is."
            )
    shared = {field.name for field in dataclasses.fields(DataConfig)}
    values = {name: value for name, value in dataclasses.asdict(options).items() if name in shared}
    if options.kind == "text":
        for source in open_sources(DataConfig(source=options.files, **values)):
            print(source.description)
        return
    require(options.name != "", f"A dataset of {options.kind} needs a name that training can ask for; give --name.")
    files = {"train": options.files, "validation": options.validation, "test": options.test}
    print(prepare_examples(options.kind, options.name, files, DataConfig(**values)))
