"""`transformer prepare FILES`: turn text, labelled text or pairs into a TFDS dataset on disk."""

import dataclasses

from etils import epath

from transformer.cli.options import Given, PrepareOptions
from transformer.config import DataConfig
from transformer.data.beam import on_beam
from transformer.data.datasets import Reader
from transformer.data.tokenizers import Tokenizer
from transformer.data.tokenizers.folder import open_folder
from transformer.form import FORMS
from transformer.runs.directory import CHECKPOINTS, Record, read_run
from transformer.storage import expand
from transformer.terminal import printable
from transformer.tokenizer import TOKENIZERS


def main(options: PrepareOptions, given: Given) -> None:
    """Prepare the dataset and describe its contents."""
    del given
    shared = {field.name for field in dataclasses.fields(DataConfig)}
    values = {name: value for name, value in dataclasses.asdict(options).items() if name in shared}
    sizes = {"size": options.tokenizer_size} if options.tokenizer_size else {}
    given_by_name = options.tokenizer in TOKENIZERS.names
    values["tokenizer"] = TOKENIZERS.find(options.tokenizer if given_by_name else "bytes")(**sizes)
    tokenizer = _of_folder(options.tokenizer) if options.tokenizer and not given_by_name else None
    files = {"train": options.files, "validation": options.validation, "test": options.test}
    form = FORMS.find(options.kind)()
    run = on_beam(options.beam_pipeline_options.split(",")) if options.beam_pipeline_options else None
    described = form.prepare(Reader(DataConfig(**values), run=run), options.name, files)
    if options.tokenizer:
        stored = {"source": (options.name,), "validation": ()} if form.needs_name else {"source": options.files}
        reader = Reader(DataConfig(**{**values, **stored}), run=run)
        described += "\n" + form.open(reader).store_tokens(tokenizer)
    print(printable(described, lines=True))


def _of_folder(name: str) -> Tokenizer:
    """The tokenizer of a run, or of the folder of a pretrained model."""
    path = epath.Path(expand(name))
    return read_run(path, Record.load_tokenizer) if (path / CHECKPOINTS).exists() else open_folder(path)
