"""The command line: `transformer COMMAND ...`, also `python -m transformer COMMAND ...`."""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from transformer.terminal import printable
from transformer.types import Interrupted, UserError

_SIGPIPE = 13  # a constant: Windows has no such signal

COMMANDS = {
    "train": "train a model, or go on with an interrupted run",
    "evaluate": "score a run's model over a whole split",
    "generate": "continue a prompt with a run's model",
    "predict": "say what a run's model makes of each text of a file",
    "attention": "write a page that shows a model's attention while it reads a text",
    "report": "write a page of the curves, samples and scores of runs",
    "embed": "make a vector of each text of a file",
    "score": "say how likely a run's model finds each text of a file",
    "import": "make a run of a pretrained model (a Hugging Face folder)",
    "export": "write a run's model as a Hugging Face folder",
    "prepare": "turn text into a dataset on disk",
    "plan": "compile the step for hardware that is not there",
    "inspect": "show batches and parameters of a config, or what a Hugging Face folder is",
    "prove": "kill, damage and move a small run, and show that it ends the same",
}
USAGE = "usage: transformer COMMAND ...\n\n" + "".join(f"  {name:<10}{does}\n" for name, does in COMMANDS.items())
GROUP = "transformer.commands"
"""The entry points by which other packages add commands."""
_MORE = """
`transformer COMMAND --help` tells more, `transformer --version` the version. A config comes with a name (gpt2_124m) or is a file,
and has a small variant to try things with: python_stdlib:debug.
Results go to standard output, progress and notes to standard error."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a user's error is one line on stderr and exit code 2, a signal one line and 128 + its number."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage() + _MORE)
        return
    if arguments[0] == "--version":
        print(f"transformer {importlib.import_module('transformer').__version__}")
        return
    name, *rest = arguments
    if name not in COMMANDS and name not in _of_other_packages():
        print(f"error: unknown command {name!r}\n\n{_usage()}", file=sys.stderr)
        sys.exit(2)
    run(name, rest)


def _of_other_packages() -> dict[str, Any]:
    """The commands of other installed packages: a function of the arguments for each entry point in `GROUP`."""
    found = importlib.import_module("importlib.metadata").entry_points(group=GROUP)
    return {point.name: point for point in found if point.name not in COMMANDS}


def _usage() -> str:
    return USAGE + "".join(f"  {name:<10}of {point.value}\n" for name, point in sorted(_of_other_packages().items()))


def run(name: str, arguments: list[str], **more: Any) -> None:
    """Read the arguments, then import the command's module, and call it.

    Imports may take seconds. They come where an interrupt is one line. `more` is what the command is told besides its flags.
    """
    # The C++ side of JAX, TensorStore and ArrayRecord writes notes that are not for users.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        try:
            if name not in COMMANDS:
                _of_other_packages()[name].load()(arguments)
                return
            options = importlib.import_module("transformer.cli.options").OPTIONS[name]
            parsed = options.parse(arguments)
            with _quiet_callbacks():
                importlib.import_module(f"transformer.cli.{name}").main(*parsed, **more)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is no surprise
    except UserError as error:
        print(f"error: {printable(_as_flags(error, name), lines=True)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(printable(str(stop), lines=True), file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("SIGINT: stopped.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # `transformer generate RUN | head -c 4` ends as other tools do, and the interpreter does not try to write again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + _SIGPIPE)


def _as_flags(error: UserError, name: str) -> str:
    """The message for someone who types flags."""
    if name not in COMMANDS:
        return str(error)
    table = importlib.import_module("transformer.cli.options").OPTIONS[name].flags()
    return importlib.import_module("transformer.cli.fields").as_flags(str(error), table)


@contextlib.contextmanager
def _quiet_callbacks() -> Iterator[None]:
    """Leave out what TensorStore reports to Orbax's event loop after a failed save has closed it; the save's error is told."""
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
            before(found)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
