"""Products of few rows with a large matrix on CPU: the matrix in panels, so that memory is read in one stream."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from transformer.types import Leaf

# Columns of a panel by the number of rows it is multiplied with, from there on the matrix stays whole. Measured with
# 42 MB of float32 kernels on two cores of an AMD EPYC (Zen 4), ms for one pass over them, whole against panels:
#   1 row  2.4 : 1.4 (64 columns: 1.8)    2 rows  3.8 : 1.6    4 rows  4.1 : 1.8    8 rows  3.5 : 2.8
# XLA multiplies a panel on one thread, a whole matrix with many rows on all.
_ONE_ROW, _FEW_ROWS, _MOST_ROWS = 32, 64, 8


def panel_width(num_rows: int) -> int:
    """How wide panels should be for products with `num_rows` rows; 0 if the matrix had better stay whole."""
    if num_rows > _MOST_ROWS:
        return 0
    return _ONE_ROW if num_rows == 1 else _FEW_ROWS


def cut_panels(matrix_DF: Float[jax.Array, "D F"], width: int) -> Float[jax.Array, "panels D width"]:
    """The columns of a matrix in panels of `width`, each contiguous in memory, the last filled up with zeros.

    They are float32 whatever the matrix is: XLA's CPU backend converts others in every product.

    >>> cut_panels(jnp.arange(6.0).reshape(2, 3), width=2)[:, 0].tolist()
    [[0.0, 1.0], [2.0, 0.0]]
    """
    D, F = matrix_DF.shape
    count = math.ceil(F / width)
    padded = jnp.pad(matrix_DF.astype(jnp.float32), ((0, 0), (0, count * width - F)))
    return padded.reshape(D, count, width).transpose(1, 0, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Panels:
    """A matrix in panels, which may stand for a kernel in a tree of parameters (`generation.prepare`)."""

    panels: Leaf  # float32 [panels, D, width]
    features: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """Sizes of the axes that its columns are of, such as heads and their width."""


def panel_columns(matrix: Panels, indices: Int[jax.Array, "*B"]) -> Float[jax.Array, "*B D"]:
    """The columns at `indices`; NaN outside the matrix, whose last panel may be filled up."""
    count, _, width = matrix.panels.shape
    inside = (indices >= 0) & (indices < math.prod(matrix.features))
    panel, column = jnp.where(inside, indices // width, count), indices % width
    return matrix.panels.at[panel, :, column].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def panel_product(
    rows_ND: Float[jax.Array, "N D"], panels: Float[jax.Array, "panels D width"], num_columns: int, dtype: DTypeLike
) -> Float[jax.Array, "N F"]:
    """`rows @ matrix` for a matrix of `num_columns` that was cut into panels, accumulated in float32.

    >>> matrix = jnp.arange(6.0).reshape(2, 3)
    >>> panel_product(jnp.ones((1, 2)), cut_panels(matrix, width=2), 3, jnp.float32).tolist()
    [[3.0, 5.0, 7.0]]
    """
    count, _, width = panels.shape
    N, D = rows_ND.shape
    # The barrier keeps whatever computes the rows from being fused into the broadcast, and so repeated for each panel.
    rows_ND = jax.lax.optimization_barrier(rows_ND.astype(jnp.float32))
    out = jnp.einsum("pnd,pdw->pnw", jnp.broadcast_to(rows_ND[None], (count, N, D)), panels)
    return out.transpose(1, 0, 2).reshape(N, count * width)[:, :num_columns].astype(dtype)
