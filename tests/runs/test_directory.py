"""A run's directory: what lacks files, is damaged, moved or another run's is mended or refused, and nothing is lost."""

import ast
import dataclasses
import itertools
import json
import pathlib
import random
import re
import shutil
import threading
import time
import typing

import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from transformer import config as config_module
from transformer.config import Config, DataConfig, TrainingConfig, UserPath
from transformer.data.tokenizers.characters import Characters
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.optimizers.adamw import AdamW
from transformer.runs.saved import load
from transformer.runs.scoring import evaluate
from transformer.runs.train import train
from transformer.schedules.cosine import CosineSchedule
from transformer.training.manifest import write_manifest
from transformer.training.metrics import TIMINGS
from transformer.training.writers import read_jsonl
from transformer.types import UserError

pytestmark = pytest.mark.usefixtures("compiled_once")
STEPS = 4
ROOT = pathlib.Path(__file__).parents[2]


def make_config(place, name="run", **training):
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=1)),)),
        data=DataConfig(
            source=(str(place / "text"),),
            data_dir=str(place / "prepared"),
            tokenizer=Characters(),
            sequence_length=16,
            batch_size=8,
            validation_fraction=0.2,
        ),
        optimizer=AdamW(schedule=CosineSchedule(warmup_steps=1)),
        training=TrainingConfig(
            **{"steps": STEPS, "log_every": 1, "eval_every": 2, "checkpoint_every": 2, "sample_length": 4, **training}
        ),
        workdir=str(place / name),
    )


def start(config, **options):
    lines = []
    console = Console(quiet=True)
    console.print = lambda *parts, **_: lines.append(" ".join(map(str, parts)))
    return train(config, console=console, **options), lines


def snapshot(directory):
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def rows_of(workdir):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_jsonl(workdir / "metrics.jsonl")]


def outcome(workdir):
    return (
        rows_of(workdir),
        [np.asarray(x) for x in jax.tree.leaves(load(workdir).params)],
        (workdir / "samples.txt").read_text(),
    )


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert [x.tobytes() for x in found[1]] == [x.tobytes() for x in expected[1]]
    assert found[2] == expected[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    words = random.Random(0)
    (directory / "text").mkdir()
    for index in range(20):
        text = " ".join(words.choice(("to", "be", "or", "not")) for _ in range(60))
        (directory / "text" / f"{index}.txt").write_text(text)
    return directory


@pytest.fixture(scope="module")
def finished(place):
    start(make_config(place))
    return place / "run"


@pytest.fixture
def copy(finished, place, request):
    path = place / re.sub(r"\W", "_", f"copy {request.node.name}")
    shutil.copytree(finished, path)
    return path


def config_of(place, workdir, **training):
    return make_config(place, workdir.relative_to(place), **training)


# ---- The copies at the top -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage"), [("config.json", "missing"), ("tokenizer.json", "torn"), ("config.json", "binary")]
)
def test_a_damaged_copy_is_rewritten_and_the_run_goes_on(place, finished, copy, name, damage):
    shutil.rmtree(copy / "checkpoints" / "4")
    path = copy / name
    whole = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(whole[:7] if damage == "torn" else b"\xff\x00")
    load(copy)  # reads the checkpoint
    start(config_of(place, copy))
    assert json.loads(path.read_bytes()) | {"workdir": ""} == json.loads(whole) | {"workdir": ""}
    assert_same(outcome(copy), outcome(finished))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda c: c["model"].update(embed_dim=16)),
        ("config.json", lambda c: c["data"].update(new_field=1)),
        ("tokenizer.json", lambda t: t.update(characters="abc")),
    ],
)
def test_a_whole_copy_that_differs_stops_the_run(place, copy, name, change):
    content = json.loads((copy / name).read_text())
    change(content)
    (copy / name).write_text(json.dumps(content))
    before = snapshot(copy)
    with pytest.raises(UserError, match=rf"{name} must be .* but differs"):
        start(config_of(place, copy, steps=STEPS + 2))
    assert snapshot(copy) == before
    load(copy)


def test_what_a_resumed_run_may_change_may_differ_and_the_tokenizer_is_not_rewritten(place, copy):
    content = json.loads((copy / "config.json").read_text())
    content["training"]["log_every"] = 7
    (copy / "config.json").write_text(json.dumps(content))
    written = (copy / "tokenizer.json").stat().st_ino
    start(config_of(place, copy, steps=STEPS + 2))
    assert json.loads((copy / "config.json").read_text())["training"]["log_every"] == 1
    assert (copy / "tokenizer.json").stat().st_ino == written


# ---- Copies of a run that lack files ---------------------------------------------------------------------------------


