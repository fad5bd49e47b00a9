"""Tasks on Apache Beam, on any of its runners."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

from transformer.data.tasks import Run, Unfinished
from transformer.types import UserError
from transformer.validation import require_installed


def on_beam(options: Sequence[str]) -> Run:
    """Tasks run in pipelines of Apache Beam.

    Args:
        options: of the pipelines, as Beam's command line has them, with or without the dashes: `runner=DirectRunner`.

    Raises:
        UserError: the package is not installed, or an option has no value that Beam takes.
    """
    beam = _beam()
    # Else Beam's worker processes write a dozen lines each. The last of equal words counts.
    words = ["--default_sdk_harness_log_level=WARNING", *(f"--{option.removeprefix('--')}" for option in options)]
    make_options = beam.options.pipeline_options.PipelineOptions
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            make_options(words).get_all_options()
    except SystemExit:  # of argparse, whose usage fills a screen
        error = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"The options must be Apache Beam's, got {','.join(options)}: {error}.") from None

    def run(what: str, task: Callable[[Any], None], items: Sequence[Any]) -> None:
        try:
            with beam.Pipeline(options=make_options(words)) as pipeline:
                spread = pipeline | "tasks" >> beam.Create(items) | "spread" >> beam.Reshuffle()
                _ = spread | what >> beam.Map(task)
        except Exception as error:  # whatever a runner raises; a worker's error is the last line of a traceback
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise Unfinished(
                f"A pipeline of Apache Beam must finish, {what} with {' '.join(words[1:]) or 'no options'} did not: "
                f"{reason:.500}. What is done stays: mend that, and start the same command again."
            ) from error

    return run


def _beam() -> Any:
    try:
        # Importing it takes three seconds, and few need it.
        import apache_beam  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        import apache_beam.options.pipeline_options  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError:
        require_installed(None, "apache-beam", "beam")
        raise
    return apache_beam
