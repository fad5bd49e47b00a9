"""Base class of experiment trackers, and their registry."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformer.kinds import Family, Kind

if TYPE_CHECKING:
    from transformer.training.writers import Writer

TRACKERS = Family(
    "tracker",
    {
        "wandb": "transformer.training.trackers.wandb",
        "mlflow": "transformer.training.trackers.mlflow",
    },
    field="training.trackers",
)


class Tracker(Kind):
    """Where rows of metrics go besides the run's directory.

    A custom tracker derives from this class, has a name (`kind`), is made known by `TRACKERS.register`, and must bring `open`.
    """

    family = TRACKERS

    def check(self) -> None:
        """Raise UserError if rows cannot be sent, such as without a package. Process 0 calls it before it reads the data."""

    def open(self, workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> "Writer":
        """A writer (`training.writers.Writer`), made in process 0 when training begins.

        Args:
            workdir: directory of the run.
            config: of the run, as JSON has it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define open().")
