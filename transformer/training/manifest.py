"""A list of a directory's files with their SHA-256, so that damage is found and named."""

import hashlib
import os

from etils import epath

from transformer.storage import is_file, is_local, write_whole

NAME = "MANIFEST.sha256"
_CHUNK = 1 << 20


class DamagedError(Exception):
    """Files of a directory are not what its manifest says; the message names them."""


def write_manifest(directory: epath.Path) -> None:
    """List every file in `directory`; the list appears all at once, when it is complete and they have reached the disk.

    The first line is the checksum of the rest, which is in the format of `sha256sum`.
    """
    files = files_below(directory)
    text = "".join(f"{_checksum(files[name], sync=True)}  {name}\n" for name in sorted(files))
    write_whole(directory / NAME, hashlib.sha256(text.encode()).hexdigest() + "\n" + text)


def verify_manifest(directory: epath.Path, *, only: tuple[str, ...] = ("",)) -> None:
    """Compare the files with the manifest.

    Args:
        directory: that has one.
        only: files whose path begins so; by default all.

    Raises:
        DamagedError: a file is missing, changed or not in the list, or the manifest itself is damaged.
    """
    checksum, _, text = (directory / NAME).read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise DamagedError(f"{NAME} is damaged")
    lines = (line.partition("  ") for line in text.decode(errors="replace").splitlines())
    expected = {name: digest for digest, _, name in lines if name.startswith(only)}
    files = {name: path for name, path in files_below(directory).items() if name.startswith(only)}
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(files))]
    problems += [f"{name} was added" for name in sorted(set(files) - set(expected))]
    problems += [
        f"{name} is damaged" for name in sorted(set(files) & set(expected)) if _checksum(files[name]) != expected[name]
    ]
    if problems:
        raise DamagedError(", ".join(problems))


def files_below(directory: epath.Path) -> dict[str, epath.Path]:
    """Every file below `directory` but the manifest, by its path from there.

    Raises:
        DamagedError: there is a link to a folder, which may lead back or anywhere, or what is neither file nor folder.
    """
    files: dict[str, epath.Path] = {}
    for path in directory.iterdir():
        if path.is_dir():
            if is_local(path) and os.path.islink(path):
                raise DamagedError(f"{path.name} is a link to a folder, which is not followed")
            files |= {f"{path.name}/{name}": file for name, file in files_below(path).items()}
        elif not is_file(path):
            raise DamagedError(f"{path.name} is neither a file nor a folder")
        elif path.name != NAME:
            files[path.name] = path
    return files


def _checksum(path: epath.Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if sync and is_local(path):
            os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
