"""The command line: `transformer COMMAND ...`, also `python -m transformer COMMAND ...`."""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformer.terminal import printable
from transformer.types import Interrupted, UserError

_SIGPIPE = 13  # a constant: Windows has no such signal

COMMANDS = {
    "train": "train a model, or continue an interrupted run",
    "evaluate": "score a run's model over a whole split",
    "generate": "continue a prompt with a run's model",
    "predict": "predict the class, translation or continuation of each text of a file",
    "attention": "write a page that shows a model's attention while it reads a text",
    "report": "write a page of the curves, samples and scores of runs",
    "embed": "compute a vector of each text of a file",
    "score": "score each text of a file by its log-probability",
    "import": "make a run from a pretrained model (a Hugging Face folder)",
    "export": "write a run's model as a Hugging Face folder",
    "prepare": "turn text into a dataset on disk",
    "plan": "compile the step for absent hardware, and estimate memory and time",
    "inspect": "show batches and parameters of a config, or describe a Hugging Face folder",
    "prove": "kill, damage and move a small run, and compare its result with an undisturbed one",
}
USAGE = "usage: transformer COMMAND ...\n\n" + "".join(f"  {name:<10}{does}\n" for name, does in COMMANDS.items())
_OF_BUCKETS = ("gcsfs", "s3fs", "adlfs")
GROUP = "transformer.commands"
"""The entry points by which other packages add commands."""
_MORE = """
`transformer COMMAND --help` describes a command, `transformer --version` prints the version. A config is the name of one in
the package (gpt2_124m) or a file, and has a small variant for trials: python_stdlib:debug.
Results go to standard output, progress and notes to standard error."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a user error prints one line and exits with 2, a signal one line and 128 + its number."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage() + _MORE)
        return
    if arguments[0] == "--version":
        print(f"transformer {importlib.import_module('transformer').__version__}")
        return
    name, *rest = arguments
    run(name, rest)


def _of_other_packages() -> dict[str, Any]:
    """The commands of other installed packages: the entry points in `GROUP`, each a function of the arguments."""
    found = importlib.import_module("importlib.metadata").entry_points(group=GROUP)
    return {point.name: point for point in found if point.name not in COMMANDS}


def _load_other(name: str) -> Callable[[list[str]], object]:
    """The command of another package; exits if there is none of this name."""
    found = _of_other_packages()
    if name not in found:
        print(f"error: unknown command {name!r}\n\n{_usage()}", file=sys.stderr)
        sys.exit(2)
    return found[name].load()


def _usage() -> str:
    return USAGE + "".join(f"  {name:<10}of {point.value}\n" for name, point in sorted(_of_other_packages().items()))


def run(name: str, arguments: list[str], **more: object) -> None:
    """Read the arguments, then import the command's module, and call its `main`.

    Imports may take seconds. They happen here, where an interrupt prints one line. `more` has further arguments of `main`.
    """
    # The C++ side of JAX, TensorStore and ArrayRecord writes notes that are not for users.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        try:
            if name not in COMMANDS:
                _load_other(name)(arguments)
                return
            options = importlib.import_module("transformer.cli.options").OPTIONS[name]
            parsed = options.parse(arguments)
            with _quiet_callbacks():
                importlib.import_module(f"transformer.cli.{name}").main(*parsed, **more)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is handled
    except UserError as error:
        print(f"error: {printable(_as_flags(error, name), lines=True)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(printable(str(stop), lines=True), file=sys.stderr)
        sys.exit(stop.exit_code)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None)
        if package not in _OF_BUCKETS:
            raise
        print(
            f"error: An address in a bucket is read with the package {package}: pip install {package}", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("SIGINT: stopped.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # `transformer generate RUN | head -c 4` ends like other tools, and the interpreter does not try to write again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + _SIGPIPE)


def _as_flags(error: UserError, name: str) -> str:
    """The message with flags instead of fields."""
    if name not in COMMANDS:
        return str(error)
    table = importlib.import_module("transformer.cli.options").OPTIONS[name].flags()
    return importlib.import_module("transformer.cli.fields").as_flags(str(error), table)


@contextlib.contextmanager
def _quiet_callbacks() -> Iterator[None]:
    """Hide errors that TensorStore reports to Orbax's closed event loop after a failed save; the save's own error is shown.

    A signal that comes within a callback, such as JAX's of the garbage collector, would be lost there: it is sent again.
    """
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if isinstance(found.exc_value, KeyboardInterrupt):
            number = getattr(found.exc_value, "exit_code", 128 + signal.SIGINT) - 128
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        elif not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
            before(found)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
