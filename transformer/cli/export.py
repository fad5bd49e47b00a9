"""`transformer export DIR HF_DIR`: write a run's model as a Hugging Face folder."""

import functools

from transformer.cli.options import ExportOptions, Given
from transformer.parallel import distributed
from transformer.parallel_config import ParallelConfig
from transformer.runs.export import export_model
from transformer.terminal import make_console, say
from transformer.training.hardware import use_compilation_cache


def main(options: ExportOptions, given: Given) -> None:
    """Export the model, and report the written files."""
    del given
    with distributed.joined(ParallelConfig()):
        use_compilation_cache()
        export_model(
            options.workdir,
            options.folder,
            step=options.step,
            base=options.base,
            dtype=options.dtype,
            family=options.family,
            adapter=options.adapter,
            report=functools.partial(say, make_console()),
        )
