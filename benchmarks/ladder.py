"""The fit of loss to size with configs/gpt.py: trains depths one after the other, and prints one JSON line.

    python benchmarks/ladder.py OUT [--depths 1 2 3] [--ratio 4] [--source FILE ...]

Each depth is a run in OUT, which should lie outside the repository. A second call continues the first, keeps finished runs, and
fits the requested depths. A run's output is in OUT/dDEPTHxRATIO.log.

* `compute` is 6 x parameters x tokens (Kaplan et al. 2020), where parameters are the matrices of blocks;
* `bits_per_byte` is measured on the whole held-out part, after the last step;
* `by_parameters` and `by_compute` have the exponent a of loss = c x size^-a, by least squares of logarithms over all depths. They
  also have half of its 95 % interval (Student's t, with the number of depths minus two degrees of freedom; none for two depths),
  and the exponents between neighbouring depths.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
from typing import Any

from transformer.cli.arguments import load_config
from transformer.training.writers import read_jsonl

STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}
"""The 97.5 % quantile of Student's t, by degrees of freedom."""


def exponent(sizes: list[float], losses: list[float]) -> dict[str, Any]:
    """The exponent of a power law through the points, its uncertainty, and the exponents between neighbours."""
    x, y = [math.log(size) for size in sizes], [math.log(loss) for loss in losses]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    error = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    free = len(x) - 2
    half = STUDENT[free] * math.sqrt(error / free / spread) if free in STUDENT else None
    steps = [-(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    return {
        "exponent": round(-slope, 3),
        "half_interval": None if half is None else round(half, 3),
        "between": [round(step, 3) for step in steps],
    }


def rung(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a depth, unless that is done, and measure it."""
    config = load_config(f"gpt:{variant}")
    workdir, steps = options.out / variant, config.training.steps
    if not finished(workdir, steps):
        command = [sys.executable, "-m", "transformer", "train", f"gpt:{variant}", "--workdir", str(workdir)]
        command += ["--training.sample-length", "0", *(["--data.source", *options.source] if options.source else [])]
        with open(options.out / f"{variant}.log", "a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    last = finished(workdir, steps)
    if last is None:
        raise SystemExit(f"{workdir} has no score after step {steps}; see {options.out / variant}.log.")
    batch = config.data.batch_size * config.data.sequence_length
    parameters, tokens = 12 * config.model.num_layers * config.model.embed_dim**2, batch * steps
    rates = [(row["step"], row["tokens_per_second"]) for row in rows(workdir) if row.get("tokens_per_second")]
    before = [0, *(step for step, _ in rates)]
    return {
        "depth": config.model.num_layers,
        "parameters": parameters,
        "tokens": tokens,
        "batch": batch,
        "steps": steps,
        "compute": float(f"{6 * parameters * tokens:.3e}"),
        "loss": round(last["loss"], 4),
        "bits_per_byte": round(last["bits_per_byte"], 4),
        "minutes": round(
            sum((step - a) * batch / rate for a, (step, rate) in zip(before, rates, strict=False)) / 60, 1
        ),
    }


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    path = workdir / "metrics.jsonl"
    return read_jsonl(path) if path.exists() else []


def finished(workdir: pathlib.Path, steps: int) -> dict[str, Any] | None:
    """The scores of a run's last step; None if the run has not reached it."""
    found = [row for row in rows(workdir) if row["split"] == "validation" and row["step"] == steps]
    return found[-1] if found else None


def main() -> None:
    """Train the depths, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder of the runs")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ratio", default="4", help="tokens for each parameter")
    parser.add_argument("--source", nargs="+", default=[], help="a text instead of Python's standard library")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rungs = [rung(f"d{depth}x{options.ratio}", options) for depth in sorted(set(options.depths))]
    losses = [each["loss"] for each in rungs]
    fits = {f"by_{name}": exponent([each[name] for each in rungs], losses) for name in ("parameters", "compute")}
    print(
        json.dumps(
            {"benchmark": "ladder", "ratio": float(options.ratio), "rungs": rungs, **(fits if len(rungs) > 1 else {})}
        )
    )


if __name__ == "__main__":
    main()
