"""A manifest tells a whole checkpoint from a damaged one."""

import os
import pathlib
import subprocess

import pytest
from etils import epath

from transformer.training.manifest import NAME, DamagedError, verify_manifest, write_manifest

FILES = {"a": b"first", "empty": b"", "deep/er/b c": bytes(range(256)) * 40}


@pytest.fixture
def directory(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(epath.Path(tmp_path))
    return tmp_path


def verify(directory):
    verify_manifest(epath.Path(directory))


def test_intact_is_accepted(directory):
    verify(directory)
    verify(directory)


def test_every_bit_of_the_manifest_counts(directory):
    """Whichever is flipped, the manifest is named and not an innocent file."""
    path = directory / NAME
    good = path.read_bytes()
    for position in range(0, len(good) * 8, 7):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bytes(bad))
        with pytest.raises(DamagedError, match=rf"^{NAME} is damaged$"):
            verify(directory)


@pytest.mark.parametrize("name", [NAME, *FILES])
def test_truncated_file_is_named(directory, name):
    content = (directory / name).read_bytes()
    for size in {0, len(content) // 2, max(len(content) - 1, 0)} - {len(content)}:
        (directory / name).write_bytes(content[:size])
        with pytest.raises(DamagedError, match=rf"^{name} is damaged$"):
            verify(directory)


@pytest.mark.parametrize("name", ["a", "deep/er/b c"])
def test_flipped_bit_is_named(directory, name):
    content = bytearray((directory / name).read_bytes())
    content[-1] ^= 16
    (directory / name).write_bytes(bytes(content))
    with pytest.raises(DamagedError, match=rf"^{name} is damaged$"):
        verify(directory)


def test_all_problems_are_named(directory):
    (directory / "a").unlink()
    (directory / "empty").write_bytes(b"x")
    (directory / "deep" / "new").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"^a is missing, deep/new was added, empty is damaged$"):
        verify(directory)


def test_is_in_the_format_of_sha256sum(directory):
    """After its first line, so that anyone can check a checkpoint without us."""
    text = (directory / NAME).read_text().split("\n", 1)[1]
    done = subprocess.run(["sha256sum", "-c"], input=text.encode(), cwd=directory, capture_output=True, check=False)
    assert done.returncode == 0, done


def test_nothing_is_left_aside(directory):
    assert sorted(p.name for p in pathlib.Path(directory).iterdir()) == sorted([NAME, "a", "deep", "empty"])


def test_some_of_the_files_can_be_compared(directory):
    (directory / "a").write_bytes(b"changed")
    verify_manifest(epath.Path(directory), only=("deep/", "empty"))
    (directory / "deep" / "new").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"^deep/new was added$"):
        verify_manifest(epath.Path(directory), only=("deep/", "empty"))


@pytest.mark.parametrize("target", [".", "..", "/", "elsewhere"])
@pytest.mark.parametrize("where", ["", "deep/"])
def test_links_to_folders_are_damage_and_are_not_followed(directory, tmp_path_factory, target, where):
    """With two links to the folder itself, a walk that follows them has 2^n paths of length n."""
    if target == "elsewhere":
        target = tmp_path_factory.mktemp("elsewhere")
    for name in "xy":
        (directory / where / name).symlink_to(target)
    with pytest.raises(DamagedError, match=r"^[xy] is a link to a folder, which is not followed$"):
        verify(directory)


def test_what_is_no_file_is_damage_and_is_not_opened(directory):
    os.mkfifo(directory / "pipe")
    with pytest.raises(DamagedError, match=r"^pipe is neither a file nor a folder$"):
        verify(directory)
    (directory / "pipe").unlink()
    (directory / "a").rename(directory / "b")
    (directory / "a").symlink_to("nowhere")
    with pytest.raises(DamagedError, match=r"^a is neither a file nor a folder$"):
        verify(directory)


def test_a_link_to_a_file_is_a_file(directory, tmp_path_factory):
    """As caches have them that keep one copy of a file."""
    (directory / "a").rename(tmp_path_factory.mktemp("cache") / "blob")
    (directory / "a").symlink_to(tmp_path_factory.getbasetemp() / "cache0" / "blob")
    verify(directory)


def test_a_bit_far_into_a_large_file_counts(directory):
    """Files are read a mebibyte at a time."""
    content = bytearray(2 * 2**20 + 5)
    (directory / "large").write_bytes(content)
    write_manifest(epath.Path(directory))
    for position in (2**20, len(content) - 1):
        (directory / "large").write_bytes(content[:position] + b"\x01" + content[position + 1 :])
        with pytest.raises(DamagedError, match=r"^large is damaged$"):
            verify(directory)
