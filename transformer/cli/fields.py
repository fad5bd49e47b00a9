"""Command-line flags of dataclasses: each field is a flag, `--section.field VALUE`, with the string below it as its help."""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
import shutil
import textwrap
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

from transformer.config import Config
from transformer.kinds import Family, Kind, is_setting, section_of_kind
from transformer.terminal import printable
from transformer.types import UserError
from transformer.validation import alternatives, choices, described, did_you_mean, require, shown

# Names of settings in other trainers.
_SYNONYMS = {
    "lr": "learning-rate",
    "max-lr": "learning-rate",
    "bs": "batch-size",
    "train-batch-size": "batch-size",
    "per-device-train-batch-size": "batch-size",
    "gradient-accumulation-steps": "accumulate-steps",
    "num-epochs": "training.epochs",
    "num-train-epochs": "training.epochs",
    "max-steps": "training.steps",
    "max-iters": "training.steps",
    "num-steps": "training.steps",
    "layers": "num-layers",
    "n-layer": "num-layers",
    "heads": "num-heads",
    "n-head": "num-heads",
    "hidden-size": "embed-dim",
    "d-model": "embed-dim",
    "n-embd": "embed-dim",
    "block-size": "sequence-length",
    "seq-len": "sequence-length",
    "context-length": "sequence-length",
    "max-seq-length": "sequence-length",
    "warmup": "warmup-steps",
    "grad-clip": "clip-norm",
    "max-grad-norm": "clip-norm",
    "output-dir": "workdir",
    "out-dir": "workdir",
    "dataset": "source",
    "bf16": "model.dtype",
    "optimizer.name": "optimizer.kind",
    "optim": "optimizer.kind",
    "lr-scheduler-type": "optimizer.schedule.kind",
}
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}
T = TypeVar("T")


class Flag(NamedTuple):
    """A flag and its fields; a flag for all blocks of a pattern has several fields."""

    paths: tuple[str, ...]
    """Fields, such as `model.pattern.0.attention.window`; empty for the help flag."""
    hint: object
    """The field's type."""
    default: object
    document: str
    repeated: bool = False
    """Whether each occurrence of the flag adds a value to the field, a tuple."""


def positional(default: T) -> T:
    """A field without a flag: it takes one word, at most one if the default is None, or any number for a tuple."""
    return dataclasses.field(default=default, metadata={"positional": True})


def chosen_from(family: Family, default: T) -> T:
    """A field with the name of a kind of a family."""
    return dataclasses.field(default=default, metadata={"family": family})


def repeated() -> Any:
    """A tuple, empty by default; each occurrence of the flag adds one value."""
    return dataclasses.field(default=(), metadata={"repeated": True})


def short(name: str, default: T) -> T:
    """A field with a short flag beside the long one."""
    return dataclasses.field(default=default, metadata={"short": name})


def flags(options: object) -> dict[str, Flag]:
    """The flags of a dataclass instance, by name; for a `Config`, only flags of settings that its run uses."""
    unused = tuple(f"{path}." for path in options.unused()) if isinstance(options, Config) else ()
    return {
        name: flag
        for name, flag in all_flags(options).items()
        if not flag.paths or not all(f"{path}.".startswith(unused) for path in flag.paths)
    }


def all_flags(options: object) -> dict[str, Flag]:
    """All flags of a dataclass instance, by name; nested dataclasses are sections."""
    table: dict[str, Flag] = {}
    for name, flag in _leaves(options, ""):
        known = table.get(name)
        table[name] = known._replace(paths=known.paths + flag.paths) if known else flag
    return table


