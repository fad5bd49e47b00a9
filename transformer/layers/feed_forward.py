"""The position-wise feed-forward network, plain or gated."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.layers.linear import DotGeneral, Linear
from transformer.model_config import FeedForwardConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


class FeedForward(nn.Module):
    """`down(activation(up(x)))`, or gated, `down(activation(gate(x)) * up(x))` (Shazeer 2020).

    Attributes:
        config: width, activation, gate, biases.
        init_std: standard deviation of initial kernels; 0 means 1 / sqrt(fan_in).
        residual_init_scale: multiplies that of `down`.
        dtype: of activations and products.
        param_dtype: of the parameters.
        dot_general: replaces `jax.lax.dot_general`.

    Example:
        >>> layer = FeedForward(FeedForwardConfig(hidden_dim=16, gated=True))
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 8)))
        >>> sorted(variables["params"])
        ['down', 'gate', 'up']
    """

    config: FeedForwardConfig
    init_std: float = 0.0
    residual_init_scale: float = 1.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(self, inputs_BTD: Float[Array, "*B T D"]) -> Float[Array, "*B T D"]:
        """Map every position on its own."""
        embed_dim = inputs_BTD.shape[-1]
        hidden_dim = self.config.hidden_dim or 4 * embed_dim

        def activation(x_BTF: Array) -> Array:
            # In float32: in a 16-bit type, XLA's CPU backend takes up to four times as long over tanh and erf.
            return ACTIVATIONS[self.config.activation](x_BTF.astype(jnp.float32)).astype(self.dtype)

        def linear(role: str, features: int, axes: tuple[str, str], scale: float = 1.0) -> Linear:
            return Linear(
                features=(features,),
                axes=axes,
                use_bias=self.config.use_bias,
                init_std=self.init_std,
                init_scale=scale,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                dot_general=self.dot_general,
                name=role,
            )

        hidden_BTF = linear("up", hidden_dim, ("embed", "hidden"))(inputs_BTD)
        if self.config.gated:
            hidden_BTF = activation(linear("gate", hidden_dim, ("embed", "hidden"))(inputs_BTD)) * hidden_BTF
        else:
            hidden_BTF = activation(hidden_BTF)
        return linear("down", embed_dim, ("hidden", "embed"), self.residual_init_scale)(hidden_BTF)
