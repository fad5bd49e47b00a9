"""A run's directory from anybody: what it names is not read or written, and what it claims to be is not allocated."""

import json
import shutil

import pytest
from etils import epath

from transformer.cli.main import main
from transformer.config import DataConfig
from transformer.data.trust import remember, trusted
from transformer.runs.directory import CONFIG_FILE, RECORD_FILE
from transformer.training import manifest
from transformer.types import UserError

CONFIG = """
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig

def get_config():
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(sequence_length=16, batch_size=8, record_bytes=64),
        training=TrainingConfig(steps=1, sample_length=0),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of one step on a text file, with a data_dir of its own."""
    directory = tmp_path_factory.mktemp("strangers")
    (directory / "config.py").write_text(CONFIG)
    (directory / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    data = ("--data.source", str(directory / "text.txt"), "--data.data-dir", str(directory / "data"))
    main(["train", str(directory / "config.py"), *data, "--workdir", str(directory / "run")])
    return directory


@pytest.fixture
def another_user(tmp_path, monkeypatch):
    """Who has trained on nothing, and whose datasets are elsewhere."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
    return tmp_path


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments])
    assert exit_info.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def edited(place, tmp_path, edit):
    """A copy of the run whose config says something else, wherever the run has it, whole as far as manifests go."""
    run = tmp_path / "edited"
    shutil.copytree(place / "run", run)
    for path in run.rglob(RECORD_FILE):
        files = json.loads(path.read_text())
        values = json.loads(files[CONFIG_FILE])
        edit(values)
        path.write_text(json.dumps({**files, CONFIG_FILE: json.dumps(values)}))
    for path in run.rglob(manifest.NAME):
        path.unlink()
        manifest.write_manifest(epath.Path(path.parent))
    return str(run)


def test_your_own_run_is_scored_as_it_is(place, capsys):
    main(["evaluate", str(place / "run")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["source"] == [str(place / "text.txt")]


def test_a_path_that_a_run_names_is_read_only_if_it_is_given(place, another_user, capsys):
    prepared = {path: path.stat().st_mtime_ns for path in (place / "data").rglob("*")}
    error = refused(capsys, "evaluate", str(place / "run"))
    text = str(place / "text.txt")
    assert f"names '{text}', which is not read. If it is yours to score, give it: --data.source {text}." in error
    assert not (another_user / "datasets").exists()
    main(["evaluate", str(place / "run"), "--data.source", text])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["targets"] > 0
    # Prepared in the user's own data_dir, not where the run said.
    assert any((another_user / "datasets").rglob("*array_record*"))
    assert {path: path.stat().st_mtime_ns for path in (place / "data").rglob("*")} == prepared


@pytest.mark.parametrize("source", ["/etc", "gs://bucket/text.jsonl", "../up.txt", "~/notes.txt", "shelf"])
def test_no_kind_of_path_is_read(source, tmp_path, another_user, monkeypatch):
    """A folder in the current directory too, that has the name of a dataset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shelf").mkdir()
    run = DataConfig(source=(source,))
    with pytest.raises(UserError, match="which is not read"):
        trusted(run, "runs/theirs")
    assert trusted(run, "runs/theirs", source=(source,)).source == run.source
    remember(run)
    assert trusted(run, "runs/theirs").source == run.source


def test_datasets_by_name_are_read_in_the_users_own_data_dir(tmp_path, another_user):
    run = DataConfig(source=("lm1b", "python_stdlib"), data_dir=str(tmp_path / "theirs"))
    assert trusted(run, "runs/theirs").data_dir == ""
    assert trusted(run, "runs/theirs", data_dir="mine").data_dir == "mine"
    remember(run)
    assert trusted(run, "runs/theirs").data_dir == str(tmp_path / "theirs")


def test_a_home_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    remember(DataConfig(source=("/somewhere",)))


SIZES = [("num_layers", 10**9), ("vocab_size", 10**12), ("embed_dim", 2**30), ("num_layers", "many")]


@pytest.mark.parametrize(
    ("command", "field", "value"),
    # A run that starts from another holds what the checkpoint describes, which is the small model.
    [(command, *size) for command in ("evaluate", "generate") for size in SIZES]
    + [("init_from", *SIZES[1]), ("init_from", *SIZES[3])],
)
def test_a_size_that_nothing_holds_is_a_short_error_of_every_command(place, tmp_path, capsys, command, field, value):
    run = edited(place, tmp_path, lambda values: values["model"].update({field: value}))
    arguments = [command, run, *(("--prompt", "To be") if command == "generate" else ())]
    if command == "init_from":
        data = ("--data.source", str(place / "text.txt"), "--data.data-dir", str(place / "data"))
        arguments = ["train", str(place / "config.py"), *data, "--training.init-from", run]
        arguments += ["--workdir", str(tmp_path / "new")]
    error = refused(capsys, *arguments)
    assert field in error.replace("-", "_") and len(error) < 600
    assert not (tmp_path / "new").exists()


def test_a_prompt_is_not_given_a_cache_that_nothing_holds(place, tmp_path, capsys):
    run = edited(place, tmp_path, lambda values: values["model"].update(max_length=2**31 - 1))
    assert "a cache of 1 rows of 2,147,483,647 tokens" in refused(capsys, "generate", run, "--prompt", "To be")


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_a_run_instead_of_a_config_names_no_file(command, place, another_user, capsys):
    error = refused(capsys, command, str(place / "run"))
    assert "may name only data that you have trained on" in error and "--data.source" in error


def test_a_run_is_inspected_as_its_config_is(place, tmp_path, monkeypatch, capsys):
    main(["inspect", str(place / "run")])
    own = capsys.readouterr().out
    assert "first batch" in own and "2,848 parameters" in own
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
    main(["inspect", str(place / "run"), "--data.source", str(place / "text.txt")])
    assert capsys.readouterr().out == own
    assert (tmp_path / "datasets").exists()
