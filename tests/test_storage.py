"""Paths of users, whole files, and failed writes that say why."""

import errno
import os
import pathlib
import stat

import pytest

import transformer
from transformer.storage import _CAUSES, ASIDE, expand, explain, explained, resolved, write_whole
from transformer.training.folders import absolute
from transformer.types import UserError


@pytest.mark.parametrize(
    ("path", "expected"),
    [("~", "/home/u"), ("~/a b", "/home/u/a b"), ("a/~/b", "a/~/b"), ("gs://b/~", "gs://b/~"), ("/x", "/x")],
)
def test_home_is_expanded_where_a_shell_would(path, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    assert expand(path) == expected


def test_an_address_in_a_bucket_is_no_path_below_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for make in (resolved, absolute):
        assert os.fspath(make("gs://bucket/run")) == "gs://bucket/run"
        assert os.fspath(make("a/../b")) == str(tmp_path / "b")
    package = pathlib.Path(transformer.__file__).parent
    others = [path for path in package.rglob("*.py") if ".resolve()" in path.read_text() and path.name != "storage.py"]
    assert others == []  # epath's own takes an address for a relative path


@pytest.mark.parametrize("path", ["", " ", "\t\n"])
def test_an_empty_path_is_not_the_current_folder(path):
    with pytest.raises(UserError, match=r"must not be empty, got .*the current folder is called '\.'"):
        expand(path)


@pytest.mark.parametrize("content", ["ä\n", b"\x00\xff", ""])
def test_a_file_is_replaced_whole_and_nothing_stays_beside(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("before")
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    path.write_text("before")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_kill_left_aside_does_not_hinder(tmp_path):
    (tmp_path / f"file{ASIDE}").write_text("half")
    write_whole(tmp_path / "file", "whole")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", _CAUSES, ids=errno.errorcode.get)
def test_every_cause_is_named_with_path_and_remedy(number):
    cause, remedy = _CAUSES[number]
    text = str(explain(OSError(number, os.strerror(number), "runs/a/metrics.jsonl"), "A row"))
    assert text == (
        f"A row could not be written: {cause} (runs/a/metrics.jsonl). {remedy}, then start the same command again."
    )


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        # As TensorStore and Orbax raise it.
        (
            ValueError("RESOURCE_EXHAUSTED: Failed writing: \"/r/d\": No space left [os_error_code='28']"),
            "disk is full",
        ),
        (ValueError("Error opening: [OS error 30: EROFS Read-only file system]"), "read-only"),
        (OSError("a message alone"), "a message alone"),
        (OSError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
    ],
)
def test_other_forms_of_a_failed_write(error, cause):
    with pytest.raises(UserError, match=f"^Checkpoint 7 could not be written: .*{cause}"), explained("Checkpoint 7"):
        raise error
    with pytest.raises(UserError, match=cause), explained("Checkpoint 7"):
        raise RuntimeError("in the background") from error


@pytest.mark.parametrize("error", [ValueError("a defect"), KeyError("x"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as found, explained("A file"):
        raise error
    assert found.value is error


def test_an_error_for_the_user_is_not_reported_twice():
    error = UserError("Said already.")
    error.__cause__ = OSError(errno.ENOSPC, "full")
    with pytest.raises(UserError, match=r"^Said already\.$"), explained("A file"):
        raise error


def test_a_read_only_directory_is_reported(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="no permission to write"), explained("config.json"):
        write_whole(tmp_path / "config.json", "{}")


@pytest.mark.parametrize("path", ["a/\0", "a" * 256, "é" * 128, "a/" * 2048])
def test_a_path_that_no_system_could_have_is_refused(path):
    with pytest.raises(UserError, match="A path must be without NUL"):
        expand(path)
    assert expand("a" * 255 + "/b") == "a" * 255 + "/b"
