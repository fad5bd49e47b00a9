"""Norms against their formulas in float64, and their float32 statistics."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.norm import LayerNorm, RMSNorm, make_norm
from transformer.model_config import NormConfig

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def layer_norm(x, scale, bias, epsilon):
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


def rms_norm(x, scale, bias, epsilon):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("config", "kind", "formula"),
    [
        (NormConfig("layer_norm", epsilon=0.1), LayerNorm, layer_norm),
        (NormConfig("layer_norm", use_bias=True), LayerNorm, layer_norm),
        (NormConfig("rms_norm", epsilon=0.1), RMSNorm, rms_norm),
    ],
)
def test_norm_is_its_formula(small, config, kind, formula, dtype):
    layer = make_norm(config, dtype=dtype)
    assert isinstance(layer, kind)
    inputs = (3 + 2 * small.normal(2, 3, 8)).astype(dtype)
    params = small.random_params(layer, inputs)
    assert sorted(params) == (["bias", "scale"] if config.use_bias else ["scale"])
    out = small.apply(layer, params, inputs)
    assert out.dtype == dtype
    double = {name: np.asarray(value, np.float64) for name, value in {"bias": 0.0, **params}.items()}
    expected = formula(np.asarray(inputs, np.float64), double["scale"], double["bias"], config.epsilon)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=2e-5 if dtype == jnp.float32 else 0.03)


def test_statistics_are_float32(small):
    # In bfloat16, 1000 +- 4 has two neighbours only and a mean that rounds away from all of them.
    inputs = jnp.array([[1000.0, 1004.0] * 32], jnp.bfloat16)
    layer = LayerNorm(dtype=jnp.bfloat16)
    out = small.apply(layer, small.random_params(layer, inputs) | {"scale": jnp.ones(64)}, inputs)
    np.testing.assert_allclose(np.asarray(out, np.float32), [[-1.0, 1.0] * 32])
    large = jnp.full((1, 64), 300.0, jnp.float16)  # its square is beyond float16
    layer = RMSNorm(dtype=jnp.float16)
    out = small.apply(layer, {"scale": jnp.ones(64)}, large)
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0)
