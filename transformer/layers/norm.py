"""LayerNorm and RMSNorm, with statistics in float32 whatever the activations are."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.layers.linear import with_axes
from transformer.model_config import NormConfig


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + epsilon) * scale (+ bias)` over the last axis (Ba et al. 2016)."""

    epsilon: float = 1e-5
    use_bias: bool = False
    axis: str | None = "norm"
    """Logical name of the normalised axis."""
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise each vector; the result has the layer's dtype."""
        x = inputs.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = x * _vector(self, "scale", nn.initializers.ones, x)
        if self.use_bias:
            x = x + _vector(self, "bias", nn.initializers.zeros, x)
        return x.astype(self.dtype)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis (Zhang and Sennrich 2019)."""

    epsilon: float = 1e-5
    axis: str | None = "norm"
    """Logical name of the normalised axis."""
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise each vector; the result has the layer's dtype."""
        x = inputs.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * _vector(self, "scale", nn.initializers.ones, x)).astype(self.dtype)


def _vector(norm: Any, name: str, init: nn.initializers.Initializer, x: Array) -> Array:
    """A parameter along the last axis of `x`, in float32, ready to multiply it."""
    vector = norm.param(name, with_axes(init, (norm.axis,)), (x.shape[-1],), norm.param_dtype)
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


def make_norm(
    config: NormConfig, *, name: str | None = None, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> LayerNorm | RMSNorm:
    """The norm that `config` describes, over the embedding axis; where it stands is the block's affair."""
    if config.kind == "rms_norm":
        return RMSNorm(epsilon=config.epsilon, dtype=dtype, param_dtype=param_dtype, name=name)
    return LayerNorm(epsilon=config.epsilon, use_bias=config.use_bias, dtype=dtype, param_dtype=param_dtype, name=name)
