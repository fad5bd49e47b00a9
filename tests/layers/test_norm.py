"""Norms against their formulas in float64, and their float32 statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.norm import Normalize
from transformer.layers.runtime import Runtime
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.norms.rms_norm import RMSNorm

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def layer_norm(x, scale, bias, epsilon):
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


def rms_norm(x, scale, bias, epsilon):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("config", "formula", "names"),
    [
        (LayerNorm(epsilon=0.1), layer_norm, ["scale"]),
        (LayerNorm(use_bias=True), layer_norm, ["bias", "scale"]),
        (RMSNorm(epsilon=0.1), rms_norm, ["scale"]),
        (RMSNorm(unit_offset=True), lambda x, scale, bias, epsilon: rms_norm(x, 1 + scale, bias, epsilon), ["scale"]),
    ],
)
def test_norm_is_its_formula(small, config, formula, names, dtype):
    layer = Normalize(config, runtime=Runtime(dtype=dtype))
    inputs = (3 + 2 * small.normal(2, 3, 8)).astype(dtype)
    params = small.random_params(layer, inputs)
    assert sorted(params) == names
    out = small.apply(layer, params, inputs)
    assert out.dtype == dtype
    double = {name: np.asarray(value, np.float64) for name, value in {"bias": 0.0, **params}.items()}
    expected = formula(np.asarray(inputs, np.float64), double["scale"], double["bias"], config.epsilon)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-5 if dtype == jnp.float32 else 0.03)


def test_statistics_are_float32(small):
    # In bfloat16, 1000 +- 4 has two neighbours only and a mean that rounds away from all of them.
    inputs = jnp.array([[1000.0, 1004.0] * 32], jnp.bfloat16)
    layer = Normalize(LayerNorm(), runtime=Runtime(dtype=jnp.bfloat16))
    out = small.apply(layer, small.random_params(layer, inputs) | {"scale": jnp.ones(64)}, inputs)
    np.testing.assert_allclose(np.asarray(out, np.float32), [[-1.0, 1.0] * 32])
    large = jnp.full((1, 64), 300.0, jnp.float16)  # its square is beyond float16
    layer = Normalize(RMSNorm(), runtime=Runtime(dtype=jnp.float16))
    out = small.apply(layer, {"scale": jnp.ones(64)}, large)
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0)


def test_the_offset_is_added_in_float32(small):
    """1 + 2^-10 is 1 in bfloat16, which has 8 bits."""
    layer = Normalize(RMSNorm(unit_offset=True), runtime=Runtime(param_dtype=jnp.bfloat16))
    out = small.apply(layer, {"scale": jnp.full(4, 2.0**-10, jnp.bfloat16)}, jnp.ones((1, 4)))
    np.testing.assert_allclose(out, (1 + 2.0**-10) / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_array_equal(layer.init(jax.random.key(0), jnp.ones((1, 4)))["params"]["scale"], 0)


def test_several_axes_are_normalised_together(small):
    inputs, layer = small.normal(2, 3, 4, 5), Normalize(RMSNorm(), axes=("heads", "head_dim"))
    params = small.random_params(layer, inputs)
    x = np.asarray(inputs, np.float64)
    expected = x / np.sqrt((x**2).mean(axis=(-2, -1), keepdims=True) + 1e-5) * np.asarray(params["scale"], np.float64)
    assert params["scale"].shape == (4, 5)
    np.testing.assert_allclose(small.apply(layer, params, inputs), expected, atol=2e-5)
