"""`transformer import HF_DIR --workdir DIR`: make a run's directory from a pretrained model."""

import functools

from transformer.cli.options import Given, ImportOptions
from transformer.parallel import distributed
from transformer.parallel_config import ParallelConfig
from transformer.runs.adapters import import_adapters
from transformer.runs.export import family_of
from transformer.runs.pretrained import import_model
from transformer.terminal import make_console, say
from transformer.training.hardware import use_compilation_cache


def main(options: ImportOptions, given: Given) -> None:
    """Import the model, and describe it in one line."""
    del given
    console = make_console()
    report = functools.partial(say, console)
    with distributed.joined(ParallelConfig()):
        use_compilation_cache()
        if options.base:
            import_adapters(options.folder, options.base, options.workdir, family=family_of, report=report)
        else:
            import_model(options.folder, options.workdir, dtype=options.dtype, report=report)
