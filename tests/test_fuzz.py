"""Inputs changed at random end in one clear sentence, or in what the unchanged input gives: never in a traceback or a hang.

A mutation makes a case: what it is, an action, and how its result is judged. The verdict says what may come of it:

* REFUSED: a `UserError`, or exit code 2 of a command;
* SAME: the result of the unchanged input;
* EITHER: one of the two.

Where a change has a meaning of its own (another number in a config file), the result is judged by what it must still be. Each
case is drawn from its mutation's name and its number, so that a failure names all that it takes to repeat it.
"""

import bz2
import collections
import contextlib
import csv
import dataclasses
import gzip
import importlib
import io
import json
import lzma
import pathlib
import random
import shutil
import signal
import string
import traceback
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from transformer.cli.main import COMMANDS, main
from transformer.cli.options import OPTIONS
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.config_io import from_dict, from_json, to_dict
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.runs.saved import load
from transformer.runs.train import train
from transformer.training.manifest import write_manifest
from transformer.types import UserError
from transformer.validation import alternatives, choices

pytestmark = pytest.mark.usefixtures("compiled_once")
REFUSED, SAME, EITHER = "refused", "same", "either"
SECONDS = 60  # of a case, at most
STEPS = 4
DRAW = random.Random


class Case(NamedTuple):
    """One changed input."""

    what: str
    action: Callable[[], Any]
    judge: Callable[[Any], bool] = lambda result: True
    """Whether a result, where there is one, is what it must be."""


class Mutation(NamedTuple):
    make: "Callable[[DRAW, Base], Case]"
    verdict: str
    few: int
    """Cases of an ordinary run of the suite."""
    many: int
    """Cases of an exhaustive one."""


MUTATIONS: dict[str, Mutation] = {}


def mutation(verdict, few, many):
    def register(make):
        MUTATIONS[make.__name__.replace("_", " ")] = Mutation(make, verdict, few, many)
        return make

    return register


# ---- The base: two finished runs, a config file, data files ----------------------------------------------------------

CONFIG = '''\
"""A config to change."""
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.characters import Characters
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig


def get_config(variant=""):
    steps = {"": 20, "debug": 5}[variant]
    block = BlockConfig(AttentionConfig(num_heads=2, window=8), FeedForwardConfig(activation="silu", gated=True))
    return Config(
        model=ModelConfig(num_layers=2, embed_dim=16, pattern=(block,), logits_soft_cap=30.0, tie_embeddings=False),
        data=DataConfig(source=("text",), sequence_length=32, batch_size=4, tokenizer=Characters(), weights=()),
        training=TrainingConfig(steps=steps, eval_every=0, sample_prompt="to be", profile_steps=(2, 4)),
    )
'''


class Base(NamedTuple):
    place: pathlib.Path
    results: dict[tuple[str, int], Any]
    """What each checkpoint of each run gives."""
    config: Config
    values: dict[str, Any]
    """The config of `config_file` as JSON."""
    config_file: pathlib.Path
    lines: dict[str, list[str]]
    """A command line that is taken, by command."""

    def copy(self):
        """A run to be changed."""
        shutil.rmtree(self.place / "copy", ignore_errors=True)
        return pathlib.Path(shutil.copytree(self.place / "a", self.place / "copy"))


def run_config(place, name, **training):
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=1)),)),
        data=DataConfig(
            source=(str(place / f"text-{name}"),), data_dir=str(place / "data"), sequence_length=16, batch_size=8
        ),
        training=TrainingConfig(
            **{"steps": STEPS, "log_every": 1, "eval_every": 2, "checkpoint_every": 2, "sample_length": 4, **training}
        ),
        workdir=str(place / name),
    )


def start(config):
    return train(config, console=Console(quiet=True))


def outcome(workdir):
    """A run as a model: its step and the bits of its parameters."""
    run = load(workdir)
    return run.step, [np.asarray(x).tobytes() for x in jax.tree.leaves(run.params)]


