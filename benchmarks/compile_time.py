"""Compile time of a training step by the model's depth; prints one JSON line.

    JAX_PLATFORMS=cpu python benchmarks/compile_time.py [--depths 4 64] [--rounds 3]

The step of `benchmarks/train_step.py` is lowered and compiled for one CPU device at each depth with scanned layers, and at the
first depth also as a loop. The forms take turns. Seconds are medians over the rounds. Operations are counted in the program
before XLA's passes.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import numpy as np
from train_step import make_config

from transformer.parallel.mesh import make_mesh
from transformer.parts import StandIn, Steps
from transformer.types import Batch


def compile_step(num_layers: int, *, scan_layers: bool) -> dict[str, float]:
    """Lower and compile the step once."""
    config = make_config("float32", True, "auto")
    model = dataclasses.replace(config.model, num_layers=num_layers, scan_layers=scan_layers)
    steps = Steps(dataclasses.replace(config, model=model), StandIn(model.vocab_size), make_mesh(1))
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, np.int32)
    batch = Batch(tokens, tokens, jax.ShapeDtypeStruct(shape, np.float32), tokens, tokens)
    start = time.perf_counter()
    lowered = steps.runner.lower(steps.state, batch)
    lowered_at = time.perf_counter()
    lowered.compile()
    return {
        "operations": lowered.as_text().count(" = "),
        "lower_seconds": lowered_at - start,
        "compile_seconds": time.perf_counter() - lowered_at,
    }


def main() -> None:
    """Compile each form in turn and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 64], help="layers of the scanned models")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    forms = {f"scan {depth}": (depth, True) for depth in options.depths}
    forms[f"loop {options.depths[0]}"] = (options.depths[0], False)
    runs: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    compile_step(1, scan_layers=True)  # the extra cost of the first compilation
    for _ in range(options.rounds):
        for form, (depth, scan_layers) in forms.items():
            runs[form].append(compile_step(depth, scan_layers=scan_layers))
    medians = {
        form: {name: round(statistics.median(run[name] for run in of_form), 2) for name in of_form[0]}
        for form, of_form in runs.items()
    }
    print(json.dumps({"benchmark": "compile_time", "jax": jax.__version__, **medians}))


if __name__ == "__main__":
    main()
