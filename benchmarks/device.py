"""Correctness and speed on the device of this machine, for a few minutes on one NVIDIA GPU.

    python benchmarks/device.py [SECTION ...] [--out DIR] [--budget SECONDS] [--tiny] [--again]

Prints one JSON line for each result, and appends it to DIR/results.jsonl at once. A part that fails gives a line with "error"
(type, message, location). A part that does not fit in the remaining time gives a line with "skipped". The other parts
continue. With the same DIR, a second run measures only missing results (`--again`: all). Without a section, all sections run
in this order, by default within these seconds:

    environment   30  device, driver, versions; speed of matrix products and copies
    attention    120  values and gradients of each attention backend against float32, and whether a repetition has the same bits
    step         310  GPT-2 124M: tokens a second, MFU, memory, compile time; the same model in PyTorch, and the ratio
    resume       240  by the command line: train twice, kill and resume, deterministic operations; CPU to GPU and back
    decode       120  tokens a second at batch 1, 8 and 64; Hugging Face's GPT-2 for comparison
    tests        240  the device part of the test suite (`make test-device`)
    profile       90  kernels of a training step by time, and the contents of its compiled program

The first three take at most 460 seconds together. Unused time of a section goes to the later ones. Each section runs in its own
process, therefore a crash ends that section only. `--tiny` makes everything small: all of it runs on a CPU in a few minutes.

docs/gpu.md explains each line.
"""

import argparse
import contextlib
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from device_report import Report, describe, note

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Section(NamedTuple):
    """A part of the check, chosen by name."""

    seconds: float
    """That it has."""
    jobs: tuple[str, ...]
    """Functions `module:name` that take a `Report`, each run in a new process, with an equal part of the remaining time."""


SECTIONS = {
    "environment": Section(30, ("device_environment:run",)),
    "attention": Section(120, ("device_attention:run",)),
    "step": Section(310, ("device_step:run", "device_torch:run_steps")),
    "resume": Section(240, ("device_resume:run",)),
    "decode": Section(120, ("device_decode:run", "device_torch:run_decode")),
    "tests": Section(240, ("device_tests:run",)),
    "profile": Section(90, ("device_profile:run",)),
}
SHARE = ("device_torch", "device_resume", "device_tests")
"""Modules whose processes share the device's memory with others; in other modules, JAX takes three quarters at once."""
GRACE = 8.0
"""Seconds after the deadline of a section, in which it may finish its last part before it is killed."""


def main(arguments: list[str] | None = None) -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("device_results"), help="folder of the results"
    )
    parser.add_argument("--budget", type=float, help="seconds for all sections together")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--again", action="store_true", help="measure results again that exist")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    if options.job:
        run_job(options)
    else:
        run_sections(options)


def run_sections(options: argparse.Namespace) -> None:
    """Run the sections one after the other, each in its processes."""
    start = deadline = time.time()
    end = start + options.budget if options.budget is not None else float("inf")
    names = options.sections or list(SECTIONS)
    # A budget beyond what the sections have is theirs in proportion; on a CPU, parts take the time that they take.
    usual = sum(SECTIONS[name].seconds for name in names)
    factor = max(3.0 if options.tiny else 1.0, (options.budget or 0.0) / usual)
    for name in names:
        section = SECTIONS[name]
        deadline = min(end, deadline + section.seconds * factor)
        for index, job in enumerate(section.jobs):
            share = (deadline - time.time()) / (len(section.jobs) - index)
            start_job(options, name, job, min(deadline, time.time() + share))
        note(f"# {name} took until {time.time() - start:.0f} s")


def start_job(options: argparse.Namespace, section: str, job: str, deadline: float) -> None:
    """Run one process; a line reports its death."""
    report = Report(options.out, section, deadline, tiny=options.tiny)
    if report.left <= 0:
        report.emit(job, skipped="no time left")
        return
    flags = [flag for flag, given in (("--tiny", options.tiny), ("--again", options.again)) if given]
    command = [sys.executable, str(ROOT / "benchmarks" / "device.py"), section, *flags, "--out", str(options.out)]
    command += ["--job", job, "--deadline", str(deadline)]
    log = options.out / f"{section}.{job.partition(':')[2]}.log"
    with log.open("a") as errors:
        # A new process group, with all child processes.
        process = subprocess.Popen(
            command, env=job_environment(options.out, job), stderr=errors, cwd=ROOT, start_new_session=True
        )
        try:
            status = process.wait(timeout=max(0.0, report.left) + GRACE)
        except subprocess.TimeoutExpired:
            message = f"killed {GRACE:.0f} s after its time"
            report.emit(job, error={"type": "Timeout", "message": message, "where": [str(log)]})
            return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status != 0:
        end = log.read_text(errors="replace")[-800:]
        report.emit(job, error={"type": "ExitStatus", "message": f"status {status}: {end}", "where": [str(log)]})


def job_environment(out: pathlib.Path, job: str) -> dict[str, str]:
    """Programs are kept between processes and runs."""
    own = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "TORCHINDUCTOR_CACHE_DIR": str(out / "torch"),
        "TRITON_CACHE_DIR": str(out / "triton"),
    }
    others = {
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false" if job.startswith(SHARE) else "true",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUNBUFFERED": "1",
    }
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms:  # for the reference
        own["JAX_PLATFORMS"] = f"{platforms},cpu"
    return {**others, **os.environ, **own}


def run_job(options: argparse.Namespace) -> None:
    """The work of a process of a section."""
    (section,) = options.sections
    report = Report(options.out, section, options.deadline, tiny=options.tiny)
    try:
        module, _, function = options.job.partition(":")
        job = getattr(importlib.import_module(module), function)
        report = Report(
            options.out, section, options.deadline, tiny=options.tiny, card=name_card(), again=options.again
        )
        job(report)
    except Exception as error:
        report.emit(options.job, error=describe(error))


def name_card() -> str:
    """JAX's name of the device."""
    return importlib.import_module("jax").devices()[0].device_kind


if __name__ == "__main__":
    main()
