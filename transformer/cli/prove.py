"""`transformer prove`: train a small model through a kill, a damaged checkpoint and a change of devices; compare the results."""

import email
import functools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from transformer.cli.options import Given, ProveOptions
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.optimizers.adamw import AdamW
from transformer.runs.compare import compare, read_outcome
from transformer.runs.directory import CHECKPOINTS
from transformer.schedules.constant import ConstantSchedule
from transformer.storage import expand
from transformer.training.folders import committed_steps
from transformer.types import UserError
from transformer.validation import require

STEPS, LOG_EVERY, SAVE_EVERY = 160, 3, 20
TOLERANCE = 1e-5
"""Largest difference of parameters between numbers of devices, which add in different orders."""


def get_config() -> Config:
    """The config of the runs; this file is their config file. A large epsilon of Adam keeps rounding differences small."""
    block = BlockConfig(AttentionConfig(num_heads=2, dropout=0.1))
    return Config(
        model=ModelConfig(num_layers=2, embed_dim=64, dropout=0.1, pattern=(block,)),
        data=DataConfig(source=("text",), data_dir="prepared", sequence_length=64, batch_size=8, record_bytes=2048),
        optimizer=AdamW(schedule=ConstantSchedule(), accumulate_steps=2, eps=1e-2, ema_decay=0.9),
        training=TrainingConfig(
            steps=STEPS,
            log_every=LOG_EVERY,  # a row is begun before a checkpoint and written after it
            eval_every=50,
            checkpoint_every=SAVE_EVERY,
            keep_checkpoints=3,
            sample_length=0,
        ),
    )


class Trial(NamedTuple):
    """The events of the runs in a directory."""

    killed_at: int
    """Last step with a metric row at the kill."""
    saved_at: int
    """Newest checkpoint at the kill."""
    damaged: str
    """File of that checkpoint with a flipped bit."""


def main(options: ProveOptions, given: Given) -> None:
    """Make the runs and print their comparison; exit with 1 if one differs."""
    del given
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="transformer-prove-") as temporary:
        directory = pathlib.Path(expand(options.keep or temporary)).absolute()
        require(not options.keep or not directory.exists(), f"--keep must be a new directory, {directory} exists.")
        text, equal = judge(directory, make_runs(directory))
    print(f"\n{text}\n\n{'Proven' if equal else 'NOT EQUAL'} in {time.monotonic() - start:.0f} s.")
    sys.exit(0 if equal else 1)


def make_runs(directory: pathlib.Path, steps: int = STEPS) -> Trial:
    """Train the runs `undisturbed`, `killed`, `damaged` and `devices` in `directory`, each with its output in `NAME.log`."""
    (directory / "text").mkdir(parents=True)
    for path in sorted(pathlib.Path(email.__file__).parent.glob("*.py")):
        shutil.copy(path, directory / "text" / f"{path.stem}.txt")
    chance, say = random.Random(), functools.partial(print, file=sys.stderr, flush=True)
    say(f"1/4  train {steps} steps, undisturbed")
    finish(directory, "undisturbed", steps)
    say("2/4  the same, killed with SIGKILL at a random moment, then started again")
    kill(directory, "killed", steps, after=chance.uniform(2 * SAVE_EVERY + 5, steps - 15))
    for name in ("damaged", "devices"):
        shutil.copytree(directory / "killed", directory / name)
    killed_at = read_outcome(directory / "killed").rows[-1]["step"]
    saved_at = max(committed_steps(directory / "killed" / CHECKPOINTS))
    finish(directory, "killed", steps)
    damaged = flip_a_bit(directory / "damaged" / CHECKPOINTS / str(saved_at), chance)
    say("3/4  the killed run again, a bit of its newest checkpoint flipped")
    finish(directory, "damaged", steps)
    say("4/4  the killed run again, on two devices")
    finish(directory, "devices", steps, "--parallel.fsdp", "2", devices=2)
    return Trial(killed_at, saved_at, damaged)


