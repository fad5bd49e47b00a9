"""`transformer import HF_DIR --workdir DIR`: a pretrained model as the directory of a run."""

import functools

from transformer.cli.options import Given, ImportOptions
from transformer.runs.pretrained import import_model
from transformer.terminal import make_console, say
from transformer.training.hardware import use_compilation_cache


def main(options: ImportOptions, given: Given) -> None:
    """Import, and say in a line what it is."""
    del given
    use_compilation_cache()
    console = make_console()
    import_model(options.folder, options.workdir, dtype=options.dtype, report=functools.partial(say, console))
