"""LayerNorm: centred and scaled vectors."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.model_kinds import NORMS, Norm
from transformer.ops.recompute import keep


@NORMS.register
@dataclasses.dataclass(frozen=True)
class LayerNorm(Norm):
    """`(x - mean) / sqrt(variance + epsilon) * scale (+ bias)` over the last axis (Ba et al. 2016)."""

    kind = "layer_norm"

    use_bias: bool = False
    """A learned offset."""

    def normalize(self, x: Float[Array, "*B D"], vector: Callable[[str, float], Array]) -> Float[Array, "*B D"]:
        """Uses the parameter `scale`, and `bias` if configured."""
        x = x - keep(jnp.mean(x, axis=-1, keepdims=True))
        x = x * keep(jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon))
        x = x * vector("scale", 1.0)
        return x + vector("bias", 0.0) if self.use_bias else x
