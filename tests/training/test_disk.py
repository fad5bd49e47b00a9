"""A disk that is full, read-only or gone at any file of a run: a short error, and a run that goes on to the same bits."""

import contextlib
import errno
import gc
import os
import re
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from transformer.config import TrainingConfig
from transformer.storage import WriteError, explain
from transformer.training import folders, manifest
from transformer.training.checkpoint import Checkpointer
from transformer.training.loop import train
from transformer.training.metrics import TIMINGS
from transformer.training.writers import JsonlWriter, TensorBoardWriter, read_jsonl

# Orbax leaves tasks behind in a save that fails, of which Python tells when it collects them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* never awaited"
)
STEPS = 3
CHANGES = {"open", "os.mkdir", "os.rename"}


# ruff: noqa: SIM117 (what fails stands out in a `with` of its own)


class Faults:
    """Python's changes to files below a directory, by event and name without numbers; from one of them on, all fail."""

    def __init__(self):
        self.directory, self.changes, self.first, self.number = "", [], 0, 0

    def __call__(self, event, arguments):
        if not self.directory or event not in CHANGES or not str(arguments[0]).startswith(self.directory):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        name = re.sub(r"\.\d[\w.]*", "", str(arguments[0]).removeprefix(self.directory))
        self.changes.append((event, re.sub(r"\d+", "N", name)))
        if self.first and len(self.changes) >= self.first:
            raise OSError(self.number, os.strerror(self.number), str(arguments[0]))

    @contextlib.contextmanager
    def within(self, directory, first=0, number=errno.ENOSPC):
        self.directory, self.changes, self.first, self.number = str(directory), [], first, number
        try:
            yield self
        finally:
            self.directory = ""


FAULTS = Faults()


@pytest.fixture(scope="module")
def faults():
    if not hasattr(FAULTS, "hooked"):
        sys.addaudithook(FAULTS)  # which stays, and does nothing outside `within`
        FAULTS.hooked = True
    return FAULTS


def run(toy, directory):
    settle()
    runner, make_state = toy.runner(steps=STEPS)
    with contextlib.closing(Checkpointer(directory / "checkpoints", report=lambda _: None)) as checkpointer:
        return train(
            make_state(),
            config=TrainingConfig(steps=STEPS, log_every=2, checkpoint_every=2),
            runner=runner,
            batches=toy.Batches(),
            checkpointer=checkpointer,
            writers=[JsonlWriter(directory / "metrics.jsonl"), TensorBoardWriter(directory / "tensorboard")],
        )


def settle():
    """Orbax's threads of a save that failed go on for a moment, in a process that does not end; they write still."""
    for thread in threading.enumerate():
        if "orbax" in type(thread).__module__ or thread.name.startswith("asyncio"):
            threading.Thread.join(thread, 10)  # its own raises what went wrong


@pytest.fixture(autouse=True)
def collect():
    yield
    settle()
    gc.collect()


def rows(directory):
    found = read_jsonl(directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in found]


def assert_whole(toy, directory, expected):
    state, expected_rows = expected
    again = run(toy, directory)
    for a, b in zip(
        *(jax.tree.leaves(s._replace(key=jax.random.key_data(s.key))) for s in (again, state)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert rows(directory) == expected_rows


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory, faults):
    """The last state, the rows, and what Python changes on the way there."""
    directory = tmp_path_factory.mktemp("undisturbed")
    with faults.within(directory) as counted:
        state = run(toy, directory)
    return (state, rows(directory)), counted.changes


def moments(changes):
    """The place of one change of each kind, from 1: in turn the first of its kind, in the first save, and the last."""
    kinds = dict.fromkeys(changes)
    firsts = {kind: number for number, kind in reversed([*enumerate(changes, 1)])}
    lasts = {kind: number for number, kind in enumerate(changes, 1)}
    return sorted((firsts, lasts)[index % 2][kind] for index, kind in enumerate(kinds))


@pytest.mark.parametrize(
    "choose", [moments, pytest.param(lambda c: range(1, len(c) + 1), marks=pytest.mark.exhaustive)]
)
def test_every_write_may_be_the_one_that_fails(toy, tmp_path, faults, undisturbed, choose):
    """One of each kind in turn, and all after it, as on a full disk; the causes take turns."""
    expected, changes = undisturbed
    assert len(moments(changes)) > 20
    causes = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT]
    for first in choose(changes):
        directory, number = tmp_path / str(first), causes[first % len(causes)]
        cause = str(explain(OSError(number, ""), "x")).split(": ")[1].split(".")[0]
        with faults.within(directory, first, number), pytest.raises(WriteError) as error:
            run(toy, directory)
        assert cause in str(error.value) and str(directory) in str(error.value), first
        assert_whole(toy, directory, expected)
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file system of one megabyte."""
    directory = tmp_path_factory.mktemp("small")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(directory, free):
    """Leave so many bytes."""
    usage = os.statvfs(directory)
    with (directory / "filler").open("wb") as file:
        file.write(b"x" * max(0, usage.f_bavail * usage.f_bsize - free))


def test_a_disk_that_is_really_full_at_any_moment(toy, small, undisturbed):
    """TensorStore's own writes too, which Python does not see: less and less room, until nothing fits."""
    expected, _ = undisturbed
    ended = []
    for pages in (200, 32, 22, 16, 9, 4, 1, 0):
        directory = small / str(pages)
        fill(small, pages * 4096)
        try:
            run(toy, directory)
            ended.append("well")
        except WriteError as error:
            ended.append("full")
            assert "the disk is full" in str(error), error  # noqa: PT017
        (small / "filler").unlink()
        assert_whole(toy, directory, expected)
        shutil.rmtree(directory)
    assert set(ended) == {"well", "full"}, ended


def test_a_directory_that_is_gone(toy, tmp_path, undisturbed):
    directory = tmp_path / "run"
    runner, make_state = toy.runner(steps=STEPS)

    def remove(step, state, statistics):
        if step == 3:
            checkpointer.wait()
            directory.rename(tmp_path / "elsewhere")

    with contextlib.closing(Checkpointer(directory / "checkpoints")) as checkpointer:
        with pytest.raises(WriteError, match=r"metrics.jsonl could not be written: the folder is gone"):
            train(
                make_state(),
                config=TrainingConfig(steps=STEPS, log_every=2, checkpoint_every=2),
                runner=runner,
                batches=toy.Batches(),
                checkpointer=checkpointer,
                writers=[JsonlWriter(directory / "metrics.jsonl")],
                hooks=[remove],
            )
    assert_whole(toy, tmp_path / "elsewhere", undisturbed[0])


def test_a_save_that_fails_in_the_background_is_noticed_at_the_next_step(toy, tmp_path, monkeypatch):
    """Not at the next save only, of which there may be none for hours."""

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    seen = []

    def hook(step, state, statistics):
        seen.append(step)
        if step == 3:
            checkpointer._pending.exception()  # it has ended

    monkeypatch.setattr(manifest, "write_manifest", full)
    runner, make_state = toy.runner(steps=STEPS)
    with contextlib.closing(Checkpointer(tmp_path / "checkpoints")) as checkpointer:
        with pytest.raises(WriteError, match=r"Checkpoint .*/2 could not be written: the disk is full"):
            train(
                make_state(),
                config=TrainingConfig(steps=100, checkpoint_every=2, eval_every=0),
                runner=runner,
                batches=toy.Batches(),
                checkpointer=checkpointer,
                hooks=[hook],
            )
    assert seen == [1, 2, 3]
    assert folders.committed_steps(tmp_path / "checkpoints") == []
