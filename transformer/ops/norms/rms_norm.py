"""RMSNorm: vectors scaled to a root mean square of one."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.model_kinds import NORMS, Norm
from transformer.ops.recompute import keep


@NORMS.register
@dataclasses.dataclass(frozen=True)
class RMSNorm(Norm):
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis (Zhang and Sennrich 2019)."""

    kind = "rms_norm"

    unit_offset: bool = False
    """Multiply by 1 + scale, where scale starts at 0 (Gemma Team 2024)."""

    def normalize(self, x: Float[Array, "*B D"], vector: Callable[[str, float], Array]) -> Float[Array, "*B D"]:
        """Uses the parameter `scale`."""
        x = x * keep(jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon))
        return x * (1.0 + vector("scale", 0.0) if self.unit_offset else vector("scale", 1.0))
