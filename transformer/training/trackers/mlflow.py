"""Rows of metrics for MLflow: a server, or its files."""

import dataclasses
import os
import time
from typing import Any

from transformer.config_io import leaves
from transformer.storage import is_local, resolved
from transformer.tracker import TRACKERS
from transformer.training.trackers.remote import RemoteTracker, RemoteWriter
from transformer.training.writers import Metrics

_MOST_PARAMS = 100  # of one call


class MlflowWriter(RemoteWriter):
    """A run of MLflow, with an id that the run's directory keeps."""

    name = "mlflow"
    _client: Any = None
    _run = ""

    def begin(self, run_id: str) -> str:
        """The run, with the settings as its parameters."""
        uri = os.environ.get("MLFLOW_TRACKING_URI") or resolved("mlruns").as_uri()
        if is_local(uri) or uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # from version 3 on it is refused otherwise
        from mlflow.entities import Metric, Param  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

        self._metric, self._client = Metric, MlflowClient(tracking_uri=uri)
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
            self._run = run_id
            return run_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "transformer")
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run = self._client.create_run(place, run_name=self.workdir.name).info.run_id
        params = [Param(path, str(value)[:500]) for path, value in leaves(dict(self.config))]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + _MOST_PARAMS])
        return self._run

    def send(self, step: int, split: str, metrics: Metrics) -> None:
        """Metrics named `split/metric`."""
        now = int(1000 * time.time())
        self._client.log_batch(
            self._run, metrics=[self._metric(f"{split}/{name}", value, now, step) for name, value in metrics.items()]
        )

    def end(self) -> None:
        """Finished, or killed before the last step."""
        done = self._sent.get("train", 0) >= self.config["training"]["steps"]
        self._client.set_terminated(self._run, status="FINISHED" if done else "KILLED")


@TRACKERS.register
@dataclasses.dataclass(frozen=True)
class MlflowTracker(RemoteTracker):
    """MLflow; its own environment variables choose the server or folder (by default `mlruns` here) and the experiment."""

    kind = "mlflow"
    writer = MlflowWriter
