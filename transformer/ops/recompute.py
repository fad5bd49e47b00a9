"""What a backward pass computes again rather than reads from memory."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

_KEPT = "kept"


def keep(x: Array) -> Array:
    """Itself; within `recomputed` it is not computed again. For what is small and takes a whole row to compute."""
    return checkpoint_name(x, _KEPT)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose gradient keeps its arguments and what it `keep`s, and computes the rest again."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))


def stored(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, whose gradient keeps what JAX would."""
    return function
