"""The rolling window: which tokens a model reads of a row that is longer than the model reads."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from transformer.validation import require


def check_window(limit: int, keep_first: int) -> None:
    """Raise UserError unless half a window has room for the first tokens, which stay, and for a later one."""
    require(
        0 <= keep_first < limit // 2,
        f"keep_first must be at least 0 and below half of the model's {limit} tokens, got {keep_first}.",
    )


def num_dropped(read_B: Int[np.ndarray, " B"], limit: int) -> Int[np.ndarray, " B"]:
    """How many tokens a model of `limit` tokens (0: no limit) has dropped when it has read so many of each row.

    A window that is full drops its earlier half. The number depends on the place in the row alone: it is the same whether a
    token was drawn, or stood in the prompt.

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
    """Of each row its first tokens, and behind them those that follow `dropped_B` others.

    >>> windows(jnp.arange(8)[None], jnp.array([3]), keep_first=1, length=4).tolist()
    [[0, 4, 5, 6]]
    """
    places_T = jnp.arange(length, dtype=jnp.int32)[None]
    columns_BT = places_T + jnp.where(places_T < keep_first, 0, jnp.asarray(dropped_B)[:, None])
    return jnp.take_along_axis(tokens_BP, jnp.minimum(columns_BT, tokens_BP.shape[1] - 1), axis=1)
