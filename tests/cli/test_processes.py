"""A run in several processes is the run of one; when one is killed the others end, and any number of them goes on."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from transformer.parallel.distributed import EXIT_CODE, leaving, several_processes
from transformer.training.folders import committed_steps
from transformer.training.writers import read_jsonl
from transformer.types import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = """
from transformer import AdamW, ConstantSchedule
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig


def get_config(variant=""):
    block = BlockConfig(AttentionConfig(num_heads=2))
    return Config(
        model=ModelConfig(num_layers=2, embed_dim=16, pattern=(block,), scan_layers=True),
        data=DataConfig(source=("text.txt",), sequence_length=32, batch_size=8, record_bytes=256),
        optimizer=AdamW(schedule=ConstantSchedule(), eps=1e-3),
        parallel=ParallelConfig(fsdp=2),
        training=TrainingConfig(steps=100_000, log_every=1, eval_every=0, checkpoint_every=4, sample_length=0),
    )
"""


def start(directory, workdir, processes, *arguments):
    """A run of four devices in so many processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
        "JAX_PLATFORMS": "cpu",
        "TFDS_DATA_DIR": str(directory / "datasets"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "transformer", "train", "config.py", "--workdir", workdir, *arguments]
    if processes > 1:
        command += ["--parallel.coordinator", f"localhost:{port}", "--parallel.num-processes", str(processes)]
    return [
        subprocess.Popen(
            [*command, *(["--parallel.process-id", str(process)] if processes > 1 else [])],
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]


def finish(processes):
    """What they print, all of them having ended well."""
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    text = "".join(f"Line {i} of a text that has {i * i} in it, and more.\n" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path


def losses(directory, workdir):
    rows = [row for row in read_jsonl(directory / workdir / "metrics.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def test_several_processes_are_one_run_that_survives_the_death_of_one(directory):
    # The dataset is prepared once, not by two processes at a time.
    finish(start(directory, "prepared", 1, "--training.steps", "1"))
    processes = start(directory, "run", 2)
    checkpoints, deadline = directory / "run" / "checkpoints", time.monotonic() + 200
    while max(committed_steps(checkpoints), default=0) < 20:
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    processes[1].communicate()
    output, _ = processes[0].communicate(timeout=90)
    assert time.monotonic() - killed < 60
    if processes[0].returncode == EXIT_CODE:
        assert re.search(r"process 0 of 2 cannot go on: .*\nIf another process is gone.*start all again", output)
    else:  # Killed while both closed a checkpoint: JAX hears of it first.
        assert processes[0].returncode == -signal.SIGABRT, output
        assert "This most likely indicates that another task died" in output

    done = max(committed_steps(checkpoints))
    quiet, loud = sorted(finish(start(directory, "run", 4, "--training.steps", str(done + 5)))[:2], key=len)
    assert f"continuing from step {done}" in loud
    assert "step" not in quiet, "only process 0 reports"
    finish(start(directory, "alone", 1, "--training.steps", str(done + 5)))
    found, expected = losses(directory, "run"), losses(directory, "alone")
    assert len(found) == done + 5
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[0] > found[-1] * 1.1

    # Another run starts from its parameters, cut over two processes, its layers looped.
    tune = ("--training.init-from", "run", "--training.steps", "2", "--model.no-scan-layers")
    finish(start(directory, "tuned", 2, *tune))
    finish(start(directory, "tuned_alone", 1, *tune))
    assert losses(directory, "tuned") == pytest.approx(losses(directory, "tuned_alone"), rel=1e-5)
    assert losses(directory, "tuned")[0] < found[0]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("A stream must hold text."), 2, "error: A stream must hold text.\n"),
        (
            jax.errors.JaxRuntimeError("Connection closed\nby peer"),
            EXIT_CODE,
            "cannot go on: Connection closed\nIf another",
        ),
        (OSError("No space left on device"), EXIT_CODE, "OSError: No space left on device"),
    ],
)
def test_a_process_that_fails_leaves_at_once(error, code, message, monkeypatch, capsys):
    left = []
    monkeypatch.setattr("transformer.parallel.distributed.os._exit", left.append)
    with leaving():
        raise error
    assert left == [code]
    assert message in capsys.readouterr().err
    with leaving():
        pass
    assert left == [code]


def test_a_missing_process_is_said_within_the_time_allowed(directory):
    first, second = start(directory, "run", 2, "--parallel.start-timeout", "5")
    second.kill()
    second.communicate()
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 2
    assert not (directory / "run").exists()
    assert re.search(
        r"must start within parallel.start_timeout=5 seconds; process 0 of 2 did not meet the others", output
    )
    assert "Traceback" not in output and "***" not in output


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
    ],
)
def test_the_environment_tells_of_several_processes(environment, expected):
    assert several_processes(environment) == expected
