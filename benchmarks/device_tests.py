"""Runs the device part of the test suite, like `make test-device`."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

from device_report import Report, Skip

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(report: Report) -> None:
    """All in one line."""
    report.run("suite", lambda: run_suite(report), needs=60)


def run_suite(report: Report) -> dict[str, Any]:
    """The summary, and the names of what failed; what pytest printed is beside the results."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("no pytest")
    chosen = ["tests/ops/test_losses.py"] if report.tiny else [f"@{ROOT / 'tests' / 'device.txt'}"]
    workers = ["-n", "8", "--dist", "worksteal"] if not report.tiny and importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-rfE", "--tb=short", "-p", "no:cacheprovider", *workers, *chosen]
    log, late = report.folder / "tests.txt", False
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "TRANSFORMER_TEST_DEVICE": "1"}, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout=max(5.0, report.left))
        except subprocess.TimeoutExpired:
            late = True
            process.terminate()
            process.wait(timeout=5)
    text = log.read_text(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    summary = re.findall(r"^.*\b(?:passed|failed|error)\b.* in [\d.]+s.*$", text, re.MULTILINE)
    if not summary:
        raise RuntimeError(f"{'out of time' if late else f'status {process.returncode}'}: {text[-600:]}")
    return {
        "status": process.returncode,
        "summary": summary[-1].strip("= "),
        "failed": len(failed),
        "names": failed[:80],
    }
