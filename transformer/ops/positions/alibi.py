"""ALiBi: a penalty on each logit, linear in the distance."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from transformer.model_kinds import POSITIONS, Positions
from transformer.ops.bias import BiasDescription
from transformer.types import Leaf


@POSITIONS.register
@dataclasses.dataclass(frozen=True)
class AlibiPositions(Positions):
    """Attention with linear biases (Press et al. 2022)."""

    kind = "alibi"
    between_tokens = True

    def bias(self, num_heads: int, shared: BiasDescription | None) -> "AlibiBias":
        """The published slopes."""
        super().bias(num_heads, shared)
        return AlibiBias.for_heads(num_heads)


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " H"]:
    """The slopes of ALiBi: a geometric sequence, the first 2^(-8/H) (Press et al. 2022, section 3).

    If H is not a power of two, take the sequence of the next lower power of two, then every second slope of the next higher
    one, as in the authors' code.

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

    The authors define it for causal attention. Here the distance is symmetric, which makes it usable in encoders.

    >>> AlibiBias.for_heads(2).block(jnp.arange(2)[None], jnp.arange(2)[None])[0, 0].tolist()
    [[0.0, -0.0625], [-0.0625, 0.0]]
    """

    slopes: Leaf  # float [H]

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
