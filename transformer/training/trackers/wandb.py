"""Rows of metrics for Weights & Biases, over its network or into its files (`WANDB_MODE=offline`)."""

import dataclasses
import os
import secrets
from typing import Any

from transformer.storage import is_local
from transformer.tracker import TRACKERS
from transformer.training.trackers.remote import RemoteTracker, RemoteWriter
from transformer.training.writers import Metrics


class WandbWriter(RemoteWriter):
    """A run of Weights & Biases, with an id that the run's directory keeps."""

    name = "wandb"
    _run: Any = None

    def begin(self, run_id: str) -> str:
        """`wandb.init`; without statistics of the machine, the console, code and git."""
        import wandb  # noqa: PLC0415

        quiet: dict[str, Any] = {"console": "off", "silent": True, "disable_git": True, "disable_code": True}
        quiet |= {"x_disable_stats": True, "x_disable_meta": True, "save_code": False}
        run_id = run_id or secrets.token_hex(4)
        self._run = wandb.init(  # pyright: ignore[reportAttributeAccessIssue]
            project=os.environ.get("WANDB_PROJECT", "transformer"),
            name=os.environ.get("WANDB_NAME", self.workdir.name),
            id=run_id,
            resume="allow",
            config=dict(self.config),
            dir=os.environ.get("WANDB_DIR") or (os.fspath(self.workdir) if is_local(self.workdir) else None),
            settings=wandb.Settings(**quiet),  # pyright: ignore[reportAttributeAccessIssue]
        )
        return run_id

    def send(self, step: int, split: str, metrics: Metrics) -> None:
        """Metrics named `split/metric`."""
        self._run.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def end(self) -> None:
        """Write or send the remaining rows."""
        self._run.finish()


@TRACKERS.register
@dataclasses.dataclass(frozen=True)
class WandbTracker(RemoteTracker):
    """Weights & Biases; its own environment variables choose project, entity, name and mode."""

    kind = "wandb"
    writer = WandbWriter
