"""Tokens a second of greedy decoding with GPT-2 124M: 32 tokens are read, 256 generated, both timed.

The model computes in bfloat16, with the float32 parameters of training (`ours`) and with parameters cast to bfloat16 (`ours
cast`). `weights_gb_per_s` is the size of the parameters that a step must read, divided by its time.
"""

import dataclasses
import functools
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_report import Report, seconds_of
from device_step import GPT2, TINY, gpt2_config, random_ids

from transformer.generation.generate import Generator
from transformer.generation.sampling import SamplingConfig
from transformer.models.decoder import Decoder
from transformer.models.init import init_params


def run(report: Report) -> None:
    """Batches of 1, 8 and 64."""
    for rows in (2,) if report.tiny else (1, 8, 64):
        report.run(f"ours {rows}", functools.partial(measure, report, rows, False), needs=12, rows=rows)
        if not report.tiny:
            report.run(f"ours cast {rows}", functools.partial(measure, report, rows, True), needs=12, rows=rows)


@functools.cache
def make_generator(report: Report, cast: bool) -> tuple[Generator, int]:
    """With random parameters, and the bytes of those."""
    config = gpt2_config(report.folder, tiny=report.tiny, rows=1, pack=False).model
    model = Decoder(dataclasses.replace(config, dtype="bfloat16"))
    params, _ = init_params(model, jax.random.key(0))
    if cast:
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return Generator(model, params), sum(x.nbytes for x in jax.tree.leaves(params))


def measure(report: Report, rows: int, cast: bool) -> dict[str, Any]:
    """Time a whole generation, and the reading of the prompts alone."""
    shape, new = TINY if report.tiny else GPT2, 16 if report.tiny else 256
    generator, num_bytes = make_generator(report, cast)
    prompts = random_ids(rows * 32, shape.vocab_size).reshape(rows, 32)

    def generate(count: int) -> Any:
        out = generator.generate(prompts, max_new_tokens=count, sampling=SamplingConfig(temperature=0))
        if np.any(np.asarray(out.lengths) != count):
            raise AssertionError(f"generated {out.lengths} tokens, not {count}")
        return lambda: None  # `generate` has waited

    start = perf_counter()
    generate(new)
    first = perf_counter() - start
    seconds, rounds = seconds_of(functools.partial(generate, new), calls=1)
    reading, _ = seconds_of(functools.partial(generate, 1), calls=1)
    step = max(seconds - reading, 1e-9) / (new - 1)
    return {
        "tokens_per_s": round(rows * new / seconds, 1),
        "rounds_ms": [round(1e3 * t, 1) for t in rounds],
        "us_per_step": round(1e6 * step, 1),
        "prompt_ms": round(1e3 * reading, 2),
        "weights_gb_per_s": round(num_bytes / step / 1e9, 1),
        "first_s": round(first, 1),
    }
