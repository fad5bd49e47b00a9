"""The linear layer is an einsum with a bias, whatever axes its kernel has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.linear import Linear
from transformer.layers.runtime import Runtime

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize(
    ("features", "axes", "shape", "einsum"),
    [
        ((5,), ("embed", "hidden"), (2, 3, 4), "btd,df->btf"),
        ((2, 3), ("embed", "heads", "head_dim"), (2, 3, 4), "btd,dhk->bthk"),
        ((4,), ("heads", "head_dim", "embed"), (2, 3, 2, 3), "bthk,hkd->btd"),
        ((5,), ("embed", "hidden"), (4,), "d,df->f"),
    ],
)
def test_linear_is_an_einsum(small, features, axes, shape, einsum):
    layer, inputs = Linear(features, axes, use_bias=True), small.normal(*shape)
    params = small.random_params(layer, inputs)
    np.testing.assert_allclose(
        small.apply(layer, params, inputs),
        np.einsum(einsum, inputs, params["kernel"]) + np.asarray(params["bias"]),
        atol=1e-5,
    )


def test_linear_casts_operands_and_result(small):
    seen = []

    def recording(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
        seen.append((lhs.dtype, rhs.dtype, preferred_element_type))
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)

    inputs = small.normal(2, 4)
    runtime = Runtime(dtype=jnp.bfloat16, dot_general=recording)
    for output_dtype in (None, jnp.float32):
        layer = Linear((3,), ("embed", "hidden"), output_dtype=output_dtype, runtime=runtime)
        params = small.random_params(layer, inputs)
        seen.clear()
        out = small.apply(layer, params, inputs)
        expected = output_dtype or jnp.bfloat16
        assert params["kernel"].dtype == jnp.float32
        assert out.dtype == expected
        assert seen == [(jnp.bfloat16, jnp.bfloat16, jnp.dtype(expected))]


@pytest.mark.parametrize(("std", "scale", "expected"), [(0.02, 1.0, 0.02), (0.02, 0.5, 0.01), (0.0, 0.5, 0.05)])
def test_initial_scale(std, scale, expected):
    initializer = Runtime(init_std=std).initializer(100, ("embed", "hidden"), scale)
    values = initializer(jax.random.key(0, impl="unsafe_rbg"), (100, 300), jnp.float32)
    np.testing.assert_allclose(np.std(values), expected, rtol=0.03)
