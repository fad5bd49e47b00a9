"""Every code block of the README, CONTRIBUTING.md and docs/ runs: Python as it stands, commands with tiny sizes."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from markdown_blocks import fenced_blocks

from transformer.cli.main import main
from transformer.cli.options import OPTIONS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = shlex.split(
    "--training.steps 2 --training.log-every 1 --training.sample-length 0 --training.eval-every 0 "
    "--optimizer.schedule.warmup-steps 0 --model.num-layers 1 --model.embed-dim 16 --model.attention.num-heads 2 "
    "--data.sequence-length 64 --data.batch-size 8 --data.buckets"
)


def blocks(language):
    for page in PAGES:
        for number, (of_language, text) in enumerate(fenced_blocks(page.read_text())):
            if of_language == language:
                yield pytest.param(text, id=f"{page.stem}-{number}")


def test_every_block_has_a_language_that_is_tested():
    for page in PAGES:
        languages = {language for language, _ in fenced_blocks(page.read_text()) if language}
        assert languages <= {"python", "sh", "text", "yaml"}, f"{page.name} has {languages}"


def test_every_test_that_a_page_names_exists():
    named = {name for page in PAGES for name in re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", page.read_text())}
    assert named
    for name in named:
        path, _, function = name.partition("::")
        assert (ROOT / path).exists(), name
        assert not function or f"\ndef {function}(" in (ROOT / path).read_text(), name


def test_the_one_yaml_block_is_the_task_that_lm_eval_runs():
    # tests/apps/test_lm_eval.py::test_the_task_of_the_page_runs
    (block,) = blocks("yaml")
    assert block.id.startswith("use-")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A directory that looks like a clone, with a user's text in it."""
    directory = tmp_path_factory.mktemp("clone")
    for name in ("train.py", "configs", "benchmarks", "Makefile", "pyproject.toml", "constraints.txt"):
        (directory / name).symlink_to(ROOT / name)
    (directory / "my_text.txt").write_text("A line of a user's own text, again and again.\n" * 400)
    reviews = [
        f'{{"text": "A film {i} that I {word}.", "label": "{word}"}}' for i in range(20) for word in ("love", "hate")
    ]
    (directory / "reviews.jsonl").write_text("\n".join(reviews))
    (directory / "others.csv").write_text("text,label\nA film that I love.,love\n")
    (directory / "new.csv").write_text("id,text\n7,A film that I saw.\n")
    for language, phrase in (("en", "a dog number {}"), ("de", "ein Hund Nummer {}")):
        (directory / f"train.{language}").write_text("".join(phrase.format(i) + "\n" for i in range(40)))
    return directory


@pytest.mark.parametrize("code", [*blocks("python")])
def test_python_block(code, clone, monkeypatch):
    monkeypatch.chdir(clone)
    exec(compile(code, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("code", [*blocks("sh")])
def test_shell_block(code, clone, monkeypatch):
    monkeypatch.chdir(clone)
    monkeypatch.setenv("TFDS_DATA_DIR", str(clone / "prepared"))
    for line in code.splitlines():
        command = line.split("#")[0].strip()
        if command:
            check(shlex.split(command), clone)


def check(words, clone):
    """Run a line: training at tiny size, make as a dry run, installation by checking the extra's name.

    The commands of the package run in this process, unless the line sets variables or starts another program.
    """
    given = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        given[name] = value
    if words[0] in ("git", "cd", "source") or words[1:3] == ["-m", "venv"]:
        return
    if "pip" in words:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (extra,) = re.findall(r"\[([\w-]+)\]", words[-1]) or ["dev"]
        assert extra in extras
        return
    if words[0] == "make":
        subprocess.run([words[0], "--dry-run", *words[1:]], cwd=clone, check=True, stdout=subprocess.DEVNULL)
        return
    if words[:3] == ["transformer", "generate", "runs/python_stdlib"]:  # the run of `make train`: six minutes
        OPTIONS[words[1]].parse(words[2:])
        return
    if words[:2] == ["python", "train.py"]:
        words = ["transformer", "train", *words[2:]]
    if words[:2] == ["transformer", "train"]:
        # The default job reads a whole standard library; the user's text stands in for it.
        words += TINY if "--data.source" in words else [*TINY, "--data.source", "my_text.txt"]
    if words[0] == "transformer" and not given:
        main(words[1:])
        return
    started = {"transformer": ["-m", "transformer"], "python": []}
    assert words[0] in started, f"cannot check {words}"
    result = subprocess.run(
        [sys.executable, *started[words[0]], *words[1:]],
        cwd=clone,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", **given},
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
