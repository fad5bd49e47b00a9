"""A run killed with SIGKILL again and again ends with the bits of a run that was never disturbed."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from transformer.config import Config, ParallelConfig
from transformer.config_io import from_dict
from transformer.data.tokenizers import load_tokenizer
from transformer.runs.recipe import make_run
from transformer.training.checkpoint import Checkpointer
from transformer.training.metrics import TIMINGS

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 120
CONFIG = f"""
import dataclasses
from transformer.config import Config, DataConfig, OptimizerConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig

def get_config():
    return Config(
        model=ModelConfig(
            num_layers=1, embed_dim=16, dropout=0.1, pattern=(BlockConfig(AttentionConfig(num_heads=2, dropout=0.1)),)
        ),
        data=DataConfig(sequence_length=32, batch_size=8, record_bytes=512),
        optimizer=OptimizerConfig(accumulate_steps=2, warmup_steps=5, ema_decay=0.9),
        training=TrainingConfig(
            steps={STEPS}, log_every=7, eval_every=50, checkpoint_every=9, keep_checkpoints=3, sample_length=0
        ),
    )
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Builds the command line and environment of a tiny run: packing, dropout and accumulation are on."""
    directory = tmp_path_factory.mktemp("resume")
    words = random.Random(0)
    (directory / "text").mkdir()
    for index in range(60):
        text = " ".join(
            words.choice(("to", "be", "or", "not", "that", "question")) for _ in range(words.randint(5, 90))
        )
        (directory / "text" / f"{index}.txt").write_text(text)
    (directory / "config.py").write_text(CONFIG)
    environment = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled")}

    def make(name):
        workdir = directory / name
        arguments = ["config.py", "--data.source", "text", "--data.data-dir", "prepared", "--workdir", str(workdir)]
        return workdir, {
            "args": [sys.executable, str(ROOT / "train.py"), *arguments],
            "cwd": directory,
            "env": environment | {"PYTHONPATH": str(ROOT)},
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }

    return make


def finish(options):
    result = subprocess.run(**options, timeout=300, check=False)
    assert result.returncode == 0, result.stdout
    return result.stdout


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def final_arrays(workdir):
    """Every array of the last checkpoint by its path: parameters, their average, optimizer state, key."""
    config = from_dict(Config, json.loads((workdir / "config.json").read_text()))
    data = dataclasses.replace(
        config.data, source=(str(workdir.parent / "text"),), data_dir=str(workdir.parent / "prepared")
    )
    config = dataclasses.replace(config, data=data, parallel=ParallelConfig(data=1))
    target = make_run(config, tokenizer=load_tokenizer(workdir)).state
    restored = Checkpointer(workdir / "checkpoints").restore(target)
    assert restored.step == STEPS
    state = restored.state._replace(key=jax.random.key_data(restored.state.key))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture(scope="module")
def undisturbed(command):
    workdir, options = command("undisturbed")
    finish(options)
    return workdir


def wait_for(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.002)


def assert_same_run(workdir, undisturbed):
    assert rows(workdir) == rows(undisturbed)
    found, expected = final_arrays(workdir), final_arrays(undisturbed)
    assert found.keys() == expected.keys()
    assert len(found) > 40
    different = [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    assert not different


def test_killed_run_ends_with_the_same_bits(command, undisturbed):
    workdir, options = command("killed")
    chance = random.Random(time.time_ns())
    metrics, kills = workdir / "metrics.jsonl", 0
    for share in (0.2, 0.5, 0.8):
        target = int(share * STEPS) + chance.randint(-10, 10)
        process = subprocess.Popen(**options)

        def reached(target=target):
            return metrics.exists() and f'"step": {target // 7 * 7},' in metrics.read_text()

        wait_for(reached, process)
        time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills >= 2, "the run was over before it could be killed"
    finish(options)
    assert_same_run(workdir, undisturbed)
    assert "is finished" in finish(options)


def test_terminated_run_saves_and_goes_on(command, undisturbed):
    workdir, options = command("terminated")
    process = subprocess.Popen(**options)
    wait_for(lambda: (workdir / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "SIGTERM: stopped at step" in output and "Traceback" not in output
    finish(options)
    assert_same_run(workdir, undisturbed)


def test_other_config_is_refused_without_a_traceback(command, undisturbed):
    _, options = command("undisturbed")
    options["args"] += ["--model.attention.num-heads", "4"]
    result = subprocess.run(**options, timeout=300, check=False)
    assert result.returncode == 2
    assert "model.pattern.0.attention.num_heads: 2 -> 4" in result.stdout
    assert "Traceback" not in result.stdout
