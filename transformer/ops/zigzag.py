"""Zig-zag assignment of positions to ring devices; it balances causal attention."""

import numpy as np
from jaxtyping import Int

from transformer.validation import require


def balanced_order(length: int, devices: int) -> Int[np.ndarray, " T"]:
    """The positions of a row in the order in which ring devices hold them.

    A row is cut into twice as many pieces as there are devices, and device i holds piece i and piece 2n - 1 - i. One is early and
    sees few keys, the other is late and sees many (Brandon et al. 2023; Llama 3, section 3.3.2).

    Args:
        length: T, positions of a row.
        devices: n, size of the `context` axis.

    Raises:
        UserError: the pieces would differ in size.

    Example:
        >>> balanced_order(8, 2).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    require(
        length % (2 * devices) == 0,
        f"data.sequence_length must be divisible by twice parallel.context={devices}, got {length}; change one of them.",
    )
    pieces = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([pieces[[i, 2 * devices - 1 - i]].ravel() for i in range(devices)])
