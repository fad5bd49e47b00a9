"""A run of two processes: the rows of one process, and a checkpoint that one process reads."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from transformer.config import TrainingConfig
from transformer.training.checkpoint import Checkpointer
from transformer.training.loop import train
from transformer.training.writers import JsonlWriter, read_jsonl

CONFTEST = pathlib.Path(__file__).parent / "conftest.py"
PROGRAM = """
import importlib.util, sys
import jax

conftest, directory, port, process, steps = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
spec = importlib.util.spec_from_file_location("toy", conftest)
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)

from transformer.config import TrainingConfig
from transformer.training.checkpoint import Checkpointer
from transformer.training.loop import train
from transformer.training.writers import JsonlWriter


class Batches(toy.Batches):
    def __next__(self):
        rows = slice(4 * int(process), 4 * int(process) + 4)
        return jax.tree.map(lambda x: x[rows], super().__next__())

    def get_state(self):
        return {"count": self.count, "streams": {process: self.count}}


runner, make_state = toy.make_runner(devices=0, dropout=0.0)
checkpointer = Checkpointer(directory + "/checkpoints")
writers = [JsonlWriter(directory + "/metrics.jsonl")] if jax.process_index() == 0 else []
config = TrainingConfig(steps=int(steps), log_every=2, checkpoint_every=3)
train(make_state(), config=config, runner=runner, batches=Batches(), checkpointer=checkpointer,
      writers=writers)
checkpointer.close()
"""


def run_two_processes(directory, steps):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(CONFTEST.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(CONFTEST), str(directory), str(port), str(process), str(steps)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def run_here(toy, directory, steps):
    """The same run in this process."""
    runner, make_state = toy.runner(devices=1, dropout=0.0)
    batches = toy.Batches()
    with contextlib.closing(Checkpointer(directory / "checkpoints")) as checkpointer:
        state = train(
            make_state(),
            config=TrainingConfig(steps=steps, log_every=2, checkpoint_every=3),
            runner=runner,
            batches=batches,
            checkpointer=checkpointer,
            writers=[JsonlWriter(directory / "metrics.jsonl")],
        )
    return state, batches


def test_two_processes_are_one_run(toy, tmp_path):
    run_two_processes(tmp_path / "two", steps=4)
    run_here(toy, tmp_path / "one", steps=6)
    # One process goes on where two stopped.
    state, batches = run_here(toy, tmp_path / "two", steps=6)
    assert int(state.step) == 6
    assert batches.count == 6
    one, two = read_jsonl(tmp_path / "one" / "metrics.jsonl"), read_jsonl(tmp_path / "two" / "metrics.jsonl")
    assert [row["step"] for row in two] == [2, 4, 6]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["accuracy"] == b["accuracy"]
