"""The feed-forward layer is a convolution of width 1."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.feed_forward import ACTIVATIONS, FeedForward
from transformer.layers.runtime import Runtime
from transformer.model_config import FeedForwardConfig

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def convolution(x_BTD, params):
    """A convolution over time with a kernel one step wide."""
    kernel = params["kernel"][None]
    out = jax.lax.conv_general_dilated(x_BTD, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    return out + params.get("bias", jnp.zeros(out.shape[-1]))[None, None]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_is_a_convolution_of_width_one(small, activation, gated):
    layer = FeedForward(FeedForwardConfig(12, activation, gated, use_bias=gated))
    inputs = small.normal(2, 5, 8)
    params = small.random_params(layer, inputs)

    @small.jit
    def convolved(params, inputs):
        hidden = convolution(inputs, params["up"])
        function = ACTIVATIONS[activation]
        hidden = function(convolution(inputs, params["gate"])) * hidden if gated else function(hidden)
        return convolution(hidden, params["down"])

    np.testing.assert_allclose(small.apply(layer, params, inputs), convolved(params, inputs), atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_output_is_a_sum_of_values_weighted_by_how_well_keys_match(small, gated):
    """The memory of Geva et al. 2021: a unit's column of `up` is its key, its row of `down` its value."""
    layer, inputs = FeedForward(FeedForwardConfig(12, "relu", gated)), small.normal(2, 5, 8)
    params = small.random_params(layer, inputs)
    kernels = {role: np.asarray(params[role]["kernel"], np.float64) for role in params}
    x, expected = np.asarray(inputs, np.float64), np.zeros(inputs.shape)
    for unit in range(12):
        match = x @ kernels["up"][:, unit]
        weight = np.maximum(x @ kernels["gate"][:, unit], 0) * match if gated else np.maximum(match, 0)
        expected += weight[..., None] * kernels["down"][unit]
    np.testing.assert_allclose(small.apply(layer, params, inputs), expected, atol=1e-5)


def test_activations_are_what_they_are_called():
    x = np.linspace(-3, 3, 13)
    erf = np.vectorize(math.erf)
    expected = {
        "relu": np.maximum(x, 0),
        "gelu": x * (1 + erf(x / np.sqrt(2))) / 2,
        "gelu_tanh": x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
        "silu": x / (1 + np.exp(-x)),
        "relu_squared": np.maximum(x, 0) ** 2,
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), values, atol=1e-5, err_msg=name)


def test_hidden_width_defaults_to_four_times(small):
    params = small.random_params(FeedForward(FeedForwardConfig()), small.normal(1, 2, 8))
    assert params["up"]["kernel"].shape == (8, 32)


def test_bfloat16(small):
    config, inputs = FeedForwardConfig(12, "silu", gated=True, use_bias=True), small.normal(2, 5, 8)
    params = small.random_params(FeedForward(config), inputs)
    out = small.apply(FeedForward(config, runtime=Runtime(dtype=jnp.bfloat16)), params, inputs.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    expected = small.apply(FeedForward(config), params, inputs)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.1)
