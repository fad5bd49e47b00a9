"""One vector from the vectors of a sequence, padding left out."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Pooling = Literal["mean", "max", "first", "attention"]


def pool(
    x_BTD: Float[Array, "B T D"],
    valid_BT: Bool[Array, "B T"],
    kind: Pooling,
    scores_BT: Float[Array, "B T"] | None = None,
) -> Float[Array, "B D"]:
    """Pool the valid vectors of each row; a row without any gives zeros.

    Args:
        x_BTD: the vectors.
        valid_BT: which of them count.
        kind: their mean; their maximum in each component; the first of the row; their mean weighted by the softmax of
            `scores_BT`.
        scores_BT: for `attention`.

    Example:
        >>> x = jnp.array([[[1.0], [3.0], [9.0]]])
        >>> valid = jnp.array([[True, True, False]])
        >>> [float(pool(x, valid, kind)[0, 0]) for kind in ("mean", "max", "first")]
        [2.0, 3.0, 1.0]
    """
    x = x_BTD.astype(jnp.float32)
    any_B1 = jnp.any(valid_BT, axis=1, keepdims=True)
    if kind == "first":
        pooled_BD = x[:, 0]
    elif kind == "max":
        pooled_BD = jnp.max(jnp.where(valid_BT[..., None], x, -jnp.inf), axis=1)
    else:
        if kind == "mean":
            scores_BT = jnp.zeros(valid_BT.shape, jnp.float32)
        if scores_BT is None:
            raise ValueError("Attention pooling needs a score for each vector; pass scores_BT.")
        scores_BT = scores_BT.astype(jnp.float32)
        # Rows without a valid vector would give NaN, and so would their gradient.
        weights_BT = jax.nn.softmax(jnp.where(valid_BT | ~any_B1, scores_BT, -jnp.inf), axis=1)
        pooled_BD = jnp.einsum("BT,BTD->BD", weights_BT, x)
    return jnp.where(any_B1, pooled_BD, 0).astype(x_BTD.dtype)