@pytest.fixture(scope="module")
def base(tmp_path_factory, compiled_once):
    place = tmp_path_factory.mktemp("fuzz")
    draw = DRAW(0)
    results = {}
    for name in ("a", "b"):
        (place / f"text-{name}").mkdir()
        for index in range(10):
            text = " ".join(draw.choice(("to", "be", "or", "not", name)) for _ in range(60))
            (place / f"text-{name}" / f"{index}.txt").write_text(text)
        start(run_config(place, name))
        results[name, STEPS] = outcome(place / name)
        shutil.copytree(place / name, place / "early")
        shutil.rmtree(place / "early" / "checkpoints" / str(STEPS))
        results[name, STEPS // 2] = outcome(place / "early")
        shutil.rmtree(place / "early")
    config_file = place / "c.py"
    config_file.write_text(CONFIG)
    made = Base(place, results, run_config(place, "a"), {}, config_file, {})
    (config,) = parsed("inspect", [str(config_file)])
    made.values.update(to_dict(config))
    for name in COMMANDS:
        made.lines[name] = a_line(name, made)
    return made


def a_line(command, base):
    """A short command line that a command takes."""
    config, run, text = str(base.config_file), str(base.place / "a"), str(base.place / "text-a")
    new = ["--workdir", str(base.place / "new")]
    page = ["--text", "a", "--output", str(base.place / "page.html")]
    attempts = ([], [config], [config, "--topology", "v5e:2x2"], [run], [run, text], [text], [text, *new], [run, *page])
    attempts += ([run, *page[2:]],)
    for arguments in attempts:
        with contextlib.suppress(UserError):
            parsed(command, arguments)
            return arguments
    raise AssertionError(f"none of {attempts} is a command line of {command}")


# ---- Doing it --------------------------------------------------------------------------------------------------------


def command(name, arguments, stdin=""):
    """What a command prints; its errors are raised. Streams are strict about UTF-8, as a terminal's are."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "replace")), encoding="utf-8"))
        code: Any = 0
        try:
            main([name, *arguments])
        except SystemExit as stop:
            code = stop.code
    err.seek(0)
    message = err.read()
    assert code in (0, 2), f"{name} ended with {code}: {message}"
    if code == 2:
        assert message.rpartition("error: ")[2].strip(), "exit code 2 without a sentence"
        raise UserError(message)
    out.seek(0)
    return out.read()


def parsed(name, arguments):
    """What a command would do: the arguments of its `main`; None where it printed its help."""
    seen = [None]
    module = importlib.import_module(f"transformer.cli.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "main", lambda *arguments: seen.append(arguments))
        command(name, arguments)
    return seen[-1]


def damaged(draw, content):
    """Bytes with a flipped bit, a part missing, doubled, or of something else."""
    at, length = draw.randrange(len(content) + 1), draw.choice((1, 1, 2, 8, 100))
    match draw.randrange(7):
        case 0 | 1 if content:
            at = draw.randrange(len(content))
            return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        case 2:
            return content[:at]
        case 3:
            return content[:at] + content[at + length :]
        case 4:
            return content[:at] + content[at : at + length] * 2 + content[at + length :]
        case 5:
            return content[:at] + draw.choice(JUNK).encode("utf-8", "surrogatepass") + content[at:]
    return draw.choice((b"", b"\0" * 10, b"[]", b"{}", b"null", b"\xff\xfe", b"1" * 5000, b"[" * 100_000))


JUNK = (
    *(
        "",
        " ",
        "\0",
        "\n",
        "\r\n",
        "é",
        "日本語",
        "\u202e",
        "\udcff",
        "\U0001f600",
        "--",
        "-",
        "=",
        ":",
        "/",
        "..",
        "~",
        "~nobody/x",
    ),
    *(
        '"',
        "'",
        "{}",
        "[]",
        "[1]",
        "null",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "0x10",
        "1_0",
        "1" * 5000,
        "-1",
        "0",
        "1.5",
        "true",
    ),
    *("\x1b[31m", "%s", "{0}", "$HOME", "a" * 300, "*", "con", "gs://", "file:///etc", "🇩🇪", "\ufeff", "İ", "²", "١"),
)


def round_trips(result):
    """A config that was taken is whole: it survives JSON."""
    configs = [part for part in result or () if isinstance(part, Config)]
    return all(from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config for config in configs)


# ---- Command lines ---------------------------------------------------------------------------------------------------


def words_of(draw, hint, *, wrong=False):
    """Words for a flag of a type, or for no value of it."""
    kind = draw.choice(alternatives(hint))
    members = typing.get_args(kind)
    if wrong:
        return [draw.choice(("x", "1.5.2", "é", "a b", "{}", "[1]", "--", "1e", "nan", "日本語"))]
    if choices(kind):
        return [draw.choice(choices(kind))]
    if typing.get_origin(kind) is tuple:
        count = draw.randrange(1, 4) if members[-1] is Ellipsis else len(members)
        return [word for _ in range(count) for word in words_of(draw, members[0])]
    if kind is bool:
        return [draw.choice(("true", "false"))]
    if kind is int:
        return [str(draw.choice((-1, 0, 1, 2, 3, 4, 8, 16, 100, 10**6, 2**31, 10**12, 10**30)))]
    if kind is float:
        return [draw.choice(("0", "0.5", "1", "-1", "1e-30", "1e30", "2", "1e300", "nan", "inf", "0.999999"))]
    return [draw.choice(("", "a", "b c", "no/such/place", *JUNK)).replace("\0", "")]


def is_text(hint):
    return any(str in (kind, *typing.get_args(kind)) for kind in alternatives(hint))


def some_flags(draw, name, count):
    table = {word: flag for word, flag in OPTIONS[name].flags().items() if flag.paths and word[:2] == "--"}
    return [(word, table[word]) for word in draw.sample(sorted(table), min(count, len(table)))]


def taken_line(draw, name, base):
    """Flags with values that a command takes, after the line that it needs."""
    for _ in range(10):
        given = [(flag, words_of(draw, of.hint), of) for flag, of in some_flags(draw, name, draw.randrange(1, 4))]
        paths = [path for _, _, of in given for path in of.paths]
        if len(set(paths)) < len(paths):  # one field by two flags: the last counts
            continue
        with contextlib.suppress(UserError):
            return given, parsed(name, base.lines[name] + [w for flag, words, _ in given for w in (flag, *words)])
    return [], parsed(name, base.lines[name])


def a_command(draw):
    return draw.choice(sorted(COMMANDS))


@mutation(SAME, 30, 1500)
def flags_in_another_order_and_spelling(draw, base):
    name = a_command(draw)
    given, expected = taken_line(draw, name, base)
    draw.shuffle(given)
    arguments = list(base.lines[name])
    for flag, words, of in given:
        flag = flag.replace("-", "_") if draw.random() < 0.5 else flag
        flag = "--" + flag[2:]
        if of.hint is bool and words == ["true"] and draw.random() < 0.5:
            arguments += [flag]
        elif len(words) == 1 and draw.random() < 0.5:
            arguments += [f"{flag}={words[0]}"]
        else:
            arguments += [flag, *words]
    return Case(f"{name} {arguments}", lambda: parsed(name, arguments), lambda found: found == expected)


@mutation(REFUSED, 40, 1500)
def a_flag_with_a_wrong_letter(draw, base):
    name = a_command(draw)
    table = OPTIONS[name].flags()
    right, of = some_flags(draw, name, 1)[0]
    flag = right
    while flag in table or flag.replace("no-", "") in table or flag in ("--", "--help"):
        at, letter = draw.randrange(2, len(right)), draw.choice(string.ascii_lowercase + "-.")
        end = right[at + 1 :]
        flag = right[:at] + draw.choice((end, letter + right[at] + end, letter + end))
    arguments = [*base.lines[name], flag, *words_of(draw, of.hint)]
    return Case(f"{name} {arguments}", lambda: parsed(name, arguments))


@mutation(REFUSED, 40, 1500)
def a_value_of_another_type(draw, base):
    name = a_command(draw)
    found = [(flag, of) for flag, of in some_flags(draw, name, 1000) if not is_text(of.hint)]
    if not found:
        return a_flag_with_a_wrong_letter(draw, base)
    flag, of = draw.choice(found)
    arguments = [*base.lines[name], f"{flag}={words_of(draw, of.hint, wrong=True)[0]}"]
    return Case(f"{name} {arguments}", lambda: parsed(name, arguments))


@mutation(EITHER, 60, 2500)
def any_words(draw, base):
    name = a_command(draw)
    arguments = list(base.lines[name]) if draw.random() < 0.8 else []
    for _ in range(draw.randrange(1, 6)):
        flag, of = some_flags(draw, name, 1)[0]
        word = draw.choice(JUNK).replace("\0", "")
        arguments += draw.choice(
            ([flag], [flag, word], [f"{flag}={word}"], [word], [flag, *words_of(draw, of.hint)], ["--"])
        )
    draw.shuffle(arguments)
    return Case(f"{name} {arguments}", lambda: parsed(name, arguments), round_trips)


@mutation(EITHER, 60, 3000)
def settings_at_random(draw, base):
    given = [
        w for flag, of in some_flags(draw, "train", draw.randrange(1, 5)) for w in (flag, *words_of(draw, of.hint))
    ]
    arguments = [*base.lines["train"], *given]
    return Case(f"train {arguments}", lambda: parsed("train", arguments), round_trips)


# ---- Config files ----------------------------------------------------------------------------------------------------


@mutation(EITHER, 40, 1500)
def a_config_file_with_damage(draw, base):
    content = damaged(draw, CONFIG.encode())
    path = base.place / "changed.py"
    path.write_bytes(content)
    return Case(f"{content!r}", lambda: parsed("inspect", [str(path)]), round_trips)


def leaves(values, path=()):
    """Where in a JSON document plain values are, and lists of them."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from leaves(value, (*path, key))
        else:
            yield values, key, (*path, key)


@mutation(REFUSED, 60, 2000)
def a_field_of_a_config_of_another_type(draw, base):
    values = json.loads(json.dumps(base.values))
    there, key, path = draw.choice(list(leaves(values)))
    there[key] = draw.choice(({"?": 1}, None, [None], [[1]], {}, [{}], [{"a": [1]}], [True, {}]))
    return Case(f"{path}: {there[key]}", lambda: from_json(Config, json.dumps(values), "config.json"))


@mutation(REFUSED, 20, 500)
def a_field_of_a_config_by_another_name(draw, base):
    values = json.loads(json.dumps(base.values))
    there, key, path = draw.choice([leaf for leaf in leaves(values) if isinstance(leaf[1], str)])
    name = draw.choice((key + "s", key[:-1], "_" + key, key.upper(), "family", "section", "", draw.choice(JUNK)))
    there[name] = there.pop(key)
    return Case(f"{path} as {name!r}", lambda: from_json(Config, json.dumps(values), "config.json"))


@mutation(EITHER, 40, 1500)
def the_json_of_a_config_with_damage(draw, base):
    content = damaged(draw, json.dumps(base.values, indent=1).encode())
    return Case(f"{content!r}", lambda: (from_json(Config, content, "config.json"),), round_trips)


# ---- Run directories -------------------------------------------------------------------------------------------------


def read_run(draw, base, run):
    """One of the ways to read a run; each gives the step, and the bits of the parameters where it has them."""

    def trained():
        return start(dataclasses.replace(base.config, workdir=str(run))).step, None

    def generated():
        command("generate", [str(run), "--prompt", "to", "--temperature", "0", "--max-new-tokens", "2"])
        return None, None

    return draw.choice((lambda: outcome(run), lambda: outcome(run), trained, trained, generated))


def is_of(base, names="a", *, values=True):
    """A result belongs to one of the complete checkpoints."""

    def judge(result):
        step, bits = result
        known = [of for (name, at), of in base.results.items() if name in names and step in (None, at)]
        return known != [] and (bits is None or not values or any(bits == of[1] for of in known))

    return judge


def files_of(run, part):
    return sorted(path for path in (run / part).rglob("*") if path.is_file() and "tensorboard" not in str(path))


def change(draw, path):
    if draw.random() < 0.1:
        path.unlink()
    else:
        path.write_bytes(damaged(draw, path.read_bytes()))


@mutation(SAME, 30, 1000)
def a_run_with_a_damaged_copy_at_its_top_loaded(draw, base):
    run = base.copy()
    path = draw.choice([path for path in run.iterdir() if path.is_file()])
    change(draw, path)
    return Case(f"{path}", lambda: outcome(run), lambda found: found == base.results["a", STEPS])


@mutation(EITHER, 30, 1000)
def a_run_with_a_damaged_file_at_its_top(draw, base):
    run = base.copy()
    path = draw.choice([path for path in run.iterdir() if path.is_file()])
    change(draw, path)
    return Case(f"{path}", read_run(draw, base, run), is_of(base))


@mutation(EITHER, 40, 2000)
def a_run_with_damaged_checkpoints(draw, base):
    run = base.copy()
    paths = draw.sample(files_of(run, "checkpoints"), draw.randrange(1, 4))
    for path in paths:
        change(draw, path)
    return Case(f"{paths}", read_run(draw, base, run), is_of(base))


@mutation(EITHER, 40, 2000)
def a_checkpoint_with_damage_that_its_manifest_does_not_tell(draw, base):
    run = base.copy()
    folder = run / "checkpoints" / str(STEPS)
    path = folder / draw.choice(("run.json", "checkpoint.json"))
    change(draw, path)
    write_manifest(epath.Path(folder))
    return Case(f"{path}", read_run(draw, base, run), is_of(base))


@mutation(EITHER, 30, 1000)
def a_checkpoint_with_an_edited_field(draw, base):
    run = base.copy()
    folder = run / "checkpoints" / str(STEPS)
    name, inner = draw.choice((("checkpoint.json", ""), ("run.json", "config.json"), ("run.json", "data.json")))
    outer = json.loads((folder / name).read_text())
    values = json.loads(outer[inner]) if inner else outer
    there, key, path = draw.choice([*leaves(values)])
    value = draw.choice((None, True, -1, 0, 1, 3, 2**40, 1.5, "", "a", "../../x", [], [1], {}, {"a": 1}, [[]], 1e308))
    there[key] = value
    (folder / name).write_text(json.dumps({**outer, inner: json.dumps(values)} if inner else values))
    write_manifest(epath.Path(folder))
    # An edit has a meaning of its own where it is taken: another step, say, or fewer parameters of another name.
    return Case(f"{name} {path}: {value!r}", read_run(draw, base, run), is_of(base))


@mutation(EITHER, 20, 700)
def a_run_with_files_of_another(draw, base):
    run, other = base.copy(), base.place / "b"
    paths = draw.sample(
        sorted(p.relative_to(other) for p in other.rglob("*") if "tensorboard" not in str(p)), draw.randrange(1, 4)
    )
    for path in paths:
        if (other / path).is_dir():
            shutil.rmtree(run / path, ignore_errors=True)
            shutil.copytree(other / path, run / path)
        else:
            (run / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(other / path, run / path)
    return Case(f"{paths}", read_run(draw, base, run), is_of(base, "ab"))


@mutation(EITHER, 20, 700)
def a_run_without_some_of_its_parts(draw, base):
    run = base.copy()
    paths = draw.sample(sorted(run.rglob("*")), draw.randrange(1, 6))
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return Case(f"{paths}", read_run(draw, base, run), is_of(base))


@mutation(EITHER, 20, 300)
def a_run_with_something_in_the_place_of_a_part(draw, base):
    run = base.copy()
    path = draw.choice(sorted(run.rglob("*")))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    match draw.randrange(4):
        case 0:
            path.mkdir()
        case 1:
            path.write_bytes(damaged(draw, b"{}"))
        case 2:
            path.symlink_to(draw.choice((path, path.parent, base.place / "b", "/nowhere")))
        case 3:
            path.mkdir()
            (path / "x").write_text("x")
    return Case(f"{path}", read_run(draw, base, run), is_of(base))


@mutation(EITHER, 4, 150)
def a_damaged_run_goes_on(draw, base):
    run = base.copy()
    paths = draw.sample(files_of(run, "."), 2)
    for path in paths:
        change(draw, path)
    config = run_config(base.place, "a", steps=STEPS + 1)
    return Case(
        f"{paths}", lambda: start(dataclasses.replace(config, workdir=str(run))).step, lambda step: step == STEPS + 1
    )


# ---- Data files ------------------------------------------------------------------------------------------------------

RECORDS = [
    {"text": f"to be {i}", "label": "ab"[i % 2], "source": f"s {i}", "target": f"ziel {i}", "prompt": f"p {i}"}
    for i in range(20)
]
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
KINDS = {"text": "text", "labelled": "text label", "pairs": "source target"}


def as_table(fields, separator):
    out = io.StringIO()
    rows = csv.writer(out, delimiter=separator, lineterminator="\n")
    rows.writerows([fields, *([record[name] for name in fields] for record in RECORDS)])
    return out.getvalue()


def data_file(draw):
    """The name, the content and the kind of a file of data."""
    kind = draw.choice(sorted(KINDS))
    fields = KINDS[kind].split()
    suffix = draw.choice((".jsonl", ".txt") if kind == "text" else (".jsonl", ".csv", ".tsv"))
    content = {
        ".jsonl": lambda: "".join(json.dumps({name: record[name] for name in fields}) + "\n" for record in RECORDS),
        ".txt": lambda: "\n".join(record["text"] for record in RECORDS),
        ".csv": lambda: as_table(fields, ","),
        ".tsv": lambda: as_table(fields, "\t"),
    }[suffix]().encode()
    return suffix, content, kind


def prepared(base, suffix, content, kind):
    place = base.place / "prepare"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    path = place / f"file{suffix}"
    path.write_bytes(content)
    name = [] if kind == "text" else ["--name", "n"]
    return command("prepare", [str(path), "--kind", kind, *name, "--data-dir", str(place / "data")])


@mutation(EITHER, 40, 1500)
def a_data_file_with_damage(draw, base):
    suffix, content, kind = data_file(draw)
    for _ in range(draw.randrange(1, 4)):
        content = damaged(draw, content)
    packed = draw.choice(sorted(PACKERS))
    return Case(
        f"{kind} {suffix}{packed} {content!r}", lambda: prepared(base, suffix + packed, PACKERS[packed](content), kind)
    )


@mutation(EITHER, 40, 1500)
def a_compressed_data_file_with_damage(draw, base):
    suffix, content, kind = data_file(draw)
    packed = draw.choice([name for name in PACKERS if name])
    broken = damaged(draw, PACKERS[packed](content))
    expected = prepared(base, suffix + packed, PACKERS[packed](content), kind)
    return Case(
        f"{kind} {suffix}{packed} {broken!r}",
        lambda: prepared(base, suffix + packed, broken, kind),
        # What does not begin as a compressed file is read as it is, whatever its name.
        lambda found: found == expected or not broken.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")),
    )


# ---- Prompts ---------------------------------------------------------------------------------------------------------


@mutation(EITHER, 20, 500)
def a_prompt(draw, base):
    prompt = "".join(
        draw.choice((*JUNK, "to ", "be", chr(draw.randrange(1, 0x11_0000)))) for _ in range(draw.randrange(4))
    )
    flag, of = draw.choice([given for given in some_flags(draw, "generate", 100) if not is_text(given[1].hint)])
    piped = draw.random() < 0.5
    own = [] if piped else ["--prompt", prompt.replace("\0", "")]
    arguments = [str(base.place / "a"), *own, "--max-new-tokens", "2", flag, *words_of(draw, of.hint)]
    told = prompt if piped else prompt.replace("\0", "")

    def begins_with_it(found):
        start = told.encode("utf-8", "replace").decode()
        return piped or found.startswith(start[:-1]) or "\r" in told

    return Case(f"{prompt!r} {arguments}", lambda: command("generate", arguments, prompt), begins_with_it)


# ---- The driver ------------------------------------------------------------------------------------------------------


class TooLong(Exception):
    pass


def too_long(*_):
    raise TooLong(f"a case must end within {SECONDS} seconds")


def ended(case):
    """How a case ended: in its result, or in a refusal."""
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        return "same" if case.judge(case.action()) else "other"
    except UserError as error:
        return "refused" if str(error).strip() else "refused without a word"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def drive(name, numbers, base, record_property):
    """Make and judge the cases of a mutation; a failure is reported with everything that repeats it."""
    make, verdict, *_ = MUTATIONS[name]
    counts, wrong = collections.Counter(), []
    allowed = {REFUSED: {"refused"}, SAME: {"same"}, EITHER: {"refused", "same"}}[verdict]
    for number in numbers:
        case = make(DRAW(f"{name} {number}"), base)
        try:
            end, detail = ended(case), ""
        except Exception as error:
            end, detail = "traceback", "".join(traceback.format_exception(error)[-6:])
        counts[end] += 1
        if end not in allowed:
            wrong.append(
                f"case {number} ended in {end}, not in {' or '.join(sorted(allowed))}: {case.what[-600:]}\n{detail}"
            )
        if len(wrong) == 30:
            break
    record_property("fuzz", [name, verdict, dict(counts)])
    return wrong


@pytest.mark.parametrize("part", ["the first", "the rest"])
def test_changed_inputs(part, base, record_property):
    """Of each mutation the first quarter of its few cases, or the rest of them."""
    parts = {
        name: range(of.few // 4) if part == "the first" else range(of.few // 4, of.few)
        for name, of in MUTATIONS.items()
    }
    wrong = [line for name, numbers in parts.items() for line in drive(name, numbers, base, record_property)]
    assert not wrong, f"{len(wrong)} cases\n" + "\n".join(wrong[:60])


def test_there_are_enough():
    assert sum(of.few for of in MUTATIONS.values()) >= 500
    assert sum(of.many for of in MUTATIONS.values()) >= 20_000


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MUTATIONS)
def test_many_changed_inputs(name, base, record_property):
    of = MUTATIONS[name]
    wrong = drive(name, range(of.few, of.few + of.many), base, record_property)
    assert not wrong, f"{len(wrong)} cases\n" + "\n".join(wrong[:60])
