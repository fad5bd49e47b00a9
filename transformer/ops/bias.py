"""Attention biases as descriptions, evaluated a block at a time from the places of queries and keys."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
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
