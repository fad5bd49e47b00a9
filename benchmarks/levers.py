"""Memory and time of each lever for larger models; prints one JSON line.

    python benchmarks/levers.py [--rounds 3] [--layers 8] [--width 320] [--rows 4] [--length 512] [--levers float32 ...]

The step trains a byte-level decoder of 9.9M parameters by AdamW with clipping. Each lever has its own process, which compiles the
trainer's step. The processes take turns with single steps, so that all levers of a round have the same load:

* `arguments_mb`, `temporaries_mb`: XLA's memory of the compiled step, for state and batch, and for intermediate results;
* `peak_resident_mb`: the largest memory of the process, with glibc's own settings (the trainer keeps freed memory);
* `time`, `processor_time`: medians over the rounds of a step's ratio to float32 in the same round, by the clock and by processor
  time; the first step does not count.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from transformer.config import Config, DataConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.optimizers.adamw import AdamW
from transformer.parts import count_parameters, initialize, training_runtime
from transformer.training.loss_scale import make_loss_scale
from transformer.training.optimizer import make_optimizer
from transformer.training.state import create_state
from transformer.training.step import TrainStep
from transformer.types import Batch

LEVERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "accumulate 4": {"accumulate_steps": 4},
    "remat dots": {"remat": "dots"},
    "remat full": {"remat": "full"},
    "scan": {"scan_layers": True},
    "scan, remat dots": {"scan_layers": True, "remat": "dots"},
    "scan, remat full": {"scan_layers": True, "remat": "full"},
    "bfloat16, scan, remat full": {"dtype": "bfloat16", "scan_layers": True, "remat": "full"},
    "bfloat16, scan, remat full, accumulate 4": {
        "dtype": "bfloat16",
        "scan_layers": True,
        "remat": "full",
        "accumulate_steps": 4,
    },
}
"""Lever -> what it changes in the model's or the optimizer's config."""


def make_config(options: argparse.Namespace, lever: str) -> Config:
    """The benchmark's run with one lever."""
    changes = dict(LEVERS[lever])
    optimizer = AdamW(b2=0.99, accumulate_steps=changes.pop("accumulate_steps", 1))
    block = BlockConfig(AttentionConfig(num_heads=options.width // 64), norm=RMSNorm())
    model = ModelConfig(
        vocab_size=257, max_length=options.length, num_layers=options.layers, embed_dim=options.width, pattern=(block,)
    )
    return Config(
        model=dataclasses.replace(model, **changes),
        data=DataConfig(sequence_length=options.length, batch_size=options.rows),
        optimizer=optimizer,
    )


def child(config: Config) -> None:
    """Compile, print the memory of the step, and run a step for each input line."""
    model = config.objective.make_model(config.model, training_runtime("cpu"))
    params, _ = initialize(config.objective, model, jax.random.key(0))
    optimizer, schedule = make_optimizer(config.optimizer, config.training.steps, params)
    objective = config.objective.bind(model, SimpleNamespace(token_bytes=np.ones(config.model.vocab_size)))
    step = TrainStep(objective, optimizer, schedule, accumulate_steps=config.optimizer.accumulate_steps)
    state = create_state(params, optimizer, jax.random.key(1), loss_scale=make_loss_scale(config.model))
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    batch = jax.device_put(Batch(tokens[0], tokens[1], ones.astype(np.float32), ones, positions))

    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    memory: Any = compiled.memory_analysis()
    report = {
        "parameters": count_parameters(params),
        "arguments_mb": round(memory.argument_size_in_bytes / 2**20),
        "temporaries_mb": round(memory.temp_size_in_bytes / 2**20),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report), flush=True)
    del params  # donated with the state
    for _ in sys.stdin:
        clock, processor = time.perf_counter(), time.process_time()
        state, sums = compiled(state, batch)
        jax.block_until_ready((state, sums))
        print(
            json.dumps(
                {
                    "seconds": time.perf_counter() - clock,
                    "processor_seconds": time.process_time() - processor,
                    "loss": float(sums["loss"] / sums["weight"]),
                    "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                }
            ),
            flush=True,
        )


def main() -> None:
    """Start a child for each lever, let them take turns, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed steps of each lever, after a first one; 0: memory only"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=320, help="embed_dim, a multiple of 64")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument(
        "--levers", nargs="+", default=list(LEVERS), choices=list(LEVERS), help="float32 is always included"
    )
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(make_config(options, options.child))
        return

    levers = dict.fromkeys(["float32", *options.levers])
    children, results = {}, {}
    for lever in levers:
        command = [sys.executable, *sys.argv, "--child", lever]
        children[lever] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        results[lever] = _answer(children[lever])
    steps: dict[str, list[dict[str, float]]] = {lever: [] for lever in levers}
    for _ in range(options.rounds + 1):
        for lever, process in children.items():
            process.stdin.write("\n")
            process.stdin.flush()
            steps[lever].append(_answer(process))
    for lever, process in children.items():
        process.communicate()
        results[lever] |= {name: steps[lever][-1][name] for name in ("peak_resident_mb", "loss")}
        for name, measured in (("time", "seconds"), ("processor_time", "processor_seconds")):
            pairs = zip(steps[lever][1:], steps["float32"][1:], strict=True)
            ratios = [own[measured] / float32[measured] for own, float32 in pairs]
            results[lever][name] = round(statistics.median(ratios), 2) if ratios else None
    results["float32"]["seconds"] = [round(step["seconds"], 2) for step in steps["float32"][1:]]
    tokens = f"{options.rows} x {options.length}"
    model = f"{options.layers} layers, width {options.width}, {tokens} tokens"
    device = jax.devices()[0].device_kind
    print(json.dumps({"benchmark": "levers", "jax": jax.__version__, "device": device, "model": model, **results}))


def _answer(process: subprocess.Popen) -> dict[str, Any]:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise RuntimeError(f"{process.args} ended without an answer.")
    return json.loads(line)


if __name__ == "__main__":
    main()
