"""Command lines become configs; what cannot be taken is a short error and exit code 2, before any work."""

import dataclasses
import pathlib
import re

import pytest

from transformer.cli import fields
from transformer.cli.arguments import default_workdir, load_config, parse_config
from transformer.cli.fields import flags
from transformer.cli.fields import parse as parse_flags
from transformer.cli.main import main, run
from transformer.config import Config
from transformer.model_config import BlockConfig, ModelConfig
from transformer.types import UserError

ROOT = pathlib.Path(__file__).parents[2]
NAMES = {"command": "transformer train", "usage": "", "about": ""}
CONFIG = str(ROOT / "configs" / "python_stdlib.py")


def parse(*arguments):
    return parse_config([CONFIG, *arguments], command="transformer train")


def test_fields_are_overridden():
    config = parse("--model.num-layers", "2", "--data.source", "a", "b", "--training.seed=3", "--workdir", "w")
    assert config.model.num_layers == 2
    assert config.data.source == ("a", "b")
    assert config.training.seed == 3
    assert config.workdir == "w"


def test_workdir_is_named_after_config_and_variant():
    assert parse().workdir == "runs/python_stdlib"
    assert default_workdir("configs/a.py:debug") == "runs/a-debug"


def test_alias_sets_every_block():
    two = Config(model=ModelConfig(pattern=(BlockConfig(), BlockConfig())))
    given, _ = parse_flags(
        flags(two), ["--model.attention.num-heads", "8", "--model.pattern.1.norm.kind=rms_norm"], **NAMES
    )
    assert given == {
        "model.pattern.0.attention.num_heads": 8,
        "model.pattern.1.attention.num_heads": 8,
        "model.pattern.1.norm.kind": "rms_norm",
    }
    assert parse("--model.attention.num-heads", "8", "--model.feed_forward.gated").model.pattern[0].feed_forward.gated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model.num-layerz", "2"],
            "--model.num-layerz is no option of transformer train; did you mean --model.num-layers?",
        ),
        (["--num-layers", "2"], "--num-layers is no option of transformer train; did you mean --model.num-layers?"),
        (["--model.num-layers", "two"], "--model.num-layers must be a whole number, got 'two'."),
        (["--model.num-layers"], "--model.num-layers needs a value, a whole number."),
        (["--model.num-layers", "--training.steps", "3"], "--model.num-layers needs a value, a whole number."),
        (["--data.source", "a", "--trainig.steps", "3"], "--trainig.steps is no option"),
        (["--training.profile-steps", "3"], "--training.profile-steps takes 2 values, got 3."),
        (
            ["--optimizer.kind", "adam"],
            "--optimizer.kind must be one of adamw, lion, adafactor, muon, got 'adam'; did you",
        ),
        (["--data.no-pack=true"], "--data.no-pack takes no value"),
        (["--data.no-batch-size"], "--data.no-batch-size is no option"),
        (["more.py"], "takes one config file, got 'more.py' too"),
        (["--training.steps", "0"], "--training.steps must be at least 1, got 0."),
        (["--data.stride", "999"], "--data.stride must not exceed --data.sequence-length=256, got 999."),
        (["--model.embed-dim", "130"], "--model.attention.num-heads must divide --model.embed-dim=130, got 4"),
        (["--optimizer.accumulate-steps", "7"], "must be divisible by --optimizer.accumulate-steps=7"),
    ],
)
def test_bad_arguments_are_one_line_that_names_the_flag(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run("train", [CONFIG, *arguments])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error and "Config." not in error


def test_help_documents_every_field(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "--optimizer.weight-decay" in text
    assert "Decoupled weight decay" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must define get_config"),
        ("def get_config(): return 3", "must return a transformer.config.Config"),
        ("def get_config(variant=''): return {'': 1}[variant]", "has no variant 'no'"),
        ("def get_config(): return 'no variant'", "has no variant 'no'"),
    ],
)
def test_bad_config_files_are_named(tmp_path, text, message):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(f"{path}:no" if "variant" in text else str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\ndef get_config(): dict(x=1)['y']", r"c\.py, line 2: KeyError: 'y'"),
        ("def get_config(): len(1)", r"c\.py, line 1: TypeError: object of type 'int' has no len"),
        ("def get_config(:", r"c\.py, line 1: SyntaxError: "),
        ("x = 1\nimport nowhere", r"c\.py, line 2: ModuleNotFoundError: No module named 'nowhere'"),
        ("from transformer.config import *\nDataConfig(batchsize=1)", r"c\.py, line 2: TypeError: .*'batchsize'"),
    ],
)
def test_an_error_in_a_config_file_has_its_line(tmp_path, text, message):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(path))


