"""The config of a command line: a config file, its variant, and overrides of single fields."""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from etils import epath

from transformer.cli.fields import all_flags, as_flags, chosen, flags, parse
from transformer.config import Config
from transformer.config_io import CONFIG_FILE, IMPORT_FILE, from_dict, from_json
from transformer.overrides import override, unknown_setting, with_kinds
from transformer.storage import expand
from transformer.terminal import printable
from transformer.types import UserError
from transformer.validation import require

_TUNED = "-tuned"
"""Suffix of the default directory of a run that starts from an imported model."""
_PACKAGE = pathlib.Path(__file__).parents[1]
CONFIGS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE)
"""The folder of named configs: inside the package in a wheel, beside the package in a clone."""
_ABOUT = """\
CONFIG is a Python file with get_config(), the name of a config of the package, such as python_stdlib, or the directory of a
run. The directory of a run continues that run. With another --workdir, or for an imported model, a new run starts from its
parameters. Each config has a small variant for trials: python_stdlib:debug. Every field can be set here;
--model.attention.*, --model.feed-forward.* and --model.norm.* set all blocks. Settings of the file that do not fit your flags
are adjusted, unless you set them yourself."""


def load_config(reference: str) -> Config:
    """Load the config of `FILE.py[:VARIANT]`, of `NAME[:VARIANT]`, or of a run's directory.

    A file's config is the result of its `get_config([VARIANT])`.

    An empty workdir becomes `runs/FILE[-VARIANT]`.
    """
    name, _, variant = reference.partition(":")
    path = _path_of(name)
    if path.is_dir():
        return _config_of_run(path)
    if not path.is_file():
        names = sorted(config.stem for config in CONFIGS.glob("*.py"))
        near = difflib.get_close_matches(pathlib.Path(name).stem, names)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the names are {', '.join(names)}."
        raise UserError(
            f"A config must be a Python file or the name of one, got {name!r}, which does not exist; {hint}"
        )
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"A config must be a Python file ending in .py, got {name!r}.")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look up their module here
    chosen = (variant,) if variant else ()
    with _located(path):
        spec.loader.exec_module(module)
        require(hasattr(module, "get_config"), f"A config file must define get_config(), {name!r} does not.")
        try:
            inspect.signature(module.get_config).bind(*chosen)
        except TypeError as error:
            raise UserError(f"{name!r} has no variant {variant!r}: get_config(): {error}.") from error
        try:
            config = module.get_config(*chosen)
        except KeyError as error:
            if error.args != (variant,):
                raise
            raise UserError(f"{name!r} has no variant {variant!r}.") from error
    if not isinstance(config, Config):
        raise UserError(f"get_config() of {name!r} must return a transformer.config.Config, got {type(config)}.")
    return config


def _path_of(name: str) -> pathlib.Path:
    """The file of a config or the directory of a run; if neither exists, the config of that name in `CONFIGS`."""
    path = pathlib.Path(expand(name))
    named = CONFIGS / f"{name}.py"
    exists = path.is_file() or (path / CONFIG_FILE).is_file()
    return named if not exists and pathlib.Path(name).name == name and named.is_file() else path


def _config_of_run(path: pathlib.Path) -> Config:
    """The config that continues a run; for an imported model, the config of a new run that starts from it."""
    copy = path / CONFIG_FILE
    require(
        (path / "checkpoints").is_dir() and copy.is_file(),
        f"A config must be a Python file, or the directory of a run, {path} is neither; `transformer import` makes a run of a "
        "pretrained folder.",
    )
    config: Config = from_json(Config, copy.read_bytes(), copy)
    if not (path / IMPORT_FILE).exists():
        return dataclasses.replace(config, workdir=str(path))
    training = dataclasses.replace(config.training, init_from=str(path))
    return dataclasses.replace(config, training=training, workdir=f"{path}{_TUNED}")


