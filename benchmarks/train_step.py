"""Time of one training step of a 10.7M-parameter decoder, in float32 and bfloat16; prints one JSON line.

    python benchmarks/train_step.py [--steps 8] [--dtypes float32 bfloat16]

The size is nanoGPT's Shakespeare model: 6 layers, width 384, 6 heads, 16 x 256 tokens, vocabulary 65, AdamW with clipping. Times
are minima; compare two programs only within one run on one machine.
"""

import argparse
import json
import resource
import time

import jax
import numpy as np

from transformer.config import Config, DataConfig, ParallelConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.positions.learned import LearnedPositions
from transformer.optimizers.adamw import AdamW
from transformer.parts import StandIn, Steps
from transformer.training.hardware import keep_freed_memory, measured_peak_flops
from transformer.types import Batch


def make_config(dtype: str, attention: str) -> Config:
    """The benchmark's run."""
    block = BlockConfig(AttentionConfig(num_heads=6, implementation=attention), FeedForwardConfig(activation="gelu"))
    return Config(
        model=ModelConfig(
            vocab_size=65,
            max_length=256,
            num_layers=6,
            embed_dim=384,
            pattern=(block,),
            positions=LearnedPositions(),
            dtype=dtype,
        ),
        data=DataConfig(sequence_length=256, batch_size=16),
        optimizer=AdamW(b2=0.99),
        parallel=ParallelConfig(data=1),
    )


def measure(config: Config, steps: int) -> dict[str, float]:
    """Step time and the rates that follow from it."""
    made = Steps(config, StandIn(config.model.vocab_size))
    runner, state = made.runner, made.init_state()
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, *shape), dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    batch = runner.place_batch(Batch(tokens[0], tokens[1], ones.astype(np.float32), ones, positions))

    start = time.perf_counter()
    state, statistics = runner.step(state, batch)
    jax.block_until_ready(statistics)
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        state, statistics = runner.step(state, batch)
        jax.block_until_ready((state, statistics))
        times.append(time.perf_counter() - start)
    step_seconds = min(times)
    work = made.parts.measure_work()(batch)
    return {
        "step_ms": round(1e3 * step_seconds, 1),
        "tokens_per_second": round(work.tokens / step_seconds),
        "fraction_of_peak": round(work.flops / step_seconds / measured_peak_flops(config.model.dtype), 3),
        "compile_seconds": round(compile_seconds, 2),
        "loss": round(float(statistics["loss"]) / float(statistics["weight"]), 4),
    }


def main() -> None:
    """Measure each dtype and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="compute types")
    parser.add_argument("--attention", default="auto", help="attention implementation")
    options = parser.parse_args()
    keep_freed_memory()
    result: dict = {"benchmark": "train_step", "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    for dtype in options.dtypes:
        result[dtype] = measure(make_config(dtype, options.attention), options.steps)
        result[dtype]["peak_gflops"] = round(measured_peak_flops(dtype) / 1e9)
        # The peak of the whole process: with several dtypes, the largest so far.
        result[dtype]["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
