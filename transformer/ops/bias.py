"""Attention biases as descriptions, evaluated a block at a time from the places of queries and keys."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from transformer.validation import require


@runtime_checkable
class BiasDescription(Protocol):
    """What is added to attention logits, as a pytree of floating-point arrays that backends evaluate block by block."""

    def block(self, query_positions: Any, key_positions: Any) -> Any:
        """The float32 bias [B|1, H, t, s] of queries at [B|1, t] and keys at [B|1, s]."""
        ...


Bias = Shaped[jax.Array, "#B #H T S"] | BiasDescription
"""Floating-point numbers (`check_bias`), dense or described."""


def check_bias(bias: Any) -> None:
    """Raise UserError unless a bias holds floating-point numbers: booleans of a mask would be added to logits as 0 and 1."""
    for leaf in jax.tree.leaves(bias):
        dtype = jnp.result_type(leaf)
        require(
            jnp.issubdtype(dtype, jnp.floating),
            f"Attention bias is added to the logits and must be floating-point, got {dtype}; say who may attend to whom with "
            "`mask`, an AttentionMask, or give bias=jnp.where(allowed, 0.0, -jnp.inf).",
        )


def bias_block(
    bias: BiasDescription, query_places: Int[jax.Array, "#B t"], key_places: Int[jax.Array, "#B s"]
) -> Float[jax.Array, "B H t s"]:
    """The float32 bias of some queries and keys, by the places that the mask compares."""
    block = bias.block(query_places, key_places)
    check_bias(block)
    return block.astype(jnp.float32)


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " H"]:
    """The slopes of ALiBi: a geometric sequence, the first 2^(-8/H) (Press et al. 2022, section 3).

    If H is no power of two, the sequence of the power of two below it, then every second slope of the one above, as
    in the authors' code.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes needs at least one head, got num_heads={num_heads}.")
    below = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / below) for head in range(below)]
    between = [2.0 ** (-4.0 * (head + 1) / below) for head in range(0, 2 * below, 2)]
    return np.asarray((slopes + between)[:num_heads], np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AlibiBias:
    """Attention with linear biases: `-slope * |i - j|` for each head (Press et al. 2022).

    The authors define it for causal attention; the distance is symmetric here, so that encoders may use it too.

    >>> AlibiBias.for_heads(2).block(jnp.arange(2)[None], jnp.arange(2)[None])[0, 0].tolist()
    [[0.0, -0.0625], [-0.0625, 0.0]]
    """

    slopes: Any  # float [H]

    @classmethod
    def for_heads(cls, num_heads: int) -> "AlibiBias":
        """The published slopes for `num_heads` query heads."""
        return cls(jnp.asarray(alibi_slopes(num_heads)))

    def block(
        self, query_positions: Int[jax.Array, "#B t"], key_positions: Int[jax.Array, "#B s"]
    ) -> Float[jax.Array, "B H t s"]:
        """The float32 bias [B|1, H, t, s]; B is 1 if both positions have one row."""
        closeness = -jnp.abs(query_positions[:, None, :, None] - key_positions[:, None, None, :])
        return self.slopes.astype(jnp.float32)[None, :, None, None] * closeness.astype(jnp.float32)


def t5_buckets(
    distances: Int[jax.Array, "*B"], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[jax.Array, "*B"]:
    """The bucket of each distance, key minus query: exact near by, then ever wider (Raffel et al. 2020, section 2.1).

    Half of a direction's buckets hold one distance each, the other half grow geometrically up to `max_distance`. In one
    direction, keys later than the query share bucket 0.

    >>> t5_buckets(jnp.array([0, -1, -3, -200, 1]), bidirectional=True, num_buckets=32, max_distance=128).tolist()
    [0, 1, 3, 15, 17]
    """
    offset = jnp.zeros_like(distances)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distances > 0, num_buckets, 0)
        away = jnp.abs(distances)
    else:
        away = jnp.maximum(-distances, 0)
    exact = num_buckets // 2
    # A distance below `exact` is not looked up here; the maximum keeps its logarithm finite.
    ratio = jnp.log(jnp.maximum(away, exact).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    wide = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(away < exact, away, jnp.minimum(wide, num_buckets - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Bias:
    """A learned bias for each bucket of distances and each head (Raffel et al. 2020, section 2.1)."""

    table: Any  # float [num_buckets, H]
    bidirectional: bool = dataclasses.field(metadata={"static": True})
    max_distance: int = dataclasses.field(metadata={"static": True})

    def block(
        self, query_positions: Int[jax.Array, "#B t"], key_positions: Int[jax.Array, "#B s"]
    ) -> Float[jax.Array, "B H t s"]:
        """The float32 bias [B|1, H, t, s]; B is 1 if both positions have one row."""
        buckets_Bts = t5_buckets(
            key_positions[:, None, :] - query_positions[:, :, None],
            bidirectional=self.bidirectional,
            num_buckets=self.table.shape[0],
            max_distance=self.max_distance,
        )
        return jnp.moveaxis(self.table.astype(jnp.float32)[buckets_Bts], -1, 1)