@contextlib.contextmanager
def _located(path: pathlib.Path) -> Iterator[None]:
    """Name the line of a config file that raises an error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{path}, line {line}" if line else str(path)
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{where}: {type(error).__name__}: {message}") from error


_DATA_PATHS = ("source", "validation", "data_dir")  # fields of data that a run's config may name


def default_workdir(reference: str) -> str:
    """The default directory of a run of `FILE.py[:VARIANT]`: `runs/FILE[-VARIANT]`."""
    name, _, variant = reference.partition(":")
    return f"runs/{pathlib.Path(name).stem}" + (f"-{variant}" if variant else "")


def parse_config(arguments: list[str], *, command: str, trains: bool = False) -> Config:
    """The config of `CONFIG[:VARIANT] [--section.field value ...]`."""
    return parse_config_and(None, arguments, command=command, trains=trains)[0]


def parse_config_and(
    own: object, arguments: list[str], *, command: str, trains: bool = False
) -> tuple[Config, dict[str, Any]]:
    """The config of `CONFIG[:VARIANT] [--section.field value ...]`, and the values given for a command's own options.

    Settings of the file are adjusted to the flags (`transformer.overrides`). A note on standard error names each adjusted
    setting.

    Args:
        own: a dataclass instance with the command's own options, which are flags too, or None.
        arguments: the command line after the command's name.
        command: the command's name, for messages.
        trains: the command continues the run in the workdir, if one exists. The run's own values then apply to all settings
            that a run may not change.

    Raises:
        UserError: a file, flag or value is invalid.
        SystemExit: after printing the help.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    reference, rest = (arguments[0], arguments[1:]) if named else ("", arguments)
    if not reference and not {"-h", "--help"} & set(arguments):
        raise UserError(f"`{command}` needs a config file, got none; for example `{command} python_stdlib:debug`.")
    config = load_config(reference) if reference else Config()
    tunes = config.training.init_from != "" and config.workdir == f"{config.training.init_from}{_TUNED}"
    own_table = flags(own) if own is not None else {}
    of_kinds = with_kinds(config, chosen(all_flags(config), rest))
    # All flags are accepted here, since another flag may enable a setting. The config refuses settings that remain unused.
    table = all_flags(of_kinds)
    given, words = parse(
        own_table | table,
        rest,
        command=command,
        usage=f"{command} CONFIG[:VARIANT]",
        about=_ABOUT,
        unknown=lambda field: unknown_setting(of_kinds, field),
        offered=own_table | flags(of_kinds),
    )
    if words:
        raise UserError(
            f"`{command}` takes one config file, got {words[0]!r} too; put quotes around a value with spaces."
        )
    require(
        not tunes or "data.source" in given or command.endswith(" plan"),
        f"A run that starts from an imported model needs data of its own, got none for {reference}; give --data.source.",
    )
    if named and _path_of(reference).is_dir():
        config = _tuning(config, given) if tunes else _starting(config, reference, given) if trains else config
        # Imported here, so that a wrong command line fails at once.
        trust = importlib.import_module("transformer.data.trust")
        paths = {name: given[f"data.{name}"] for name in _DATA_PATHS if f"data.{name}" in given}
        config = dataclasses.replace(config, data=trust.trusted(config.data, reference, **paths))
    own_given = {flag.paths[0]: given.pop(flag.paths[0]) for flag in own_table.values() if flag.paths[0] in given}
    notes: list[str] = []
    workdir = given.get("workdir") or config.workdir or default_workdir(reference)
    config = override(config, given, notes.append, recorded=_recorded(workdir) if trains else None)
    for note in notes:
        print(printable(f"note: {as_flags(note, table)}"), file=sys.stderr)
    return dataclasses.replace(config, workdir=workdir), own_given


def _tuning(config: Config, given: dict[str, Any]) -> Config:
    """The config of a run that starts from an imported model: trained parameters are float32."""
    if given.get("adapter.rank", config.adapter.rank) > 0:  # the base keeps its type, and adapters are float32
        return config
    # 16-bit parameters would lose small updates to rounding. Activations keep their type.
    return dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype="float32"))


def _starting(config: Config, reference: str, given: dict[str, Any]) -> Config:
    """The config of a new run that starts from this run's parameters; the same config if both share a directory."""
    own, other = (os.path.realpath(expand(path)) for path in (reference, given.get("workdir") or reference))
    if own == other:
        return config
    training = dataclasses.replace(config.training, init_from=config.workdir, init_from_step="latest")
    return dataclasses.replace(config, training=training)


def _recorded(workdir: str) -> Config | None:
    """The config of the run in a directory, from `config.json`; None if it does not exist or cannot be read."""
    try:
        return from_dict(Config, json.loads((epath.Path(expand(workdir)) / CONFIG_FILE).read_bytes()))
    except Exception:  # a bucket may raise any error; a checkpoint of the run is compared with the config in any case
        return None
