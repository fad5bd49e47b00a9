"""Matrices in 8 bits: integers with a scale for each column, multiplied by activations of any type."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from transformer.ops.ids import look_up
from transformer.types import Leaf

_LARGEST = 127  # of a symmetric int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel or a table, `values * scales`, which may stand for it in a tree of parameters (`models.light`)."""

    values: Leaf  # int8, in the shape of the kernel
    scales: Leaf  # float32, of size 1 along the axes that a product contracts

    @property
    def T(self) -> "Quantized":
        """Its transposition."""
        return Quantized(self.values.T, self.scales.T)

    def whole(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The kernel."""
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)


def quantize(kernel: Float[Array, "..."], contracted: tuple[int, ...]) -> Quantized:
    """Symmetric integers: the largest of each column becomes 127, zero stays zero (Jacob et al. 2018, section 2).

    Args:
        kernel: of any float type.
        contracted: its axes that a product contracts. Each column of the others has a scale.

    >>> kernel = quantize(jnp.array([[127.0, 1.0], [-63.5, 0.0]]), (0,))
    >>> kernel.values.tolist(), kernel.scales.tolist()
    ([[127, 127], [-64, 0]], [[1.0, 0.007874015718698502]])
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=contracted, keepdims=True)
    scales = jnp.where(largest == 0, 1.0, largest / _LARGEST)
    # What is NaN or infinite makes its whole column so: the scale says it.
    return Quantized(jnp.round(kernel / scales).astype(jnp.int8), scales)


def quantized_rows(table: Quantized, indices: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """The rows at `indices` of a table with a scale for each row; NaN outside the table."""
    rows = table.values.at[indices].get(mode="clip").astype(jnp.float32)
    return rows * look_up(table.scales, indices)
