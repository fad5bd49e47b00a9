"""The config a command line asks for: a config file, its variant, and overrides of single fields."""

import dataclasses
import importlib.util
import inspect
import pathlib
import re

import tyro

from transformer.config import Config
from transformer.types import UserError

# `--model.attention.num-heads 8` sets the field in every block of the pattern.
_BLOCK_ALIAS = re.compile(r"^--model\.((?:no-)?(?:attention|feed-forward|feed_forward|norm)\..*)$")


def load_config(reference: str) -> Config:
    """The config of `FILE.py` or `FILE.py:VARIANT`: what the file's `get_config([VARIANT])` returns.

    An empty workdir becomes `runs/FILE[-VARIANT]`.
    """
    name, _, variant = reference.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))) or "none here"
        raise UserError(f"A config must be a Python file, got {name!r}, which does not exist; in configs/: {near}.")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"A config must be a Python file ending in .py, got {name!r}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"A config file must define get_config(), {name!r} does not.")
    chosen = (variant,) if variant else ()
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


def default_workdir(reference: str) -> str:
    """Where a run of config `FILE.py[:VARIANT]` goes unless told otherwise: `runs/FILE[-VARIANT]`."""
    name, _, variant = reference.partition(":")
    return f"runs/{pathlib.Path(name).stem}" + (f"-{variant}" if variant else "")


def expand_aliases(arguments: list[str], num_blocks: int) -> list[str]:
    """`--model.attention.X V` as `--model.pattern.I.attention.X V` for every block I of the pattern."""
    expanded: list[str] = []
    index = 0
    while index < len(arguments):
        flag, equals, inline = arguments[index].partition("=")
        index += 1
        match = _BLOCK_ALIAS.match(flag)
        if not match:
            expanded.append(flag + equals + inline)
            continue
        values = [equals + inline] if equals else []
        while not equals and index < len(arguments) and not arguments[index].startswith("--"):
            values.append(arguments[index])
            index += 1
        for block in range(num_blocks):
            name = f"--model.pattern.{block}.{match.group(1)}"
            expanded += [name + values[0]] if equals else [name, *values]
    return expanded


def parse_config(arguments: list[str], *, command: str) -> Config:
    """The config of `FILE.py[:VARIANT] [--section.field value ...]`; exits with 2 on anything it cannot take.

    Args:
        arguments: the command line after the command's name.
        command: the command's name, for messages.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    reference = arguments[0] if named else ""
    asks_for_help = bool({"-h", "--help"} & set(arguments))
    if not reference and not asks_for_help:
        raise UserError(f"`{command}` needs a config file, got none; for example `{command} configs/python_stdlib.py`.")
    config = load_config(reference) if reference else Config()
    overrides = expand_aliases(arguments[1:] if named else arguments, len(config.model.pattern))
    config = tyro.cli(
        Config,
        prog=f"{command} {reference or '[CONFIG]'}",
        description="Every field of the run; --model.attention.*, --model.feed-forward.* and --model.norm.* set all blocks.",
        args=overrides,
        default=config,
    )
    return config if config.workdir else dataclasses.replace(config, workdir=default_workdir(reference))
