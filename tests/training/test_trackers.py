"""Trackers: each row once and in one run of theirs, however often training is killed; nothing goes over a network offline."""

import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
import socket
import struct
import zlib

import pytest

from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.runs.train import train
from transformer.tracker import TRACKERS, Tracker
from transformer.training.metrics import without_timings
from transformer.training.trackers.remote import RemoteWriter
from transformer.training.writers import read_jsonl
from transformer.types import UserError


class Accident(Exception):
    pass


def die_at(step):
    def die(now, state, statistics):
        if now == step:
            raise Accident

    return die


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("It was a bright cold day in April.\n" * 60)
    block = BlockConfig(AttentionConfig(num_heads=1))
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(block,)),
        data=DataConfig(
            source=(str(tmp_path / "text.txt"),), sequence_length=16, batch_size=8, data_dir=str(tmp_path / "data")
        ),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=8, log_every=1, eval_every=4, checkpoint_every=3, sample_length=0),
        workdir=str(tmp_path / "run"),
    )


def tracked(config, *names):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, trackers=names))


def train_with_kills(config):
    """Killed before the first checkpoint, and between two."""
    for step in (2, 5):
        with pytest.raises(Accident):
            train(config, hooks=[die_at(step)])
    train(config)
    return [without_timings(row) for row in read_jsonl(f"{config.workdir}/metrics.jsonl")]


SENT = []


@TRACKERS.register
@dataclasses.dataclass(frozen=True)
class ListTracker(Tracker):
    """Keeps what it is sent."""

    kind = "test_list"

    def open(self, workdir, config):
        return ListWriter(workdir, config)


class ListWriter(RemoteWriter):
    name = "test_list"

    def begin(self, run_id):
        SENT.append(("begin", run_id))
        return run_id or "its own id"

    def send(self, step, split, metrics):
        if metrics["loss"] < 0:
            raise ConnectionError("the network is gone")
        SENT.append((step, split, metrics["loss"]))

    def end(self):
        SENT.append(("end",))


def test_each_row_is_sent_once_whatever_is_killed(config):
    SENT.clear()
    rows = train_with_kills(tracked(config, "test_list"))
    sent = [entry for entry in SENT if isinstance(entry[0], int)]
    assert sent == [(row["step"], row["split"], row["loss"]) for row in rows] and len(sent) == 10
    assert [entry for entry in SENT if entry[0] == "begin"] == [
        ("begin", ""),
        ("begin", "its own id"),
        ("begin", "its own id"),
    ]
    assert SENT[-1] == ("end",)


def test_a_run_may_be_given_a_tracker_later(config):
    SENT.clear()
    with pytest.raises(Accident):
        train(config, hooks=[die_at(5)])
    train(tracked(config, "test_list"))
    assert [entry[0] for entry in SENT if isinstance(entry[0], int)] == [4, 4, 5, 6, 7, 8, 8]


def test_a_tracker_that_fails_is_left_alone(tmp_path, capsys):
    SENT.clear()
    writer = ListWriter(tmp_path, {})
    writer.resume(0)
    for step, loss in ((1, 1.0), (2, -1.0), (3, 1.0)):
        writer.write(step, "train", {"loss": loss})
    writer.close()
    assert SENT == [("begin", ""), (1, "train", 1.0)]
    assert "the network is gone" in capsys.readouterr().err
    assert json.loads((tmp_path / "tracker-test_list.json").read_text())["sent"] == {"train": 1}


def test_a_damaged_record_begins_a_new_run(tmp_path):
    (tmp_path / "tracker-test_list.json").write_text('{"id": "x", "se')
    SENT.clear()
    ListWriter(tmp_path, {}).resume(3)
    assert SENT == [("begin", "")]


def test_the_tracker_that_the_documentation_shows(config, tmp_path):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "trackers.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {"__name__": "block"})
    rows = train_with_kills(tracked(config, "csv"))
    lines = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    found = [(int(step), split, float(value)) for step, split, name, value in lines if name == "loss"]
    assert found == [(row["step"], row["split"], row["loss"]) for row in rows]


def test_names():
    with pytest.raises(
        UserError, match=r"training.trackers must be one of wandb, mlflow.*got 'wnadb'; did you mean wandb"
    ):
        TrainingConfig(trackers=("wnadb",))


def test_a_package_that_is_not_there(config, monkeypatch, tmp_path):
    """It is missed before the data is read and before a file is written."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *of: None if name == "wandb" else find(name, *of))
    with pytest.raises(UserError, match=r'trackers=wandb needs the package wandb; .* pip install -e "\.\[wandb\]"'):
        train(tracked(config, "wandb"))
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.fixture
def no_network(monkeypatch):
    """Connections to other machines are an error; helper processes of a tracker answer on this one."""
    connect = socket.socket.connect

    def local(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.mark.filterwarnings("default")
def test_mlflow(config, tmp_path, monkeypatch, no_network):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed; the extra is mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    rows = train_with_kills(tracked(config, "mlflow"))
    client = mlflow.tracking.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["model.embed_dim"] == "8"
    for split in ("train", "validation"):
        history = client.get_metric_history(run.info.run_id, f"{split}/loss")
        found = sorted((metric.step, metric.value) for metric in history)
        assert found == [(row["step"], row["loss"]) for row in rows if row["split"] == split]


def records(path):
    """The records of a .wandb file: LevelDB's log format, with blocks of 32 KiB and a header of seven bytes."""
    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        checksum, length, kind = struct.unpack("<IHB", content[at : at + 7])
        data = content[at + 7 : at + 7 + length]
        assert checksum == zlib.crc32(data, zlib.crc32(bytes([kind])))
        parts, at = parts + data, at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.filterwarnings("default")
def test_wandb(config, tmp_path, monkeypatch, no_network):
    pytest.importorskip("wandb", reason="wandb is not installed; the extra is wandb")
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for name, value in (("MODE", "offline"), ("PROJECT", "mine"), ("CACHE_DIR", tmp_path), ("CONFIG_DIR", tmp_path)):
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    rows = train_with_kills(tracked(config, "wandb"))
    found, ids = [], set()
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    for path in files:
        for content in records(path):
            record = messages.Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.project))
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if name.endswith("/loss"):
                    found.append((record.history.step.num, name, json.loads(item.value_json)))
    assert len(ids) == 1 and next(iter(ids))[1] == "mine" and len(files) == 3
    assert sorted(found) == sorted((row["step"], f"{row['split']}/loss", row["loss"]) for row in rows)
