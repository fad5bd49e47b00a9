"""Which intermediate results a backward pass recomputes instead of reading from memory."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

_KEPT = "kept"


def keep(x: Array) -> Array:
    """The identity; within `recomputed`, `x` is stored. For small results that need a whole row to compute."""
    return checkpoint_name(x, _KEPT)


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose gradient stores its arguments and its `keep` results, and recomputes everything else."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))


def stored(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, whose gradient stores JAX's usual residuals."""
    return function
