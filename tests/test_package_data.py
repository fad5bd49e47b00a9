"""A source archive and a wheel are built without a network, have every file, and the wheel works in an empty folder."""

import configparser
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import transformer

ROOT = pathlib.Path(__file__).parent.parent
BUILD = "import setuptools.build_meta as backend, sys; print(getattr(backend, f'build_{sys.argv[1]}')(sys.argv[2]))"
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "runs", "build", "dist", "__pycache__", "*.egg-info"
)
NOT_IN_GIT = "this is no clone of a git repository, so that no list says which files there are"


def tracked():
    """The files of the repository, those included that are new; None where it is no clone."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not (ROOT / ".git").exists():
        return None
    return sorted(name for name in listed.stdout.splitlines() if (ROOT / name).is_file())


def build(kind, source, target):
    """Build by setuptools' own backend, as pip does; setuptools comes with the extra `dev`."""
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    return target / built.stdout.split()[-1]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The unpacked source archive."""
    pytest.importorskip("setuptools", "77", reason="a build needs setuptools 77; the extra dev installs it")
    folder = tmp_path_factory.mktemp("sdist")
    names = tracked()
    if names is None:
        shutil.copytree(ROOT, folder / "clone", ignore=NOT_COPIED)
    else:
        for name in names:
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "clone" / name)
    with tarfile.open(build("sdist", folder / "clone", folder)) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory):
    """The unpacked wheel, built from the source archive."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", archive, folder)) as built:
        built.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """Run a command of the wheel in a folder that has nothing but a text."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "text.txt").write_text("A line of a user's own text, again and again.\n" * 400)
    environment = os.environ | {"PYTHONPATH": str(wheel), "TFDS_DATA_DIR": str(folder / "prepared"), "XLA_FLAGS": ""}

    def run(*words, program=("-m", "transformer")):
        line = [sys.executable, *program, *words]
        options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
        return subprocess.run(line, cwd=folder, env=environment, **options)

    return run


def files(folder):
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if "__pycache__" not in path.parts}


def test_the_archive_has_every_file_of_the_repository(archive):
    names = tracked()
    if names is None:
        pytest.skip(NOT_IN_GIT)
    assert set(names) <= files(archive)


def test_the_wheel_has_the_package_and_the_configs_once(wheel):
    package = files(ROOT / "transformer")
    configs = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert files(wheel / "transformer") == package | configs
    assert {"py.typed", "analysis/page/attention.js", "configs/gpt2_124m.py"} <= package | configs
    (info,) = wheel.glob("*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {"transformer", info.name}
    assert info.name == f"transformer-{transformer.__version__}.dist-info"
    scripts = configparser.ConfigParser()
    scripts.read(info / "entry_points.txt")
    assert scripts["console_scripts"]["transformer"] == "transformer.cli.main:main"


def test_the_wheel_is_what_runs(command, wheel):
    place = command("import transformer; print(transformer.__file__)", program=("-c",))
    assert place.stdout.strip() == str(wheel / "transformer" / "__init__.py"), place.stderr
    assert command("--version").stdout == f"transformer {transformer.__version__}\n"
    assert "usage: transformer COMMAND" in command("--help").stdout
    assert "--optimizer.weight-decay" in command("train", "gpt2_124m", "--help").stdout


TINY = shlex.split(
    "--data.source text.txt --training.steps 2 --model.num-layers 1 --data.sequence-length 32 --data.batch-size 2"
)


@pytest.mark.parametrize("name", ["gpt2_124m:debug", "gpt:d2"])
def test_the_wheel_trains_and_evaluates_its_own_configs(command, name):
    trained = command("train", name, *TINY, "--training.sample-length", "0")
    assert trained.returncode == 0, trained.stderr
    run = f"runs/{name.replace(':', '-')}"
    assert run in trained.stderr  # what to type next
    scores = command("evaluate", run)
    assert json.loads(scores.stdout)["bits_per_byte"] > 0, scores.stderr


def test_the_wheel_shows_its_own_configs(command):
    shown = command("inspect", "gpt2_124m:debug", *TINY)
    assert shown.returncode == 0 and "embedding" in shown.stdout, shown.stderr


def test_the_wheel_names_its_configs_where_a_name_is_wrong(command):
    wrong = command("train", "gpt2_124")
    assert wrong.returncode == 2 and "did you mean gpt2_124m" in wrong.stderr
