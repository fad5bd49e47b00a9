"""`transformer train CONFIG`: train a model, or continue an interrupted run."""

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
    """Train a run, and print the next command to type.

    Args:
        config: the config of the run.
        look_at: text of an attention page, which is written into the run's directory beside a report; empty means no pages.
    """
    with distributed.joined(config.parallel):
        train(config)
    if jax.process_index() == 0:
        if look_at:
            write_run_pages(config.workdir, look_at)
        say(make_console(), "\n".join(["next:", *next_lines(config)]))


def next_lines(config: Config) -> list[str]:
    """Commands that use the model: the activation of the virtual environment, if needed, and one command."""
    command, *options = config.objective.next_command(config.training.sample_prompt)
    words = shlex.join(["transformer", command, str(config.workdir), *options])
    return [*_activation(), f"  {words}"]


def _activation() -> list[str]:
    """The line that puts `transformer` on the path; none if it is there or if no virtual environment is in use."""
    activate = pathlib.Path(sys.prefix) / "bin" / "activate"
    active = os.environ.get("VIRTUAL_ENV", "")
    if sys.prefix == sys.base_prefix or not activate.exists() or (active and os.path.samefile(active, sys.prefix)):
        return []
    near = os.path.relpath(activate)
    return [f"  source {shlex.quote(str(activate) if near.startswith('..') else near)}"]
