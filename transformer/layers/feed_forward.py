"""The position-wise feed-forward network, plain or gated."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.layers.linear import Linear
from transformer.layers.runtime import Runtime
from transformer.model_config import FeedForwardConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


def nonlinearity(config: FeedForwardConfig, runtime: Runtime) -> Callable[[Array], Array]:
    """The activation function of a network, in the type of its input."""

    @runtime.recompute
    def activation(x: Array) -> Array:
        # In float32: XLA's CPU backend takes up to four times as long for tanh and erf in a 16-bit type.
        return ACTIVATIONS[config.activation](x.astype(jnp.float32)).astype(x.dtype)

    return activation


def network(
    config: FeedForwardConfig,
    inputs: Float[Array, "*B D"],
    linear: Callable[[str, int, tuple[str, str]], Any],
    runtime: Runtime,
) -> Float[Array, "*B D"]:
    """Up, activation (or gate), down; `linear(role, features, axes)` makes the map of each role."""
    hidden_dim, activation = config.resolved_hidden_dim(inputs.shape[-1]), nonlinearity(config, runtime)
    hidden = linear("up", hidden_dim, ("embed", "hidden"))(inputs)
    if config.gated:
        hidden = activation(linear("gate", hidden_dim, ("embed", "hidden"))(inputs)) * hidden
    else:
        hidden = activation(hidden)
    if hidden.ndim == 3:
        hidden = runtime.constrain(hidden, "batch", "length", "hidden")
    return linear("down", inputs.shape[-1], ("hidden", "embed"))(hidden)


class FeedForward(nn.Module):
    """`down(activation(up(x)))`, or gated, `down(activation(gate(x)) * up(x))` (Shazeer 2020).

    Attributes:
        config: width, activation, gate, biases.
        runtime: types, initialisation, `dot_general` and sharding.

    Example:
        >>> layer = FeedForward(FeedForwardConfig(hidden_dim=16, gated=True))
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 8)))
        >>> sorted(variables["params"])
        ['down', 'gate', 'up']
    """

    config: FeedForwardConfig
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(self, inputs_BTD: Float[Array, "*B T D"]) -> Float[Array, "*B T D"]:
        """Map every token on its own."""
        if self.config.num_experts > 0:
            raise ValueError(
                f"FeedForward is one network, got num_experts={self.config.num_experts}; use MixtureOfExperts."
            )

        def linear(role: str, features: int, axes: tuple[str, str]) -> Linear:
            return Linear(
                features=(features,),
                axes=axes,
                use_bias=self.config.use_bias,
                init_scale=self.runtime.residual_init_scale if role == "down" else 1.0,
                runtime=self.runtime,
                name=role,
            )

        return network(self.config, inputs_BTD, linear, self.runtime)
