"""A list of a directory's files with their SHA-256 checksums, which finds and names damaged files."""

import hashlib
import os

from etils import epath

from transformer.storage import is_file, is_local, write_whole

NAME = "MANIFEST.sha256"
_CHUNK = 1 << 20


class DamagedError(Exception):
    """Files of a directory do not match its manifest; the message names them."""


def write_manifest(directory: epath.Path) -> None:
    """List every file in `directory`; the list appears atomically, after it is complete and the files have reached the disk.

    The first line is the checksum of the following lines, which have the format of `sha256sum`.
    """
    files = files_below(directory)
    text = "".join(f"{_checksum(files[name], sync=True)}  {name}\n" for name in sorted(files))
    write_whole(directory / NAME, hashlib.sha256(text.encode()).hexdigest() + "\n" + text)


def verify_manifest(directory: epath.Path, *, only: tuple[str, ...] = ("",)) -> None:
    """Compare the files with the manifest.

    Args:
        directory: a directory with a manifest.
        only: path prefixes of the files to compare; by default all files.

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
    """Every file below `directory`, except the manifest, by its relative path.

    Raises:
        DamagedError: there is a link to a folder, which may form a cycle or lead elsewhere, or something other than files and
            folders.
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
