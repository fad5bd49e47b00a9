"""Loss and wall-clock time of the two Shakespeare recipes and of the fast one's ablation; prints one JSON line for each run.

    python benchmarks/shakespeare.py tinyshakespeare.txt [--runs fast adamw ...] [--seeds 0 1 2]

Every run is a new process, timed from its start, with an empty compilation cache and without a prepared text. The loss, in nats
per character, is the mean over the last tenth of the text, in windows of 64 that do not overlap.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAST, CPU = "shakespeare_char_fast", "shakespeare_char_cpu"
ADAMW = ["--optimizer.kind", "adamw", "--optimizer.learning-rate"]
RUNS = {
    "nanogpt_recipe": [CPU],
    "nanogpt_recipe_320_steps": [CPU, "--training.steps", "320"],
    "fast": [FAST],
    "adamw_1e-3": [FAST, *ADAMW, "1e-3"],
    "adamw_3e-3": [FAST, *ADAMW, "3e-3"],
    "adamw_6e-3": [FAST, *ADAMW, "6e-3"],
    "no_qk_norm": [FAST, "--model.attention.no-qk-norm"],
    "relu_squared": [FAST, "--model.feed-forward.activation", "relu_squared"],
    "layer_norm": [FAST, "--model.norm.kind", "layer_norm"],
    "learned_positions": [FAST, "--model.positions.kind", "learned"],
    "cosine_to_a_tenth": [FAST, "--optimizer.schedule.kind", "cosine", "--optimizer.schedule.final-fraction", "0.1"],
}


def measure(arguments: list[str], source: str, seed: int) -> dict[str, float]:
    """Train in a new process; its scores."""
    config, *overrides = arguments
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "train.py", f"configs/{config}.py", *overrides, "--data.source", source]
        command += ["--training.seed", str(seed), "--training.sample-length", "0"]
        command += ["--data.data-dir", f"{directory}/data", "--workdir", f"{directory}/run"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{directory}/compiled", "PYTHONPATH": str(ROOT)}
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        rows = [json.loads(line) for line in pathlib.Path(directory, "run", "metrics.jsonl").read_text().splitlines()]
    return {"steps": rows[-1]["step"], "loss": round(rows[-1]["loss"], 4), "seconds": round(seconds, 1)}


def main() -> None:
    """Measure each requested run and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=os.path.abspath, help="the text file")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["nanogpt_recipe", "fast"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    for seed in options.seeds:
        for name in options.runs:
            scores = measure(RUNS[name], options.source, seed)
            print(json.dumps({"benchmark": "shakespeare", "run": name, "seed": seed, **scores}), flush=True)


if __name__ == "__main__":
    main()