def parts(directory):
    """Every file and folder of a run, but the arrays' own; removed one by one, and two by two at the top."""
    tops = sorted(p.name for p in directory.iterdir())
    steps = [f"checkpoints/{p.name}" for p in sorted((directory / "checkpoints").iterdir())]
    inner = [
        f"{step}/{name}" for step in steps for name in ("MANIFEST.sha256", "checkpoint.json", "run.json", "params")
    ]
    manifests = tuple(f"{step}/MANIFEST.sha256" for step in steps)
    singles = [(name,) for name in [*tops, *steps, *inner]]
    return [*singles, *itertools.combinations(tops, 2), manifests, (*manifests, "config.json"), tuple(steps)]


def test_any_part_may_be_missing(place, finished):
    """The run goes on to the same bits, or is refused with nothing changed; and no row is ever dropped for nothing."""
    expected = outcome(finished)
    refused = []
    for number, missing in enumerate(parts(finished)):
        copy = place / f"part {number}"
        shutil.copytree(finished, copy)
        for name in missing:
            path = copy / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = snapshot(copy)
        message = ""
        try:
            start(config_of(place, copy))
        except UserError as error:
            message = str(error)
        if message:
            refused.append(missing)
            assert snapshot(copy) == before, missing
            assert re.search("Copy the run again|must be undamaged", message), (missing, message)
            assert any(name.startswith("checkpoints") for name in missing)
        else:
            params = jax.tree.leaves(load(copy).params)
            assert [np.asarray(x).tobytes() for x in params] == [x.tobytes() for x in expected[1]], missing
            if "metrics.jsonl" not in missing:
                assert rows_of(copy) == expected[0], missing
        shutil.rmtree(copy)
    assert len(refused) > 5


def test_what_a_kill_left_of_a_removed_checkpoint_goes_when_a_finished_run_is_started(place, copy):
    newest = max((copy / "checkpoints").iterdir(), key=lambda path: path.name)
    before = snapshot(copy)
    shutil.copytree(newest, copy / "checkpoints" / "1.unfinished")
    (copy / "checkpoints" / "1.unfinished" / "MANIFEST.sha256").unlink()
    start(config_of(place, copy))
    assert snapshot(copy) == before


def test_a_kill_in_the_first_start_leaves_what_the_same_command_starts_in(place, finished):
    class Death(BaseException):
        pass

    config = make_config(place, "first")

    def die(step, *_):
        if step == 1:
            raise Death

    with pytest.raises(Death):
        start(config, hooks=[die])
    workdir = place / "first"
    assert (workdir / "checkpoints" / "NO_CHECKPOINT_YET").exists()
    (workdir / "config.json").write_text("{")
    (workdir / "tokenizer.json.tmp").write_text("ha")
    (workdir / "samples.txt").write_bytes(b"---- step 2, 5 bytes\nha")
    start(config)
    assert_same(outcome(workdir), outcome(finished))
    assert {p.name for p in workdir.iterdir()} == {p.name for p in finished.iterdir()}
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4"]


@pytest.mark.parametrize("letter", "*?[")
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(place, letter):
    """It saves nothing but the shapes there, and says so when they are loaded."""
    with pytest.raises(UserError, match=r"must be without \*, \? and \["):
        start(make_config(place, f"run{letter}1]"))
    assert not (place / f"run{letter}1]").exists()


# ---- Two starts ------------------------------------------------------------------------------------------------------


def test_a_second_start_is_refused_and_readers_are_not(place, finished):
    config, found = make_config(place, "twice"), []

    def second(step, *_):
        if step == 4:
            while not (place / "twice" / "checkpoints" / "2").exists():
                time.sleep(0.01)
            before = snapshot(place / "twice")
            thread = threading.Thread(target=try_start)
            thread.start()
            thread.join()
            assert {k: v for k, v in snapshot(place / "twice").items() if "/" not in k} == {
                k: v for k, v in before.items() if "/" not in k
            }
            found.append(load(place / "twice").step)

    def try_start():
        try:
            start(config)
        except UserError as error:
            found.append(str(error))

    start(config, hooks=[second])
    assert "is in use by process" in found[0]
    assert found[1] == 2
    assert_same(outcome(place / "twice"), outcome(finished))


# ---- The corpus ------------------------------------------------------------------------------------------------------


