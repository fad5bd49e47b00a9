"""One run at a time in a directory, and a lock that ends with its holder."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from transformer.runs import lock
from transformer.runs.lock import LOCK_FILE, locked
from transformer.types import UserError

HOLDER = """
import sys, time
from transformer.runs.lock import locked
with locked(sys.argv[1], print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_start_says_who_is_at_work_and_leaves_everything(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with locked(tmp_path, pytest.fail):
        held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        who = rf"in use by process {os.getpid()} on {socket.gethostname()}, since \d{{4}}-\d\d-\d\d"
        with pytest.raises(UserError, match=who), locked(tmp_path, pytest.fail):
            pytest.fail("held twice")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held
    assert os.listdir(tmp_path) == ["config.json"]
    with locked(tmp_path, pytest.fail):
        pass


def test_a_directory_that_stays_empty_is_removed_with_its_parents(tmp_path):
    with locked(tmp_path / "runs" / "a", pytest.fail):
        assert (tmp_path / "runs" / "a" / LOCK_FILE).exists()
    assert os.listdir(tmp_path) == []
    with locked(tmp_path / "runs" / "a", pytest.fail):
        (tmp_path / "runs" / "a" / "file").write_text("")
    assert os.listdir(tmp_path / "runs" / "a") == ["file"]


def test_a_killed_holder_holds_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=f"in use by process {holder.pid} on "), locked(tmp_path, pytest.fail):
                pytest.fail("held twice")
        finally:
            holder.send_signal(signal.SIGKILL)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == holder.pid
    with locked(tmp_path, pytest.fail):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["process"] == os.getpid()


def test_the_file_of_a_holder_that_left_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Opened before its holder removed it: whoever locked that one would lock nothing."""
    flock, removed = fcntl.flock, []

    def late(descriptor, operation):
        if not removed:
            (tmp_path / LOCK_FILE).unlink()
            removed.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with locked(tmp_path, pytest.fail), pytest.raises(UserError, match="in use by"), locked(tmp_path, pytest.fail):
        pytest.fail("held twice")
    assert removed


@pytest.mark.parametrize(
    "number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get
)
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", none)
    said = []
    with locked(tmp_path, said.append):
        assert len(said) == 1
    assert "keeps no locks between hosts" in said[0]


def test_a_bucket_is_said():
    said = []
    with locked("gs://bucket/run", said.append):
        assert "A bucket has no locks" in said[0]


@pytest.mark.parametrize(
    ("mounts", "reaches"),
    [
        ("/dev/sda / ext4 rw 0 0", True),
        ("host:/x / nfs4 rw,vers=4.2,local_lock=none 0 0", True),
        ("host:/x / nfs rw,nolock 0 0", False),
        ("host:/x / nfs rw,local_lock=all 0 0", False),
        ("host:/x / nfs rw,local_lock=flock 0 0", False),
        ("mgs:/x / lustre rw,flock 0 0", True),
        ("mgs:/x / lustre rw,localflock 0 0", False),
        ("mgs:/x / lustre rw,noflock 0 0", False),
        ("host:/x / fuse.sshfs rw 0 0", False),
        ("host:/x / fuse.sshfs rw 0 0\n/dev/sda {directory} ext4 rw 0 0", True),
        ("/dev/sda / ext4 rw 0 0\nhost:/x {directory} nfs nolock 0 0\n/dev/sdb {directory} xfs rw 0 0", True),
        ("/dev/sda / ext4 rw 0 0\nhost:/x {directory}/other nfs nolock 0 0", True),
    ],
)
def test_what_mounts_say_of_their_locks(tmp_path, monkeypatch, mounts, reaches):
    text = mounts.format(directory=tmp_path)
    read = pathlib.Path.read_text
    monkeypatch.setattr(
        pathlib.Path,
        "read_text",
        lambda path, *rest: text if str(path) == "/proc/self/mounts" else read(path, *rest),
    )
    assert lock._reaches_other_hosts(tmp_path) == reaches


def test_a_directory_that_cannot_be_made_is_a_short_error(tmp_path):
    (tmp_path / "file").write_text("")
    told = pytest.raises(UserError, match="could not be written: a part of its path is a file")
    with told, locked(tmp_path / "file" / "run", pytest.fail):
        pytest.fail("held")
