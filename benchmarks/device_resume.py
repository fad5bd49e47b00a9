"""Runs by the command line: repeated, killed and resumed, and moved between the device and the CPU.

Each line compares two runs of `benchmarks/device_run.py` bit by bit (`transformer.runs.compare`): parameters, optimizer state,
random key and metrics. The first run compiles, and the others find its program in the cache of compiled programs, as users' runs
do. The exception is `recompiled`, which compiles again, and for which the compiler may choose other kernels. `deterministic`
runs have `XLA_FLAGS=--xla_gpu_deterministic_ops=true`. Runs that move between the CPU and the device may differ in rounding;
`largest` is then the largest difference of a parameter.
"""

import email
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from device_report import Report, Skip

from transformer.runs.compare import compare, read_outcome
from transformer.runs.directory import CHECKPOINTS
from transformer.training.folders import committed_steps

STEPS, KILL_FROM = 60, 15
DETERMINISTIC = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
ANEW = {"JAX_COMPILATION_CACHE_DIR": "of its own"}
"""Neither programs nor the compiler's measurements of kernels are found, which JAX keeps in one directory."""
CPU = {"JAX_PLATFORMS": "cpu"}


class Training(NamedTuple):
    """A run: commands in one directory, one after the other, as (steps, environment)."""

    commands: tuple[tuple[int, dict[str, str]], ...]
    killed: bool = False
    """Whether the first command is killed with SIGKILL during training."""


class Comparison(NamedTuple):
    """A line: a run and its reference."""

    run: str
    reference: str
    bits: bool = True
    """Whether the bits must be equal; otherwise the difference is only shown."""


