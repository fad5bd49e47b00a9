"""Command lines become configs; what cannot be taken is a short error and exit code 2, before any work."""

import pathlib

import pytest

from transformer.cli.arguments import default_workdir, expand_aliases, load_config, parse_config
from transformer.cli.main import main, run
from transformer.types import UserError

ROOT = pathlib.Path(__file__).parents[2]
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
    assert expand_aliases(["--model.attention.num-heads", "8", "--x", "1"], 2) == [
        "--model.pattern.0.attention.num-heads",
        "8",
        "--model.pattern.1.attention.num-heads",
        "8",
        "--x",
        "1",
    ]
    assert expand_aliases(["--model.norm.kind=rms_norm"], 1) == ["--model.pattern.0.norm.kind=rms_norm"]
    assert parse("--model.attention.num-heads", "8", "--model.feed-forward.gated").model.pattern[0].feed_forward.gated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.num-layerz", "2"], "--model.num-layers"),
        (["--model.num-layers", "two"], "invalid literal for int() with base 10: 'two'"),
        (["--model.num-layers"], "--model.num-layers"),
        (["--optimizer.name", "sgd"], "'adamw', 'lion', 'adafactor', 'muon'"),
        (["--model.embed-dim", "130"], "embed_dim must be divisible by num_heads, got embed_dim=130"),
        (["--optimizer.accumulate-steps", "7"], "must be divisible by optimizer.accumulate_steps=7"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(*arguments)
    assert exit_info.value.code == 2
    # The message is set in a box: join its lines.
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in text
    assert "Traceback" not in text


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


@pytest.mark.parametrize("text", ["def get_config(): dict(x=1)['y']", "def get_config(): len(1)"])
def test_an_error_in_a_config_file_is_its_own(tmp_path, text):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises((KeyError, TypeError), match=r"'y'|has no len"):
        load_config(str(path))


def test_missing_config_file_is_named():
    with pytest.raises(UserError, match=r"must be a Python file, got 'nowhere\.py', which does not exist"):
        load_config("nowhere.py")


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
