"""A list of a directory's files with their SHA-256, so that damage is found and named."""

import hashlib

from etils import epath

NAME = "MANIFEST.sha256"
_CHUNK = 1 << 20


class DamagedError(Exception):
    """Files of a directory are not what its manifest says; the message names them."""


def write_manifest(directory: epath.Path) -> None:
    """List every file in `directory`; the list appears all at once, when it is complete.

    The first line is the checksum of the rest, which is in the format of `sha256sum`.
    """
    files = _files(directory)
    text = "".join(f"{_checksum(files[name])}  {name}\n" for name in sorted(files))
    aside = directory / f"{NAME}.tmp"
    aside.write_text(hashlib.sha256(text.encode()).hexdigest() + "\n" + text)
    aside.replace(directory / NAME)


def verify_manifest(directory: epath.Path) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedError: a file is missing, changed or not in the list, or the manifest itself is damaged.
    """
    checksum, _, text = (directory / NAME).read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != checksum:
        raise DamagedError(f"{NAME} is damaged")
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in text.decode().splitlines())}
    files = _files(directory)
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(files))]
    problems += [f"{name} was added" for name in sorted(set(files) - set(expected))]
    problems += [
        f"{name} is damaged" for name in sorted(set(files) & set(expected)) if _checksum(files[name]) != expected[name]
    ]
    if problems:
        raise DamagedError(", ".join(problems))


def _files(directory: epath.Path) -> dict[str, epath.Path]:
    """Every file below `directory` but the manifest, by its path from there."""
    files: dict[str, epath.Path] = {}
    for path in directory.iterdir():
        if path.is_dir():
            files |= {f"{path.name}/{name}": file for name, file in _files(path).items()}
        elif path.name != NAME:
            files[path.name] = path
    return files


def _checksum(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