def judge(directory: pathlib.Path, trial: Trial) -> tuple[str, bool]:
    """The comparison of the runs as text of at most 80 columns, and whether all are equal."""
    reference = read_outcome(directory / "undisturbed")
    total = 8 * sum(x.nbytes for x in reference.arrays.values())
    lines = [
        f"{'run':<32}{'step':>6}{'bits that differ':>20}{'rows':>11}{'':>6}",
        f"{'undisturbed':<32}{reference.step:>6}{f'of {total:,}':>20}{f'of {len(reference.rows)}':>11}",
    ]
    named = f"{trial.damaged} is damaged" in (directory / "damaged.log").read_text()
    all_equal = True
    for name, title in (
        ("killed", f"killed at step {trial.killed_at}, resumed"),
        ("damaged", f"checkpoint {trial.saved_at} damaged"),
        ("devices", "resumed on two devices"),
    ):
        found = read_outcome(directory / name)
        difference = compare(found, reference)
        equal = found.step == reference.step
        if name == "devices":
            equal &= difference.largest <= TOLERANCE
            bits, rows = f"at most {difference.largest:.0e} *", ""
        else:
            equal &= difference.bits == difference.rows == 0 and (name != "damaged" or named)
            bits, rows = f"{difference.bits:,}", str(difference.rows)
        lines.append(f"{title:<32}{found.step:>6}{bits:>20}{rows:>11}{'ok' if equal else 'FAIL':>6}")
        all_equal &= equal
    lines += [
        "\nBits: of parameters, optimizer state and random key. Rows: timings left out.",
        f"* Two devices add in another order; parameters may differ by {TOLERANCE:.0e}.",
        f"The damaged file was {'found, and the previous checkpoint used' if named else 'NOT FOUND'}:",
        f"  {trial.damaged}",
    ]
    return "\n".join(line.rstrip() for line in lines), all_equal


def start(directory: pathlib.Path, name: str, steps: int, *options: str, devices: int = 1) -> subprocess.Popen[bytes]:
    """Start `transformer train` in a new process with this many CPU devices."""
    run = ["train", __file__, "--workdir", name, "--training.steps", str(steps), *options]
    package = str(pathlib.Path(__file__).parents[2])
    environment = os.environ | {
        "COLUMNS": "1000",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    with (directory / f"{name}.log").open("a") as log:
        command = [sys.executable, "-m", "transformer", *run]
        return subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(directory: pathlib.Path, name: str, steps: int, *options: str, devices: int = 1) -> None:
    """Train a run to its end."""
    status = start(directory, name, steps, *options, devices=devices).wait()
    end = (directory / f"{name}.log").read_text()[-2000:]
    require(status == 0, f"Training must end with status 0, {name} ended with {status}:\n{end}")


def kill(directory: pathlib.Path, name: str, steps: int, *, after: float) -> None:
    """Kill a run with at least two checkpoints after so many steps (the fraction gives a moment within a step)."""
    process = start(directory, name, steps)
    metrics, mark = directory / name / "metrics.jsonl", f'"step": {int(after) // LOG_EVERY * LOG_EVERY},'
    while process.poll() is None and not (
        metrics.exists() and mark in metrics.read_text() and len(committed_steps(directory / name / CHECKPOINTS)) > 1
    ):
        time.sleep(0.005)
    time.sleep(after % 1 / 20)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        end = (directory / f"{name}.log").read_text()[-2000:]
        raise UserError(f"A run to kill must still be training at step {after:.0f}, it had ended:\n{end}")


def flip_a_bit(checkpoint: pathlib.Path, chance: random.Random) -> str:
    """Flip one random bit of a checkpoint; returns the path of its file within the checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    (path,) = chance.choices(files, weights=[file.stat().st_size for file in files])
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return path.relative_to(checkpoint).as_posix()
