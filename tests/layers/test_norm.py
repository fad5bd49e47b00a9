"""Norms against their formulas in float64, and their float32 statistics."""

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
