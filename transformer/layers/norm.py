"""Normalisation, with statistics in float32 whatever the activations are."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.layers.runtime import Runtime
from transformer.model_kinds import Norm


class Normalize(nn.Module):
    """The norm of a config, over the last axis; its parameters are `scale` and, if it has one, `bias`.

    Attributes:
        config: the kind of norm.
        axis: logical name of the normalised axis.
        runtime: types.

    Example:
        >>> import jax
        >>> from transformer.ops.norms.rms_norm import RMSNorm
        >>> y, variables = Normalize(RMSNorm()).init_with_output(jax.random.key(0), jnp.array([3.0, 4.0]))
        >>> float(jnp.mean(y * y)).__round__(3)
        1.0
    """

    config: Norm
    axis: str | None = "norm"
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise each vector; the result has the runtime's dtype."""

        def vector(name: str, fill: float) -> Array:
            parameter = self.runtime.parameter(self, name, inputs.shape[-1:], (self.axis,), fill=fill)
            return parameter.astype(jnp.float32).reshape((1,) * (inputs.ndim - 1) + (-1,))

        def normalize(x: Array) -> Array:
            return self.config.normalize(x.astype(jnp.float32), vector).astype(self.runtime.dtype)

        # A function that makes parameters cannot be traced apart.
        return normalize(inputs) if self.is_initializing() else self.runtime.recompute(normalize)(inputs)
