"""The files of a run's directory besides arrays, and the checks before a run continues there.

Each checkpoint has the record of its run (config, tokenizer, class names, corpus) under its own manifest. The files with the
same names at the top of the directory are copies for human readers.
"""

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from etils import epath

from transformer.config import Config
from transformer.config_io import CONFIG_FILE, IMPORT_FILE, from_json, resume_conflicts, to_dict
from transformer.data.batches import ids_alone
from transformer.data.datasets import Dataset, describe_data
from transformer.data.prepare import data_directory
from transformer.data.tokenizers import Tokenizer, load_tokenizer
from transformer.runs.lock import LOCK_FILE
from transformer.storage import ASIDE, expand, understood, write_whole
from transformer.training import folders
from transformer.training.checkpoint import DESCRIPTION, find_checkpoint, read_description
from transformer.training.manifest import files_below
from transformer.training.patience import Patience
from transformer.types import UserError
from transformer.validation import Settings, require, shown

CHECKPOINTS = "checkpoints"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.txt"
SCORES_FILE = "scores.jsonl"  # results of `transformer evaluate`, one per line
CLASSES_FILE = "classes.json"  # class names of a classifier
GIVEN_FILE = "given.json"  # objects passed to `train` besides the config, by their qualified names; never imported
FAMILY_FILE = (
    "family.json"  # content of an export of an imported model besides arrays; inherited by runs that start from it
)
BASE_FILE = "base.json"  # for adapters: the checkpoint that they were trained on, by checksum
DATA_FILE = "data.json"  # the corpus and its splits; only in checkpoints
RECORD_FILE = "run.json"
"""The file of a checkpoint with the record, name -> text of each file. (Orbax takes every folder there for arrays.)"""

T = TypeVar("T")


_NAME = re.compile(r"([a-z_]+/)?[a-z_]+\.json")
"""The syntax of a file name in a record. It becomes a path, and a run may come from anybody."""


@dataclasses.dataclass(frozen=True)
class Corpus(Settings):
    """A source of a run's data, as in `describe_data`."""

    name: str
    fingerprint: str
    splits: dict[str, Annotated[int, 63]]
    """The number of documents or examples by split."""


class Record(NamedTuple):
    """The description of a run in its checkpoint."""

    path: epath.Path
    """The path of the checkpoint."""
    step: int
    config: Config
    """The config as given: vocab_size and max_length are not resolved."""
    class_names: tuple[str, ...]
    """The classes of a classifier; empty for other runs."""
    data: tuple[Corpus, ...]
    """The result of `describe_data`."""
    files: dict[str, bytes]
    """All files of the record, name -> content."""
    evaluations: Patience
    """The evaluations since the lowest validation loss."""
    given: dict[str, str]
    """The objects passed to `train` instead of parts of the config: the name of each, by its argument."""

    def load_tokenizer(self) -> Tokenizer:
        """Load the run's tokenizer; for a run on user-supplied batches, only a vocabulary."""
        require(
            "tokenizer" not in self.given,
            f"A tokenizer that was given to train is not kept with the run, {self.path.parent.parent} was made with "
            f"{self.given.get('tokenizer')}; give the same again (tokenizer=...).",
        )
        if "data" in self.given:
            return ids_alone(self.config)
        with tempfile.TemporaryDirectory() as directory:
            for name, content in self.files.items():
                path = epath.Path(directory) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
            with understood(f"The tokenizer in {self.path / RECORD_FILE}"):
                return load_tokenizer(directory, self.config.data.tokenizer)


# ---- Read ------------------------------------------------------------------------------------------------------------


def read_run(workdir: epath.PathLike, read: Callable[[Record], T], step: int | str = "latest") -> T:
    """The result of `read` for a checkpoint. If an active run removes the checkpoint meanwhile, the next one is read.

    Args:
        workdir: the run's directory.
        read: a function of a record.
        step: the step of the checkpoint (`find_checkpoint`): a number, `best` or `latest`.

    Raises:
        UserError: there is no run, no undamaged or no such checkpoint, or one of another format.
    """
    directory = epath.Path(expand(workdir))
    while True:
        path = find_checkpoint(directory / CHECKPOINTS, step)
        if path is None:
            raise UserError(
                f"A run to load must have a checkpoint, there is none in {directory / CHECKPOINTS}; train it first, or copy all "
                "its files."
            )
        try:
            return read(_read_record(path))
        except Exception:
            if path.exists():
                raise


