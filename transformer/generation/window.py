"""The rolling window: the tokens that a model reads of a row longer than its limit."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from transformer.validation import require


def check_window(limit: int, keep_first: int) -> None:
    """Raise UserError unless half a window holds the kept first tokens and a later one."""
    require(
        0 <= keep_first < limit // 2,
        f"keep_first must be at least 0 and below half of the model's {limit} tokens, got {keep_first}.",
    )


def num_dropped(read_B: Int[np.ndarray, " B"], limit: int) -> Int[np.ndarray, " B"]:
    """Number of dropped tokens of each row after `read_B` tokens, for a model of `limit` tokens (0: no limit).

    A full window drops its earlier half. The number depends only on the position in the row. Therefore drawn tokens and
    tokens of the prompt are treated alike.

    >>> num_dropped(np.array([8, 9, 12, 13]), limit=8).tolist()
    [0, 4, 4, 8]
    """
    if limit == 0:
        return np.zeros_like(read_B)
    step = limit - limit // 2
    return -(-np.maximum(read_B - limit, 0) // step) * step


def windows(
    tokens_BP: Int[Array, "B P"], dropped_B: Int[Any, " B"], *, keep_first: int, length: int
) -> Int[Array, "B {length}"]:
    """The first tokens of each row, followed by the tokens after the `dropped_B` dropped ones.

    >>> windows(jnp.arange(8)[None], jnp.array([3]), keep_first=1, length=4).tolist()
    [[0, 4, 5, 6]]
    """
    index_T = jnp.arange(length, dtype=jnp.int32)[None]
    columns_BT = index_T + jnp.where(index_T < keep_first, 0, jnp.asarray(dropped_B)[:, None])
    return jnp.take_along_axis(tokens_BP, jnp.minimum(columns_BT, tokens_BP.shape[1] - 1), axis=1)