def parse(
    table: dict[str, Flag],
    arguments: list[str],
    *,
    command: str,
    usage: str,
    about: str,
    unknown: Callable[[str], str] = lambda field: "",
    offered: dict[str, Flag] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Parse a command line into values by field (`training.steps`) and words without a flag.

    A word is a flag if a flag has its name, or if it begins with two dashes where no value is expected. Values may begin with
    a dash. `--flag=VALUE` means `--flag VALUE`, and `_` means `-`. After `--`, everything is a word.

    Args:
        table: the flags.
        arguments: the command line after the command's name.
        command: the command's name, for messages.
        usage: first line of the help, without the flags.
        about: text of the help before the flags.
        unknown: gives the error message for a field without a flag, or an empty text.
        offered: the flags in the help; all by default.

    Raises:
        UserError: an unknown flag, or a value of the wrong type.
        SystemExit: after printing the help.
    """
    values, words = dict[str, Any](), list[str]()
    if {"-h", "--help"} & set(arguments):
        print(_help(offered or table, usage, about))
        raise SystemExit(0)
    rest = list(arguments)
    while rest:
        name, equals, inline = rest.pop(0).partition("=")
        if name == "--":
            words += rest
            break
        flag, negated = _find(table, name)
        if flag is None:
            if not name.startswith("--"):
                words.append(name + equals + inline)
                continue
            if why := unknown(_dashed(name).removeprefix("--").replace("-", "_")):
                raise UserError(why)
            hint = "".join(f"; did you mean {other}?" for other in _meant(table, _dashed(name)[2:])[:1]) or "."
            raise UserError(f"{name} is no option of {command}{hint} `{command} --help` lists them.")
        given = [inline] if equals else _take(flag.hint, rest, table)
        if flag.hint is bool:
            given = given or ["true"]
            require(not (negated and equals), f"{name} takes no value, got {inline!r}.")
        value = _value(flag.hint, given, name)
        if flag.repeated:
            value = (*values.get(flag.paths[0], ()), value)
        values.update(dict.fromkeys(flag.paths, not value if negated else value))
    return values, words


def chosen(table: dict[str, Flag], arguments: list[str]) -> dict[str, Any]:
    """The kinds that a command line chooses, by field (`objective.kind`); they decide which other flags exist."""
    found: dict[str, Any] = {}
    kinds = {name: flag for name, flag in table.items() if flag.paths and flag.paths[0].endswith(".kind")}
    for index, word in enumerate(arguments):
        name, equals, inline = word.partition("=")
        flag = kinds.get(_dashed(name)) or kinds.get(f"{_dashed(name)}.kind")
        if word == "--":
            break
        if flag and (equals or arguments[index + 1 :]):
            found |= dict.fromkeys(flag.paths, _value(flag.hint, [inline if equals else arguments[index + 1]], name))
    return found


def _meant(table: dict[str, Flag], name: str) -> list[str]:
    """Flags with a name like the unknown one, the likeliest first."""
    name = _SYNONYMS.get(name, name)
    for ending in (name, f"{name}.kind"):
        if found := [other for other in table if f".{other[2:]}".endswith(f".{ending}")]:
            return found
    section, _, last = name.rpartition(".")
    within = [o for o in table if section and o.startswith(f"--{section}.") and o.endswith(f".{last}")]
    return within or difflib.get_close_matches(f"--{name}", table, 1)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _find(table: dict[str, Flag], word: str) -> tuple[Flag | None, bool]:
    """The flag of a word, and whether the word negates it (`--data.no-pack`)."""
    name = _dashed(word)
    for known in (name, f"{name}.kind"):  # --data.tokenizer words: short for --data.tokenizer.kind
        if known in table:
            return table[known], False
    section, dot, last = name.rpartition(".") if "." in name else ("--", "", name.removeprefix("--"))
    flag = table.get(section + dot + last.removeprefix("no-")) if last.startswith("no-") else None
    return (flag, True) if flag and flag.hint is bool else (None, False)


def _take(hint: Any, rest: list[str], table: dict[str, Flag]) -> list[str]:
    """Remove a flag's values from the following words, and return them."""
    if hint is bool:
        wanted = 1 if rest and rest[0].lower() in ("true", "false") else 0
    else:
        wanted = max(_width(kind) or len(rest) for kind in alternatives(hint))
    taken: list[str] = []
    while rest and len(taken) < wanted:
        # After the first value, any word with two dashes ends the values, so that a misspelt flag is an error.
        if _find(table, rest[0].partition("=")[0])[0] or (taken and rest[0].startswith("--")):
            break
        taken.append(rest.pop(0))
    return taken


def _width(kind: Any) -> int:
    """Number of words of a value; 0 means any number."""
    if typing.get_origin(kind) is not tuple:
        return 1
    return 0 if typing.get_args(kind)[-1] is Ellipsis else len(typing.get_args(kind))


def _value(hint: Any, words: list[str], name: str) -> Any:
    """A value of type `hint` from its words."""
    widths = {_width(kind) for kind in alternatives(hint)}
    require(len(words) > 0 or 0 in widths, f"{name} needs a value, {described(hint)}.")
    for kind in alternatives(hint):
        try:
            value = _read(kind, words)
        except (ValueError, KeyError):
            continue
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, int) and abs(part) >= 2**63 for part in parts):
            raise UserError(f"{name} must be below 2^63, got {shown(' '.join(words))}.")
        return value
    if 0 not in widths and len(words) not in widths:
        raise UserError(f"{name} takes {' or '.join(map(str, widths))} values, got {' '.join(words)}.")
    meant = did_you_mean(words[0], choices(hint))
    raise UserError(f"{name} must be {described(hint)}, got {shown(' '.join(words))}{meant}")


def _read(kind: Any, words: list[str]) -> Any:
    """A value of a type that is no union; ValueError or KeyError if the words do not fit the type."""
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        kinds = [kinds[0]] * len(words) if kinds[-1] is Ellipsis else kinds
        return tuple(_read(part, [word]) for part, word in zip(kinds, words, strict=True))
    (word,) = words
    if kind is bool:
        return {"true": True, "false": False}[word.lower()]
    if typing.get_origin(kind) is Literal:
        return {str(choice): choice for choice in typing.get_args(kind)}[word]
    value = kind(word)
    if kind is float and not math.isfinite(value):
        raise ValueError
    return value


