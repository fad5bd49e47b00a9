"""Greedy decoding with lighter matrices (`load(weights=...)`) and with float32, in turn; prints one JSON line.

    python benchmarks/light_weights.py [--rounds 10]

Model, prompts and counts are as in `benchmarks/decode.py`. For each type, it gives the bytes of the parameters, and the time of
float32 divided by the type's time, from minima over the rounds, with one row and with eight. `--run DIR` also scores the
validation split of a run, up to `--limit` bytes, in bits per byte.
"""

import argparse
import json
from typing import Any

import decode
import jax
import numpy as np

from transformer.generation.generate import Generator
from transformer.generation.sampling import GREEDY
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.models.light import light_params
from transformer.runs.scoring import evaluate

TYPES: tuple[Any, ...] = ("", "bfloat16", "int8")


def main() -> None:
    """Measure and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens generated")
    parser.add_argument("--run", default="", help="directory of a run to score with each type")
    parser.add_argument("--limit", type=int, default=200_000, help="most bytes to score")
    options = parser.parse_args()
    model = Decoder(decode.CONFIG)
    params, _ = init_params(model, jax.random.key(0))
    trees = {kind: light_params(params, lambda: init_params(model, None), kind) for kind in TYPES}
    generators = {kind: Generator(model, tree) for kind, tree in trees.items()}
    result: dict[str, Any] = {"benchmark": "light_weights", "jax": jax.__version__}
    for kind, tree in trees.items():
        result[kind or "float32"] = {"megabytes": round(sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6, 1)}
    for rows in (1, 8):
        prompts = np.random.default_rng(0).integers(0, decode.CONFIG.vocab_size, (rows, 32))

        def run(kind: str, prompts: np.ndarray = prompts) -> None:
            generators[kind].generate(prompts, max_new_tokens=options.new_tokens, sampling=GREEDY)

        times: dict[str, list[float]] = {kind: [] for kind in TYPES}
        for index in range(options.rounds + 1):
            for kind in TYPES:
                seconds = decode.seconds(lambda kind=kind: run(kind))
                if index > 0:  # the first compiles
                    times[kind].append(seconds)
        for kind in TYPES:
            result[kind or "float32"][f"speed_{rows}"] = round(min(times[""]) / min(times[kind]), 2)
    if options.run:
        for kind in TYPES:
            scores = evaluate(options.run, weights=kind, limit=options.limit)
            result[kind or "float32"]["bits_per_byte"] = round(scores["bits_per_byte"], 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
