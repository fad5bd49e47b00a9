"""Time of block-wise attention, forward and backward, by the share of computed blocks; prints one JSON line.

    python benchmarks/sparse_attention.py [--length 8192] [--rounds 5]

One row, 4 heads of width 32, float32, causal. `choose_blocks` gives blocks of 256 tokens for the dense mask and the window, and
of 128 for the patterns. Times are minima over rounds in which all masks take turns.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from transformer.ops.attention import dot_product_attention
from transformer.ops.backends.blockwise import choose_blocks
from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.patterns.strided import StridedPattern

MASKS = {
    "dense": AttentionMask(causal=True),
    "window 1024": AttentionMask(causal=True, window=1024),
    "strided, 8 blocks": AttentionMask(causal=True, pattern=StridedPattern(block_size=128, stride=8)),
    "fixed, 8 blocks": AttentionMask(causal=True, pattern=FixedPattern(block_size=128, stride=8)),
}


def share(mask: AttentionMask, length: int) -> float:
    """The share of query-key pairs in computed blocks."""
    blocks = choose_blocks(length, length, mask.pattern)
    starts = range(0, length, blocks.query_size)
    computed = sum(len(mask.key_blocks(start, blocks.query_size, blocks.key_size, length)) for start in starts)
    return computed * blocks.query_size * blocks.key_size / length**2


def main() -> None:
    """Measure every mask and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    qkv = [jnp.asarray(generator.standard_normal((1, options.length, 4, 32)), jnp.float32) for _ in range(3)]

    @jax.jit
    def step(query: jax.Array, key: jax.Array, value: jax.Array, mask: AttentionMask) -> tuple:
        def loss(*arrays: jax.Array) -> jax.Array:
            return jnp.sum(dot_product_attention(*arrays, mask=mask, implementation="blockwise") ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)

    times: dict[str, list[float]] = {name: [] for name in MASKS}
    for mask in MASKS.values():
        jax.block_until_ready(step(*qkv, mask))
    for _ in range(options.rounds):
        for name, mask in MASKS.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*qkv, mask))
            times[name].append(time.perf_counter() - start)
    dense = min(times["dense"])
    result = {
        name: {
            "ms": round(1e3 * min(times[name]), 1),
            "ratio_to_dense": round(min(times[name]) / dense, 3),
            "share_of_pairs": round(share(mask, options.length), 3),
        }
        for name, mask in MASKS.items()
    }
    print(json.dumps({"benchmark": "sparse_attention", "jax": jax.__version__, "length": options.length, **result}))


if __name__ == "__main__":
    main()