def _read_record(path: epath.Path) -> Record:
    description = read_description(path)
    stored = path / RECORD_FILE
    require(stored.exists(), f"A run's checkpoint must hold {RECORD_FILE}, {path} does not.")
    with understood(f"{stored}"):
        texts: dict[str, str] = from_json(dict[str, str], stored.read_bytes(), stored)
        files = {name: text.encode() for name, text in texts.items()}
        strange = [name for name in files if not _NAME.fullmatch(name)]
        require(not strange, f"{stored} must hold files of a run, got {shown(strange[:1])}.")
        classes = from_json(tuple[str, ...], files.get(CLASSES_FILE, b"[]"), f"{stored}: {CLASSES_FILE}")
        config = from_json(Config, files[CONFIG_FILE], f"{stored}: {CONFIG_FILE}")
        evaluations = Patience(description["loop"]["evaluations"])
        data = from_json(tuple[Corpus, ...], files[DATA_FILE], f"{stored}: {DATA_FILE}")
        given = from_json(dict[str, str], files.get(GIVEN_FILE, b"{}"), f"{stored}: {GIVEN_FILE}")
    return Record(path, description["step"], config, classes, data, files, evaluations, given)


# ---- Continue --------------------------------------------------------------------------------------------------------


def open_new_workdir(config: Config, report: folders.Report) -> None:
    """`open_workdir` for an import, which creates a run and continues none.

    Raises:
        UserError: the directory holds a run, or other files.
    """
    require(
        not folders.committed_steps(epath.Path(config.workdir) / CHECKPOINTS),
        f"An import makes a new directory, {config.workdir} holds a run; choose another --workdir, or remove it.",
    )
    open_workdir(config, report)


def open_workdir(config: Config, report: folders.Report) -> Record | None:
    """The record of the latest checkpoint in `config.workdir`; None if the run is new. Nothing is written.

    Raises:
        UserError: the directory belongs to another run, lacks files of a run, or holds other files.
    """
    workdir = epath.Path(config.workdir)
    require(config.workdir != "", "A run needs a directory; set workdir.")
    require(not workdir.exists() or workdir.is_dir(), f"A run directory must be a folder, {workdir} is a file.")
    checkpoints = workdir / CHECKPOINTS
    folders.require_plain(checkpoints)
    # Read the names before looking for the mark: process 0 may be starting here, and writes the mark first.
    names = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
    steps = folders.committed_steps(checkpoints)
    if not steps:
        folders.require_whole(checkpoints, 0)
        if folders.never_saved(checkpoints):
            _compare_config(workdir, config)
        else:
            _require_empty(workdir, names, config)
        return None
    # A continued run compares all files when it restores; a finished one would not.
    only = ("",) if steps[-1] >= config.training.steps else (DESCRIPTION, RECORD_FILE)
    path = folders.latest_undamaged(checkpoints, report, only=only)
    assert path is not None
    record = _read_record(path)
    require(
        IMPORT_FILE not in record.files,
        f"An imported model is not trained on in its own directory, {workdir} is one; start a run from it in another, with "
        f"training.init_from={workdir}.",
    )
    conflicts = resume_conflicts(record.config, to_dict(config))
    require(
        not conflicts,
        f"A run continues with the config it began with; {workdir} differs in\n  "
        + "\n  ".join(conflicts)
        + "\nUndo that, or choose another workdir.",
    )
    folders.require_whole(checkpoints, record.step)
    _compare_copies(workdir, record)
    return record


def _require_empty(workdir: epath.Path, names: set[str], config: Config) -> None:
    """Refuse a directory with files that a first start does not leave."""
    prepared = data_directory(config.data)
    names = names - {LOCK_FILE, *(prepared.relative_to(workdir).parts[:1] if prepared.is_relative_to(workdir) else ())}
    if names == {CHECKPOINTS} and all(path.name.endswith(ASIDE) for path in (workdir / CHECKPOINTS).iterdir()):
        return
    require(
        not names & {CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, CHECKPOINTS},
        f"A run directory must be new or hold a run with a checkpoint; {workdir} holds {', '.join(sorted(names))}, but no whole "
        "checkpoint: it may be a copy that lacks files. Nothing was changed. Copy the run again with all its files, or choose "
        "another workdir.",
    )
    require(
        not names, f"A run directory must be new or hold a run, {workdir} holds other files; choose another workdir."
    )


