"""The folders of a run's checkpoints: complete checkpoints, saves in progress, and folders that must stay untouched."""

import logging
from collections.abc import Callable

from etils import epath

from transformer.storage import is_local, resolved, sync_directory, write_whole
from transformer.training import manifest
from transformer.types import UserError
from transformer.validation import require

UNFINISHED = ".unfinished"
_NEVER_SAVED = "NO_CHECKPOINT_YET"
_ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
_log = logging.getLogger(__name__)

Report = Callable[[str], object]
"""Receives a sentence for the user."""


def absolute(directory: epath.PathLike) -> epath.Path:
    """The path as an absolute path, which Orbax requires."""
    return resolved(directory)


def require_plain(directory: epath.PathLike) -> None:
    """Refuse a path that Orbax would read as a glob pattern: it would silently save checkpoints without their arrays.

    Raises:
        UserError: the path contains one of `*?[`.
    """
    path = absolute(directory)
    require(
        not any(letter in str(path) for letter in "*?["),
        f"The path of a run must be without *, ? and [, which are patterns to Orbax, got {path}; choose another workdir.",
    )


# ---- Existing checkpoints ----------------------------------------------------------------------------------------------


def committed_steps(directory: epath.PathLike) -> list[int]:
    """Steps that have a manifest, ascending."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    require(directory.is_dir(), f"Checkpoints must be in a folder, {directory} is a file; move it away.")
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / manifest.NAME).exists())


def latest_undamaged(
    directory: epath.PathLike, report: Report = _log.warning, *, only: tuple[str, ...] = ("",)
) -> epath.Path | None:
    """The latest checkpoint that matches its manifest; None if there is no checkpoint at all.

    Args:
        directory: the folder of the checkpoints.
        report: called for each damaged one.
        only: path prefixes of the files to compare; by default all files.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    directory = absolute(directory)
    problems = []
    for step in reversed(committed_steps(directory)):
        path = directory / str(step)
        try:
            manifest.verify_manifest(path, only=only)
        except manifest.DamagedError as error:
            problems.append(f"Checkpoint {path}: {error}.")
            report(f"{problems[-1]} It is not used.")
        except FileNotFoundError:
            if path.exists():
                raise
            return latest_undamaged(
                directory, report, only=only
            )  # the run, which is still training, has just removed it
        else:
            return path
    if problems:
        raise UserError(
            f"At least one checkpoint must be undamaged. {' '.join(problems)} "
            "Put back a copy, or start afresh in another workdir."
        )
    return None


def never_saved(directory: epath.Path) -> bool:
    """Whether a run started here and never completed a save."""
    return (directory / _NEVER_SAVED).exists() and not committed_steps(directory)


def require_whole(directory: epath.Path, step: int) -> None:
    """Refuse to start from `step` if a later checkpoint folder has no manifest.

    A save gets its final name only when it is complete. Such a folder therefore never comes from a kill: it is part of a copy.

    Raises:
        UserError: there is such a folder.
    """
    if not directory.exists():
        return
    partial = [
        path
        for path in directory.iterdir()
        if path.name.isdigit() and int(path.name) > step and not (path / manifest.NAME).exists() and not _is_draft(path)
    ]
    if partial:
        raise UserError(
            f"A checkpoint must be whole, {', '.join(sorted(str(path) for path in partial))} has no {manifest.NAME}: this may "
            "be a copy of a run that lacks files. Nothing was changed. Copy the run again with all its files, or move that "
            f"folder away to start from {f'step {step}' if step else 'the beginning'}."
        )


# ---- A save ----------------------------------------------------------------------------------------------------------


def begin(directory: epath.Path) -> None:
    """Mark a new run's directory: until its first save is complete, it holds nothing to lose."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / _NEVER_SAVED, "No checkpoint has been saved yet: the next start begins again.\n")


def draft(directory: epath.Path, step: int) -> epath.Path:
    """The folder in which the checkpoint of `step` is written until `commit`; the same for every process.

    It is a temporary folder, to be renamed. In a bucket, a rename would copy every file. There the final folder is used, whose
    mark (`mark`) says that it is unfinished as long as it has no manifest.
    """
    return directory / (f"{step}{UNFINISHED}" if is_local(directory) else str(step))


def mark(directory: epath.Path, step: int) -> None:
    """For a save in the final folder, write the mark of an unfinished save before the first file."""
    if not is_local(directory):
        write_whole(directory / f"{step}{UNFINISHED}", "")


def commit(directory: epath.Path, step: int) -> None:
    """Turn a draft into a checkpoint, its manifest last."""
    manifest.write_manifest(draft(directory, step))
    if is_local(directory):
        (directory / f"{step}{UNFINISHED}").rename(directory / str(step))
        sync_directory(directory)
    else:
        (directory / f"{step}{UNFINISHED}").unlink()
    (directory / _NEVER_SAVED).unlink(missing_ok=True)


def discard(directory: epath.Path, step: int) -> None:
    """Remove a checkpoint; `clean` removes the remains of an interrupted removal."""
    mark(directory, step)
    aside = draft(directory, step)
    if is_local(directory):
        (directory / str(step)).rename(aside)
    (aside / manifest.NAME).unlink(missing_ok=True)
    aside.rmtree()
    (directory / f"{step}{UNFINISHED}").unlink(missing_ok=True)


def clean(directory: epath.Path, step: int, report: Report) -> None:
    """Remove or set aside everything that conflicts with a run that starts from `step`.

    Unfinished saves of a killed run are removed. A later checkpoint must be damaged, since it was not restored; it is renamed
    to `STEP.damaged`, because the run will reach that step again.

    Raises:
        UserError: a later folder may be part of a copied run (`require_whole`); nothing is removed then.
    """
    if not directory.exists():
        return
    require_whole(directory, step)
    for path in sorted(directory.iterdir()):
        number = path.name.removesuffix(_ORBAX_TEMPORARY).removesuffix(UNFINISHED)
        if not number.isdigit():
            continue
        if path.name != number:
            _remove_unfinished(path, directory / number, report)
        elif int(number) > step and (path / manifest.NAME).exists():
            path.rename(_free(directory / f"{number}.damaged"))
    if step > 0:
        (directory / _NEVER_SAVED).unlink(missing_ok=True)


def _remove_unfinished(path: epath.Path, final: epath.Path, report: Report) -> None:
    """Remove a draft in a temporary folder, or a mark and the draft in the final folder."""
    if path.is_dir():
        path.rmtree()
    else:
        if final.exists() and not (final / manifest.NAME).exists():
            final.rmtree()
        path.unlink()
    report(f"{path} was left by a save that an end of the run cut short. It is removed.")


def _is_draft(path: epath.Path) -> bool:
    """Whether the folder of a step has a mark."""
    return (path.parent / f"{path.name}{UNFINISHED}").exists()


def _free(path: epath.Path) -> epath.Path:
    """The path, or the first free one with a number appended."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.parent / f"{path.name}.{number}"
    return free