def test_missing_config_file_is_named():
    with pytest.raises(
        UserError, match=r"'nowhere\.py', which does not exist; the names are enwiki_bytes, .*gpt2_124m, "
    ):
        load_config("nowhere.py")


@pytest.mark.parametrize(
    ("name", "near"),
    [("gpt2_124", "gpt2_124m"), ("gpt2-124m", "gpt2_124m"), ("configs/lama_8b.py:debug", "llama_8b or llama_1b or ")],
)
def test_a_name_that_is_almost_a_config_is_answered_with_its_neighbours(name, near):
    with pytest.raises(UserError, match=f"did you mean {near}"):
        load_config(name)


def test_a_config_has_a_name_anywhere(tmp_path, monkeypatch):
    """A file or a run of that name comes first; a folder that is neither does not."""
    monkeypatch.chdir(tmp_path)
    named = parse_config(["shakespeare_char_cpu:debug"], command="transformer train")
    assert named.workdir == "runs/shakespeare_char_cpu-debug"
    assert dataclasses.replace(named, workdir="") == load_config(str(ROOT / "configs/shakespeare_char_cpu.py:debug"))
    (tmp_path / "shakespeare_char_cpu").mkdir()
    assert parse_config(["shakespeare_char_cpu:debug"], command="transformer train") == named
    (tmp_path / "shakespeare_char_cpu" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="shakespeare_char_cpu is neither"):
        load_config("shakespeare_char_cpu")
    (tmp_path / "gpt2_124m").write_text("")
    with pytest.raises(UserError, match=r"must be a Python file ending in \.py, got 'gpt2_124m'"):
        load_config("gpt2_124m")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_loads_and_has_a_debug_variant(path):
    config, debug = load_config(str(path)), load_config(f"{path}:debug")
    assert debug.training.steps < config.training.steps


def test_user_errors_are_one_line(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run("train", ["nowhere.py"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("error: A config must be a Python file")


def test_unknown_command_and_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["dance"])
    assert exit_info.value.code == 2
    assert "unknown command 'dance'" in capsys.readouterr().err
    main([])
    assert "evaluate" in capsys.readouterr().out


def test_callbacks_of_a_failed_save_print_nothing(monkeypatch):
    """TensorStore reports to the event loop that Orbax has closed; Python hands such errors to `sys.unraisablehook`."""

    class Late:
        def __init__(self, text):
            self.text = text

        def __del__(self):
            raise RuntimeError(self.text)

    def command(*_):
        for text in ("Event loop is closed", "something else"):
            Late(text)

    seen = []
    monkeypatch.setattr("sys.unraisablehook", lambda found: seen.append(str(found.exc_value)))
    monkeypatch.setattr("transformer.cli.prove.main", command)
    main(["prove"])
    assert seen == ["something else"]


@pytest.mark.parametrize("word", sorted(fields._SYNONYMS))
def test_the_names_of_other_trainers_lead_to_ours(word, capsys):
    with pytest.raises(SystemExit):
        main(["train", CONFIG, f"--{word}", "1"])
    (meant,) = re.findall(r"did you mean (--[\w.-]+)\?", capsys.readouterr().err)
    assert meant.endswith(fields._SYNONYMS[word])
    assert meant in fields.flags(Config())