def test_a_moved_run_with_moved_text_goes_on_and_is_evaluated(place, copy, monkeypatch, tmp_path):
    shutil.copytree(place / "text", tmp_path / "elsewhere")
    shutil.move(copy, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(
        make_config(place, steps=STEPS + 1),
        workdir="moved",
        data=dataclasses.replace(make_config(place).data, source=("elsewhere",), data_dir="new"),
    )
    start(config)
    assert load("moved").step == STEPS + 1
    scores = evaluate("moved")
    assert scores["step"] == STEPS + 1 and scores["source"] == ["elsewhere"]


def test_changed_text_is_refused_at_every_door_unless_it_is_named(place, copy, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(place / "text", text)
    config = config_of(place, copy, steps=STEPS + 1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=(str(text),)))
    start(config)
    (text / "3.txt").write_text("to be or not to be, quite another text, and longer than the one before was")
    rows = (copy / "metrics.jsonl").read_bytes()
    again = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=STEPS + 2))
    with pytest.raises(
        UserError, match=r"content or its split has changed\n.*train .*of other content\nRestore it to continue"
    ):
        start(again)
    assert (copy / "metrics.jsonl").read_bytes() == rows
    with pytest.raises(UserError, match=r"has changed\n(.|\n)*--data\.source"):
        evaluate(copy)
    assert evaluate(copy, source=[str(text)], split="train")["loss"] > 0


# ---- Damage under a manifest that agrees with it ---------------------------------------------------------------------


def change(copy, name, edit):
    """Change a file of the latest checkpoint, and its manifest with it: as an edit by hand, or a run from anybody."""
    path = copy / "checkpoints" / str(STEPS)
    (path / name).write_bytes(edit((path / name).read_bytes()))
    write_manifest(epath.Path(path))


@pytest.mark.parametrize("name", ["run.json", "checkpoint.json"])
def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(name, copy, finished, place):
    draw, whole, refused = random.Random(0), load(finished), 0
    content = (copy / "checkpoints" / str(STEPS) / name).read_bytes()
    for _ in range(40):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        change(copy, name, lambda _, flipped=flipped: bytes(flipped))
        message = refusal(lambda: compare(load(copy), whole))
        assert message == "" or str(copy) in message
        refused += message != ""
        refused += refusal(lambda: start(config_of(place, copy))) != ""
    assert refused > 40


def compare(found, whole):
    assert found.step == whole.step
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, whole.params))


def refusal(action):
    """Why an action is refused; empty where it is not."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:-9], r"run.json must be JSON as training writes it, but is damaged \("),
        (
            lambda text: b"[]",
            r"run.json is damaged, or of another version: its content must be an object of fields, got \[\]",
        ),
        (
            lambda text: text.replace(b"data.json", b"dat.json"),
            r"run.json must be .*, but is damaged \(KeyError: 'data.json'",
        ),
        (
            lambda text: text.replace(b"tokenizer.json", b"../../../t.json"),
            r"must hold files of a run, got \['../../../t",
        ),
        (
            lambda text: text.replace(b"fingerprint", b"fingerprimt"),
            r"run.json: data.json is damaged.*no field fingerprimt",
        ),
        (
            lambda text: text.replace(b'characters\\"', b'characterz\\"'),
            r"run.json: config.json.*did you mean characters\?",
        ),
    ],
)
def test_the_file_that_is_damaged_and_what_is_wrong_are_named(edit, message, copy):
    change(copy, "run.json", edit)
    with pytest.raises(UserError, match=message):
        load(copy)


# ---- Home directories ------------------------------------------------------------------------------------------------

CONFIGS = [kind for kind in vars(config_module).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


def path_fields(kind):
    hints = typing.get_type_hints(kind, include_extras=True)
    return {name: hint for name, hint in hints.items() if hint in (UserPath, tuple[UserPath, ...])}


def test_every_field_that_is_a_path_is_expanded_when_its_config_is_made(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    found = []
    for kind in CONFIGS:
        for name, hint in path_fields(kind).items():
            value = getattr(kind(**{name: "~/a" if hint is UserPath else ("~/a", "b")}), name)
            assert value == ("/home/u/a" if hint is UserPath else ("/home/u/a", "b"))
            found.append(name)
    assert sorted(found) == ["data_dir", "init_from", "source", "validation", "workdir"]


def test_a_field_whose_documentation_speaks_of_a_directory_is_a_path():
    tree = ast.parse((ROOT / "transformer" / "config.py").read_text())
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in itertools.pairwise(kind.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and ast.unparse(field.annotation) == "str"
            ):
                text = ast.literal_eval(after.value)
                assert not any(text.startswith(word) for word in ("Directory", "Where ", "File", "Folder")), text


def test_nothing_else_expands_home_directories():
    files = [path for path in (ROOT / "transformer").rglob("*.py") if "expanduser" in path.read_text()]
    assert [path.name for path in files] == ["storage.py"]


def test_everything_of_a_run_goes_to_the_home_directory(place, finished, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "text", tmp_path / "text")
    base = make_config(place)
    data = dataclasses.replace(base.data, source=("~/text",), data_dir="~/prepared")
    start(dataclasses.replace(base, workdir="~/run", data=data))
    assert {path.name for path in tmp_path.iterdir()} == {"text", "prepared", "run"}
    assert_same(outcome(tmp_path / "run"), outcome(finished))
    assert load("~/run").step == STEPS
    assert evaluate("~/run", source=["~/text"], data_dir="~/prepared")["loss"] > 0
