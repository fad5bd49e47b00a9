"""Attention biases as descriptions, evaluated one block at a time from the positions of queries and keys."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Shaped

from transformer.types import PyTree
from transformer.validation import require


@runtime_checkable
class BiasDescription(Protocol):
    """A bias of attention logits, as a pytree of floating-point arrays that backends evaluate block by block."""

    def block(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """The float32 bias [B|1, H, t, s] of queries at [B|1, t] and keys at [B|1, s]."""
        ...


Bias = Shaped[jax.Array, "#B #H T S"] | BiasDescription
"""Floating-point numbers (`check_bias`), dense or described."""


def check_bias(bias: PyTree) -> None:
    """Raise UserError unless a bias holds floating-point numbers: a boolean mask would be added to logits as 0 and 1."""
    for leaf in jax.tree.leaves(bias):
        dtype = jnp.result_type(leaf)
        require(
            jnp.issubdtype(dtype, jnp.floating),
            f"Attention bias is added to the logits and must be floating-point, got {dtype}; for a boolean array use `mask` "
            "(or an AttentionMask), or give bias=jnp.where(allowed, 0.0, -jnp.inf).",
        )


def bias_block(
    bias: BiasDescription, query_positions: Int[jax.Array, "#B t"], key_positions: Int[jax.Array, "#B s"]
) -> Float[jax.Array, "B H t s"]:
    """The float32 bias of some queries and keys, from the positions that the mask compares."""
    block = bias.block(query_positions, key_positions)
    check_bias(block)
    return block.astype(jnp.float32)