TRAININGS = {
    "undisturbed": Training(((STEPS, {}),)),
    "repeated": Training(((STEPS, {}),)),
    "killed": Training(((STEPS, {}), (STEPS, {})), killed=True),
    "recompiled": Training(((STEPS, ANEW),)),
    "deterministic": Training(((STEPS, DETERMINISTIC),)),
    "deterministic repeated": Training(((STEPS, DETERMINISTIC),)),
    "deterministic killed": Training(((STEPS, DETERMINISTIC), (STEPS, DETERMINISTIC)), killed=True),
    "deterministic recompiled": Training(((STEPS, DETERMINISTIC | ANEW),)),
    "from cpu": Training(((STEPS // 2, CPU), (STEPS, {}))),
    "to cpu": Training(((STEPS // 2, {}), (STEPS, CPU))),
}
COMPARISONS = (
    Comparison("repeated", "undisturbed"),
    Comparison("killed", "undisturbed"),
    Comparison("deterministic repeated", "deterministic"),
    Comparison("deterministic killed", "deterministic"),
    Comparison("recompiled", "undisturbed"),
    Comparison("deterministic recompiled", "deterministic"),
    Comparison("deterministic", "undisturbed", bits=False),
    Comparison("from cpu", "undisturbed", bits=False),
    Comparison("to cpu", "undisturbed", bits=False),
)


def run(report: Report) -> None:
    """cuDNN's backward pass under the flag, then the runs, some side by side: nothing is timed."""
    for flags in ({}, DETERMINISTIC):
        name = "cudnn twice, deterministic" if flags else "cudnn twice"
        report.run(name, functools.partial(call_cudnn_twice, report, flags), needs=20)
    due = [c for c in COMPARISONS if report.is_due(c.run, needs=30)]
    folder = report.folder / "runs"
    shutil.rmtree(folder, ignore_errors=True)
    write_text(folder / "text")
    needed = [name for name in TRAININGS if any(name in c[:2] for c in due)]
    with ThreadPoolExecutor(2 if report.tiny else 4) as pool:
        jobs: dict[str, Future] = {}
        for name in needed:
            # Its reference first, whose program it is to find.
            first = next((c.reference for c in COMPARISONS if c.run == name and c.bits), None)
            jobs[name] = pool.submit(train, report, name, jobs.get(first) if first else None)
        for comparison in due:
            report.run(
                comparison.run, functools.partial(judge, report, jobs, comparison), reference=comparison.reference
            )


def write_text(folder: pathlib.Path) -> None:
    """A corpus that is on every machine: the sources of a package of the standard library."""
    folder.mkdir(parents=True)
    for path in sorted(pathlib.Path(email.__file__).parent.glob("*.py")):
        shutil.copy(path, folder / f"{path.stem}.txt")


def judge(report: Report, jobs: dict[str, Future], comparison: Comparison) -> dict[str, Any]:
    """The difference of a run's result from its reference."""
    notes = {name: jobs[name].result() for name in comparison[:2]}
    found, reference = (read_outcome(report.folder / "runs" / slug(name)) for name in comparison[:2])
    if not comparison.bits:  # a shorter run has evaluated at its end
        found, reference = (x._replace(rows=[r for r in x.rows if r["split"] == "train"]) for x in (found, reference))
    difference = compare(found, reference)
    same = difference.bits == 0 and difference.rows == 0 and found.step == reference.step
    losses = [outcome.rows[-1].get("loss") for outcome in (found, reference)]
    return {
        "same_bits": same,
        "bits": difference.bits,
        "of_bits": difference.total_bits,
        "rows": difference.rows,
        "of_rows": len(reference.rows),
        "largest": difference.largest,
        "last_losses": losses,
        "steps": [found.step, reference.step],
        **notes[comparison.run],
    }


def train(report: Report, name: str, first: Future | None) -> dict[str, Any]:
    """Run all commands of a run; returns the fields of its line."""
    if first is not None:
        first.result()
    training, notes = TRAININGS[name], {}
    for index, (steps, environment) in enumerate(training.commands):
        process = start(report, name, steps, environment)
        try:
            if training.killed and index == 0:
                notes["killed_at"] = kill(report, name, process)
                continue
            status = process.wait(timeout=max(1.0, report.left))
        finally:
            if process.poll() is None:
                process.kill()
        if status != 0:
            raise RuntimeError(f"training ended with status {status}: {log_of(report, name).read_text()[-600:]}")
    return notes


def start(report: Report, name: str, steps: int, environment: dict[str, str]) -> subprocess.Popen:
    """Start the command in a new process."""
    config = pathlib.Path(__file__).with_name("device_run.py")
    command = [sys.executable, "-m", "transformer", "train", f"{config}:tiny" if report.tiny else str(config)]
    command += ["--workdir", slug(name), "--training.steps", str(steps)]
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), environment.get("XLA_FLAGS"))))
    if "JAX_COMPILATION_CACHE_DIR" in environment:
        environment = environment | {"JAX_COMPILATION_CACHE_DIR": str(log_of(report, name).with_suffix(".compiled"))}
    environment = {**os.environ, "COLUMNS": "1000", **environment, **({"XLA_FLAGS": flags} if flags else {})}
    with log_of(report, name).open("a") as log:
        return subprocess.Popen(
            command, cwd=report.folder / "runs", env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def kill(report: Report, name: str, process: subprocess.Popen) -> int:
    """Kill a run that has a checkpoint, between checkpoints; returns its last step with metrics."""
    folder = report.folder / "runs" / slug(name)
    metrics = folder / "metrics.jsonl"
    while not (
        metrics.exists() and f'"step": {KILL_FROM},' in metrics.read_text() and committed_steps(folder / CHECKPOINTS)
    ):
        if process.poll() is not None:
            raise RuntimeError(
                f"ended with {process.returncode} before it was killed: {log_of(report, name).read_text()[-600:]}"
            )
        if report.left <= 0:
            raise TimeoutError("no time left before the kill")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"ended with {process.returncode} before it was killed")
    return metrics.read_text().count('"split": "train"')


def slug(name: str) -> str:
    """A directory's name."""
    return name.replace(" ", "_")


def log_of(report: Report, name: str) -> pathlib.Path:
    """The output of a run."""
    return report.folder / "runs" / f"{slug(name)}.log"


def call_cudnn_twice(report: Report, flags: dict[str, str]) -> dict[str, Any]:
    """Two attention calls of one shape, and their gradients, in one program, in a process that may abort.

    Reported to fail with deterministic operations, for the second backward call is not compiled (openxla/xla pull request 46500).
    """
    if jax.devices()[0].platform == "cpu":
        raise Skip("cuDNN is for GPUs")
    command = [sys.executable, str(pathlib.Path(__file__).with_name("device_cudnn.py"))]
    environment = {**os.environ, **flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=max(5.0, min(60.0, report.left)), check=False
    )
    lines = done.stdout.strip().splitlines()
    found = {"status": done.returncode, "flags": flags.get("XLA_FLAGS", ""), "said": lines[-1:]}
    return found if done.returncode == 0 else found | {"stderr": done.stderr.strip()[-600:]}