def _parsed(path: epath.Path) -> Any:
    """The JSON of a file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _compare_config(workdir: epath.Path, expected: Config) -> None:
    copy = _parsed(workdir / CONFIG_FILE)
    conflicts = resume_conflicts(expected, copy) if isinstance(copy, dict) else []
    require(
        not conflicts,
        f"{workdir / CONFIG_FILE} must be the config of the run in that directory, but differs (run -> file) in\n  "
        + "\n  ".join(conflicts)
        + "\nPut it back; or remove the file, and it is written again; or choose another workdir.",
    )


def _compare_copies(workdir: epath.Path, record: Record) -> None:
    """Refuse an intact copy that differs from the record; a missing or damaged one will be written again."""
    _compare_config(workdir, record.config)
    for name, content in record.files.items():
        path = workdir / name
        copy = _parsed(path) if name not in (CONFIG_FILE, DATA_FILE) else None
        require(
            copy is None or copy == json.loads(content),
            f"{path} must be as the checkpoint {record.path} has it, but differs; put it back, or remove it, and it is written "
            "anew.",
        )


def compare_data(record: Record, data: Dataset, *, remedy: str) -> None:
    """Refuse data other than the run's: other texts, labels or splits, regardless of names and paths.

    Raises:
        UserError: the data differ; the message has the differences and the remedy.
    """
    found = [Corpus(**source) for source in describe_data(data)]
    lines = [
        f"{was.name}: {_sizes(was)} -> {now.name}: {_sizes(now)}"
        + (", of other content" if was.splits == now.splits else "")
        for was, now in zip(record.data, found, strict=False)
        if was.fingerprint != now.fingerprint
    ]
    if len(found) != len(record.data):
        lines.append(f"{len(record.data)} sources -> {len(found)}")
    require(
        not lines,
        "The data must be what the run was trained on, but its content or its split has changed\n  "
        + "\n  ".join(lines)
        + f"\n{remedy}",
    )
    require(
        data.class_names == record.class_names,
        f"The classes of {' and '.join(source.name for source in found)} must equal the classes of {record.path.parent.parent}, "
        f"{', '.join(record.class_names)}, in that order, got {', '.join(data.class_names)}; prepare it with these labels.",
    )


def _sizes(source: Corpus) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in source.splits.items())


# ---- Write -----------------------------------------------------------------------------------------------------------


def make_record(
    config: Config,
    tokenizer: Tokenizer,
    data: Dataset,
    old: Record | None,
    given: dict[str, str],
    kept: Mapping[str, bytes] = {},
) -> dict[str, bytes]:
    """The files of a run's record, name -> content; unchanging files come from `old`, or from `kept` for a new run."""
    files: dict[str, bytes] = dict(old.files) if old else dict(kept)
    if not old:
        with tempfile.TemporaryDirectory() as directory:
            if "tokenizer" not in given:
                tokenizer.save(directory)
            files |= {name: f.read_bytes() for name, f in files_below(epath.Path(directory)).items()}
        if data.class_names:
            files[CLASSES_FILE] = json.dumps(data.class_names).encode()
        if given:
            files[GIVEN_FILE] = json.dumps(given).encode()
    files[CONFIG_FILE] = json.dumps(to_dict(config), indent=2).encode()
    files[DATA_FILE] = json.dumps(describe_data(data), indent=2).encode()
    return files


def stored_record(files: dict[str, bytes]) -> dict[str, bytes]:
    """A record as the single file of a checkpoint."""
    return {RECORD_FILE: json.dumps({name: content.decode() for name, content in files.items()}, indent=1).encode()}


def write_copies(workdir: epath.Path, files: dict[str, bytes], *, begun: bool) -> None:
    """Write the copies at the top that are missing, damaged or of another config; remove remains of a kill.

    Args:
        workdir: the run's directory; no other run may be active in it.
        files: the files of the record.
        begun: the run has a checkpoint; otherwise the directory is first marked as a run without one.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if not begun:
        folders.begin(workdir / CHECKPOINTS)
    copies = {name: content for name, content in files.items() if name != DATA_FILE}
    for name in (*copies, METRICS_FILE, SAMPLES_FILE):
        (workdir / f"{name}{ASIDE}").unlink(missing_ok=True)
    for name, content in copies.items():
        if _parsed(workdir / name) != json.loads(content):
            (workdir / name).parent.mkdir(exist_ok=True)
            write_whole(workdir / name, content)
