"""A run that is stopped does not report success, wherever the signal comes; a run that ends says what it reached."""

import os
import signal
import subprocess
import sys

import pytest

from transformer.cli.main import COMMANDS, main
from transformer.cli.options import OPTIONS
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.parallel.distributed import leaving
from transformer.runs import train as runs_train
from transformer.runs.train import Reached, train
from transformer.training.folders import committed_steps
from transformer.training.metrics import TIMINGS
from transformer.training.signals import SIGNALS
from transformer.training.writers import read_jsonl
from transformer.types import Interrupted


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a run that takes no time."""
    directory = tmp_path_factory.mktemp("interrupted")
    (directory / "text.txt").write_text("".join(f"Line {i} of a text.\n" for i in range(400)))
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(
            source=(str(directory / "text.txt"),), data_dir=str(directory / "data"), sequence_length=16, batch_size=8
        ),
        training=TrainingConfig(steps=3, log_every=1, eval_every=0, checkpoint_every=2, sample_length=0),
        workdir=str(directory / "run"),
    )


def kill(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("quick", "compiled_once", "obeyed")
def test_each_moment_of_a_run(config, tmp_path, monkeypatch, capsys, number):
    """While it is built, between two steps, while the run is scored at its end; at the command line and from Python."""
    workdir = tmp_path / "run"

    def command():
        train(config_at(config, workdir), hooks=[lambda step, *_: step == 2 and kill(number)])

    def main_exits():
        with pytest.raises(SystemExit) as exit_info:
            main(["train"])
        assert exit_info.value.code == 128 + number
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"{signal.Signals(number).name}: stopped") and "Traceback" not in message
        return message

    without_arguments("train", command, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(runs_train, "make_run", lambda *_, **__: kill(number))
        assert "stopped at once. No step was saved yet. The same command continues the run" in main_exits()
    assert not workdir.exists()
    assert "stopped at step 2 of 3 and saved" in main_exits()
    assert committed_steps(workdir / "checkpoints") == [2]
    with monkeypatch.context() as patch:
        patch.setattr(runs_train, "compressed_bits_per_byte", lambda _: kill(number))
        assert "stopped at once. Step 3 of 3 is saved." in main_exits()


def without_arguments(name, command, monkeypatch):
    """A command that needs no arguments and does something else."""
    monkeypatch.setitem(OPTIONS, name, OPTIONS[name]._replace(parse=lambda _: ()))
    monkeypatch.setattr(f"transformer.cli.{name}.main", command)


def config_at(config, workdir):
    return Config(**{**vars(config), "workdir": str(workdir)})


@pytest.fixture
def obeyed(number):
    """A suite in the background, or under nohup, is started with signals ignored, and a run leaves it at that."""
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    signal.signal(number, before)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(runs_train, "peak_flops", lambda *_: 0.0)


@pytest.mark.usefixtures("quick", "compiled_once")
def test_a_run_says_what_it_reached(config):
    """When it trains, and when it is finished already."""
    reached = train(config)
    last = read_jsonl(f"{config.workdir}/metrics.jsonl")[-1]
    metrics = {name: value for name, value in last.items() if name not in ("step", "split", *TIMINGS)}
    assert reached == Reached(config.workdir, 3, metrics)
    assert "loss" in reached.metrics
    assert train(config) == reached


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_of_every_command_is_a_line(name, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    without_arguments(name, interrupt, monkeypatch)
    with pytest.raises(SystemExit) as exit_info:
        main([name])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "SIGINT: stopped.\n"


@pytest.mark.parametrize("agreed", [True, False])
def test_of_several_processes_one_that_stops_alone_leaves_at_once(agreed, monkeypatch, capsys):
    """When all stop together they leave in order: the first to go would be missed by the others."""
    left = []
    monkeypatch.setattr("transformer.parallel.distributed.os._exit", left.append)
    try:
        with leaving():
            raise Interrupted(signal.SIGTERM, "stopped.", agreed=agreed)
    except Interrupted:
        left.append("in order")
    assert left == (["in order"] if agreed else [143])
    assert capsys.readouterr().err == ("" if agreed else "SIGTERM: stopped.\n")


def test_ctrl_c_while_a_command_is_imported_is_a_line():
    """Seconds of imports come after the command line is ready for an interrupt."""
    program = """
import builtins, sys
import transformer.cli.main as command_line
assert not {"jax", "tensorflow_datasets", "numpy"} & set(sys.modules)
real = builtins.__import__
def interrupted(name, *rest):
    if name == "jax":
        raise KeyboardInterrupt
    return real(name, *rest)
builtins.__import__ = interrupted
command_line.main(["train", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "SIGINT: stopped.\n")
