"""Normalisation, with float32 statistics for activations of any type."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.layers.runtime import Runtime
from transformer.model_kinds import Norm


class Normalize(nn.Module):
    """The configured norm, over the last axis or the last axes together; parameters `scale` and, if configured, `bias`.

    Attributes:
        config: the kind of norm.
        axes: logical names of the normalised axes.
        runtime: types.

    Example:
        >>> import jax
        >>> from transformer.ops.norms.rms_norm import RMSNorm
        >>> y, variables = Normalize(RMSNorm()).init_with_output(jax.random.key(0), jnp.array([3.0, 4.0]))
        >>> float(jnp.mean(y * y)).__round__(3)
        1.0
    """

    config: Norm
    axes: tuple[str | None, ...] = ("norm",)
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise each vector; the result has the runtime's dtype."""
        others, shape = inputs.shape[: -len(self.axes)], inputs.shape[-len(self.axes) :]

        def vector(name: str, fill: float) -> Array:
            parameter = self.runtime.parameter(self, name, shape, self.axes, fill=fill)
            return parameter.astype(jnp.float32).reshape((1,) * len(others) + (-1,))

        def normalize(x: Array) -> Array:
            x = x.astype(jnp.float32).reshape(*others, -1)
            return self.config.normalize(x, vector).astype(self.runtime.dtype).reshape(inputs.shape)

        # `recomputed` cannot trace a function that makes parameters.
        return normalize(inputs) if self.is_initializing() else self.runtime.recompute(normalize)(inputs)
