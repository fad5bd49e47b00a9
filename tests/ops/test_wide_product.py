"""Logits in float32 from bfloat16 operands: as precise as before, and no gradient is a float32 array of a kernel's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from transformer.layers.embedding import Embed
from transformer.layers.linear import Linear
from transformer.layers.runtime import Runtime
from transformer.ops.wide_product import dot_general, wide_product

SHAPES = {"logits": ((2, 5, 8), (8, 16), 1), "two axes": ((3, 2, 4), (2, 4, 8), 2)}


def loss_of(product):
    return lambda lhs, rhs: jnp.sum(jnp.sin(product(lhs, rhs)))


@pytest.mark.parametrize("name", SHAPES)
def test_values_equal_and_gradients_are_rounded_once(name):
    lhs_shape, rhs_shape, contracted = SHAPES[name]
    keys = jax.random.split(jax.random.key(0))
    lhs, rhs = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, (lhs_shape, rhs_shape), strict=True))
    axes = tuple(range(len(lhs_shape) - contracted, len(lhs_shape))), tuple(range(contracted))

    def ours(lhs, rhs):
        return wide_product(contracted, lhs, rhs)

    def plain(lhs, rhs):
        return lax.dot_general(lhs, rhs, (axes, ((), ())), preferred_element_type=jnp.float32)

    np.testing.assert_allclose(ours(lhs, rhs), plain(lhs, rhs), rtol=1e-6)
    assert ours(lhs, rhs).dtype == jnp.float32
    found = jax.grad(loss_of(ours), (0, 1))(lhs, rhs)
    expected = jax.grad(loss_of(plain), (0, 1))(lhs.astype(jnp.float32), rhs.astype(jnp.float32))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2e-2 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_has_no_float32_gradient_of_its_size(tied):
    hidden = jnp.ones((2, 5, 8), jnp.bfloat16)
    runtime = Runtime(dtype=jnp.bfloat16, dot_general=dot_general)
    if tied:
        layer, method = Embed(24, 8, runtime=runtime), "attend"
    else:
        layer, method = Linear((24,), ("embed", "vocab"), output_dtype=jnp.float32, runtime=runtime), "__call__"
    variables = layer.init(jax.random.key(0), hidden, method=method)

    def loss(variables):
        return jnp.sum(jnp.sin(layer.apply(variables, hidden, method=method)))

    lowered = jax.jit(jax.grad(loss)).lower(variables).as_text()
    results = [line.split("->")[1] for line in lowered.splitlines() if "dot_general" in line and "->" in line]
    assert any("tensor<2x5x24xf32>" in result for result in results)
    assert any("tensor<8x24xbf16>" in result for result in results)
    assert not any("tensor<8x24xf32>" in result for result in results)


def test_other_products_agree_with_lax():
    x, batched = jnp.ones((3, 3, 3), jnp.bfloat16), (((2,), (1,)), ((0,), (0,)))
    for operand, numbers, result in (
        (x, batched, jnp.float32),
        (x, (((2,), (0,)), ((), ())), jnp.bfloat16),
        (x.astype(jnp.float32), (((2,), (0,)), ((), ())), jnp.float32),
    ):
        jaxpr = jax.make_jaxpr(lambda a, n=numbers, r=result: dot_general(a, a, n, preferred_element_type=r))(operand)
        assert "custom_vjp" not in str(jaxpr)
