"""Tasks on Apache Beam, with any of its runners."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

from transformer.data.tasks import Run, Unfinished
from transformer.types import UserError
from transformer.validation import require_installed


def on_beam(options: Sequence[str]) -> Run:
    """Run tasks in pipelines of Apache Beam.

    Args:
        options: pipeline options as on Beam's command line, with or without dashes: `runner=DirectRunner`.

    Raises:
        UserError: the package is not installed, or Beam rejects an option.
    """
    beam = _beam()
    # Without this option, each of Beam's worker processes logs a dozen lines. The last of equal options counts.
    words = ["--default_sdk_harness_log_level=WARNING", *(f"--{option.removeprefix('--')}" for option in options)]
    make_options = beam.options.pipeline_options.PipelineOptions
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            make_options(words).get_all_options()
    except SystemExit:  # raised by argparse, whose usage message fills a screen
        error = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"The options must be Apache Beam's, got {','.join(options)}: {error}.") from None

    def run(what: str, task: Callable[[Any], None], items: Sequence[Any]) -> None:
        try:
            with beam.Pipeline(options=make_options(words)) as pipeline:
                elements = pipeline | "tasks" >> beam.Create(items) | "distribute" >> beam.Reshuffle()
                _ = elements | what >> beam.Map(task)
        except Exception as error:  # any error of a runner; a worker's error is the last line of a traceback
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise Unfinished(
                f"A pipeline of Apache Beam must finish, {what} with {' '.join(words[1:]) or 'no options'} did not: "
                f"{reason:.500}. What is done stays: mend that, and start the same command again."
            ) from error

    return run


def _beam() -> Any:
    try:
        # The import takes three seconds, and few runs need it.
        import apache_beam  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        import apache_beam.options.pipeline_options  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError:
        require_installed(None, "apache-beam", "beam")
        raise
    return apache_beam
