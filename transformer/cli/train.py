"""`transformer train CONFIG`: train a model, or go on with an interrupted run."""

import os
import pathlib
import shlex
import sys

import jax

from transformer.cli.pages import write_run_pages
from transformer.config import Config
from transformer.parallel import distributed
from transformer.runs.train import train
from transformer.terminal import make_console, say


def main(config: Config, *, look_at: str = "") -> None:
    """Train the config that the arguments describe, and say what to type next.

    Args:
        config: of the run.
        look_at: a text whose attention is shown on a page in the run's directory, beside a report; empty for no pages.
    """
    with distributed.joined(config.parallel):
        train(config)
    if jax.process_index() == 0:
        if look_at:
            write_run_pages(config.workdir, look_at)
        say(make_console(), "\n".join(["next:", *next_lines(config)]))


def next_lines(config: Config) -> list[str]:
    """What to type to use the model: the activation of the virtual environment, where it is needed, and a command."""
    command, *options = config.objective.next_command(config.training.sample_prompt)
    words = shlex.join(["transformer", command, str(config.workdir), *options])
    return [*_activation(), f"  {words}"]


def _activation() -> list[str]:
    """The line that puts `transformer` on the path; none where it is there, or where no virtual environment is in use."""
    activate = pathlib.Path(sys.prefix) / "bin" / "activate"
    active = os.environ.get("VIRTUAL_ENV", "")
    if sys.prefix == sys.base_prefix or not activate.exists() or (active and os.path.samefile(active, sys.prefix)):
        return []
    near = os.path.relpath(activate)
    return [f"  source {shlex.quote(str(activate) if near.startswith('..') else near)}"]