def _leaves(options: Any, prefix: str, alias: str = "") -> Iterator[tuple[str, Flag]]:
    """The flags of a dataclass instance, with the fields of nested dataclasses.

    A setting of blocks has a flag for each block (`--model.pattern.0.norm.kind`) and one for all blocks (`--model.norm.kind`).
    """
    documents, hints = documentation(type(options)), typing.get_type_hints(type(options))
    if isinstance(options, Kind):
        kind = Flag((prefix + "kind",), Literal[options.family.names], options.kind, _first_sentence(type(options)))
        for start in filter(None, (alias, prefix)):
            yield f"--{_dashed(start)}kind", kind
    for field in dataclasses.fields(options):
        if field.metadata.get("positional"):
            continue
        value, path = getattr(options, field.name), prefix + field.name
        other = alias and alias + field.name
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, path + ".", other and other + ".")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, element in enumerate(value):
                yield from _leaves(element, f"{path}.{index}.", prefix)
        elif any(dataclasses.is_dataclass(part) for part in typing.get_args(hints[field.name])):
            continue  # an empty tuple of dataclasses has no flags
        else:
            family = field.metadata.get("family")
            hint = Literal[family.names] if family else hints[field.name]
            repeats = bool(field.metadata.get("repeated"))
            hint = typing.get_args(hint)[0] if repeats else hint
            flag = Flag((path,), hint, value, documents.get(field.name, ""), repeats)
            for name in filter(None, (other, path)):
                yield f"--{_dashed(name)}", flag
            if name := field.metadata.get("short"):
                yield name, flag


def _first_sentence(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


@functools.cache
def documentation(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and of its bases, by field."""
    found: dict[str, str] = {}
    for base in kind.__bases__:
        found |= documentation(base) if dataclasses.is_dataclass(base) else {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def _help(table: dict[str, Flag], usage: str, about: str) -> str:
    """Usage, then each flag with its values, meaning and default; a section for each dataclass."""
    width = min(shutil.get_terminal_size().columns, 120)
    sections: dict[str, list[str]] = {}
    for name, flag in table.items():
        if not name.startswith("--"):
            continue
        lines = sections.setdefault(name.removeprefix("--").rpartition(".")[0], [])
        name = ", ".join([name, *(short for short in table if short[1:2] != "-" and table[short] is flag)])
        lines.append(f"  {name} {_metavar(flag.hint)}".rstrip())
        text = f"{flag.document} (default: {_shown(flag.default)})"
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    blocks = [f"usage: {usage} [OPTION ...]", about.strip()]
    blocks += ["\n".join([f"{section or 'command'} options:", *lines]) for section, lines in sections.items()]
    return printable("\n\n".join(blocks), lines=True)


def _metavar(hint: Any) -> str:
    """The values of a flag, for the help."""
    shown = []
    for kind in alternatives(hint):
        if typing.get_origin(kind) is tuple:
            *kinds, last = typing.get_args(kind)
            shown.append(f"[{_metavar(kinds[0])} ...]" if last is Ellipsis else " ".join(map(_metavar, (*kinds, last))))
        elif kind is not bool:
            shown.append("{" + ",".join(choices(kind)) + "}" if choices(kind) else _METAVARS[kind])
    return " | ".join(shown)


def _shown(value: Any) -> str:
    return (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "none"


def as_flags(message: str, table: dict[str, Flag]) -> str:
    """A message with flags instead of fields: `TrainingConfig.steps` and `training.steps` become `--training.steps`.

    Other fields of the named class become flags too, if their names have an underscore; `seed` stays a word. A field without
    a flag of the command keeps its name, without the class: `model.embed_dim`.
    """
    named = (_section_of(match[1]) for match in _CLASS.finditer(message))
    section = next((section for section in named if section is not None), "")

    def flag(match: re.Match[str]) -> str:
        kind, dot, field = match.group().rpartition(".")
        of_class = _section_of(kind) if kind[:1].isupper() else kind
        if of_class is None:
            return match.group()
        path = f"{of_class}.{field}" if dot else f"{section}.{field}"
        names = (f"--{_dashed(path.removeprefix('.'))}", f"--{_dashed(field)}")
        within, _, setting = path.rpartition(".")
        # A setting of a kind is a flag wherever that kind can be chosen, even if the table has the flags of another kind.
        if f"--{_dashed(within)}.kind" in table and is_setting(within, setting):
            return names[0]
        return next((name for name in names if name in table), path.removeprefix(".") if dot else field)

    return _FIELD.sub(flag, message)


def _sections(kind: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Names of the config classes, each with the section of its flags."""
    for name, hint in typing.get_type_hints(kind).items():
        within = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if isinstance(within, type):
            # Flags without an index set all blocks of a pattern.
            section = path if within is not hint else f"{path}.{name}".removeprefix(".")
            yield within.__name__, section
            yield from _sections(within, section)


def _section_of(name: str) -> str | None:
    """The section with the flags of a config class or of a kind."""
    return _SECTIONS.get(name, section_of_kind(name))


_SECTIONS = {**dict(_sections(Config)), "SamplingConfig": ""}
_CLASS = re.compile(r"\b([A-Z]\w+)\.(?=[a-z])")
_FIELD = re.compile(
    rf"(?<![\w./'\"-])(?:(?:[A-Z]\w+|{'|'.join(field.name for field in dataclasses.fields(Config))})(?:\.\w+)+|[a-z]+_[a-z_]+)"
)
