"""The files and folders that a run's directory may refer to: the ones that this user has trained on.

A run's directory may come from anybody, and names the data of its training. Training records the paths that its user gave, in
a file of the user's own. Scoring a run reads no other path unless the user gives it again.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence

from transformer.config import DataConfig
from transformer.data.registry import find_source
from transformer.storage import expand, is_local
from transformer.types import UserError
from transformer.validation import require


def remember(config: DataConfig) -> None:
    """Record the paths of a config that the user trains with: its sources, its `data_dir`, and its tokenizer's paths.

    Without a home directory, nothing is recorded: the user gives the paths again.
    """
    remember_paths(*filter(_is_path, config.source + config.validation), config.data_dir, *config.tokenizer.paths)


def remember_paths(*paths: str) -> None:
    """Record paths that the user trains with; empty ones are skipped."""
    new = sorted({_absolute(path) for path in paths if path} - _remembered())
    with contextlib.suppress(OSError):
        if new:
            _file().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _file().open("a") as file:
                file.write("".join(f"{path}\n" for path in new if "\n" not in path))


def is_known(path: str) -> bool:
    """Whether this user has trained with a path."""
    return _absolute(path) in _remembered()


def trusted(
    config: DataConfig,
    run: str,
    *,
    source: Sequence[str] = (),
    validation: Sequence[str] = (),
    data_dir: str = "",
) -> DataConfig:
    """The data config of a run's directory, updated with the user's arguments; safe to open.

    Datasets by name are read in the user's own `data_dir`: the given one, the run's if this user has trained with it, else the
    default. `python_stdlib` is the library of this interpreter.

    Args:
        config: the config in the directory.
        run: the directory, for messages.
        source: from the command line; empty means the run's source and validation data.
        validation: from the command line; empty means the run's.
        data_dir: from the command line; empty means the run's or the default.

    Raises:
        UserError: the directory names a file or a folder that this user has not trained on.
    """
    known = _remembered()
    if not data_dir and config.data_dir and _absolute(config.data_dir) in known:
        data_dir = config.data_dir
    config = dataclasses.replace(config, data_dir=data_dir)
    if source:
        config = dataclasses.replace(config, source=tuple(source), weights=(), validation=())
    if validation:
        config = dataclasses.replace(config, validation=tuple(validation))
    named = (() if source else config.source) + (() if validation else config.validation)
    for path in (*filter(_is_path, named), *config.tokenizer.paths):
        require(
            _absolute(path) in known,
            f"A run's directory may name only data that you have trained on; {run} names {path!r}, which is not read. If it is "
            f"yours to score, give it: --data.source {path}.",
        )
    return config


def _is_path(source: str) -> bool:
    """Whether a source is read as a file or folder, not as a dataset name; true for a name that no kind reads."""
    if not is_local(source):  # decided without file access
        return True
    try:
        return find_source(source).is_path
    except UserError:
        return True


def _absolute(path: str) -> str:
    return os.path.realpath(expand(path)) if is_local(path) else path


def _file() -> pathlib.Path:
    """A file of paths, one per line, in the folder for application state (XDG base directories)."""
    home = os.environ.get("XDG_STATE_HOME") or expand("~/.local/state")
    return pathlib.Path(home) / "transformer" / "trained_on"


def _remembered() -> set[str]:
    try:
        return set(_file().read_text().splitlines())
    except (OSError, UnicodeDecodeError):
        return set()
