"""`transformer import HF_DIR --workdir DIR`: a pretrained model as the directory of a run."""

import contextlib
import functools

from transformer.cli.options import Given, ImportOptions
from transformer.parallel import distributed
from transformer.parallel_config import ParallelConfig
from transformer.runs.pretrained import import_model
from transformer.terminal import make_console, say
from transformer.training.hardware import use_compilation_cache


def main(options: ImportOptions, given: Given) -> None:
    """Import, and say in a line what it is."""
    del given
    several = distributed.start(ParallelConfig())
    use_compilation_cache()
    console = make_console()
    with distributed.leaving() if several else contextlib.nullcontext():
        import_model(options.folder, options.workdir, dtype=options.dtype, report=functools.partial(say, console))
