"""The files of a run's directory besides its checkpoints, and what it takes for a run to go on there."""

import json

from etils import epath

from transformer.config import Config
from transformer.config_io import from_dict, resume_conflicts, to_dict
from transformer.training.checkpoint import committed_steps
from transformer.types import UserError

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
CLASSES_FILE = "classes.json"  # their names, of a classifier


def check_workdir(config: Config) -> int:
    """The step up to which `config.workdir` holds a finished or interrupted run of this config; 0 for a new one.

    Raises:
        UserError: the directory is another run's, or holds something that is no run.
    """
    workdir = epath.Path(config.workdir)
    if not workdir.exists() or not any(workdir.iterdir()):
        return 0
    if not (workdir / CONFIG_FILE).exists():
        raise UserError(
            f"A run directory must be new or hold a run ({CONFIG_FILE}), {workdir} holds other files; choose another workdir."
        )
    conflicts = resume_conflicts(to_dict(read_config(workdir)), to_dict(config))
    if conflicts:
        raise UserError(
            f"A run goes on with the config it began with; {workdir} differs in\n  "
            + "\n  ".join(conflicts)
            + "\nUndo that, or choose another workdir."
        )
    return max(committed_steps(workdir / CHECKPOINTS), default=0)


def read_config(directory: epath.Path) -> Config:
    """The config of a run; a field that did not exist when it began has its default."""
    if not (directory / CONFIG_FILE).exists():
        raise UserError(f"A run directory must hold {CONFIG_FILE}, which training writes; {directory} does not.")
    return from_dict(Config, json.loads((directory / CONFIG_FILE).read_text()))


def read_class_names(directory: epath.Path) -> tuple[str, ...]:
    """The names of a classifier's classes; none for other runs."""
    classes = directory / CLASSES_FILE
    return tuple(json.loads(classes.read_text())) if classes.exists() else ()
