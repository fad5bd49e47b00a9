"""The CPU's dense product equals `lax.dot_general`, in values and gradients, under every transformation a trainer uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from transformer.ops.dense_cpu import dot_general

# Activations, weights, and how many axes are contracted: a query, an output projection, a feed-forward layer.
SHAPES = {"query": ((2, 5, 8), (8, 2, 4), 1), "out": ((2, 5, 2, 4), (2, 4, 8), 2), "up": ((3, 8), (8, 16), 1)}
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def operands(name, dtype):
    lhs, rhs, contracted = SHAPES[name]
    keys = jax.random.split(jax.random.key(0))
    numbers = ((tuple(range(len(lhs) - contracted, len(lhs))), tuple(range(contracted))), ((), ()))
    return jax.random.normal(keys[0], lhs, dtype), jax.random.normal(keys[1], rhs, dtype), numbers


def loss(product, numbers, result=None):
    def scalar(lhs, rhs):
        out = product(lhs, rhs, numbers, preferred_element_type=result)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    return scalar


@pytest.mark.parametrize("result", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_equal_lax(name, dtype, result, strict_dtypes):
    lhs, rhs, numbers = operands(name, dtype)
    ours = jax.jit(jax.value_and_grad(loss(dot_general, numbers, result), (0, 1)))(lhs, rhs)
    reference = jax.jit(jax.value_and_grad(loss(lax.dot_general, numbers, result), (0, 1)))(lhs, rhs)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert mine.dtype == theirs.dtype
        scale = np.abs(np.asarray(theirs, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), np.asarray(theirs, np.float32), atol=TOLERANCE[dtype] * scale, rtol=0
        )


def test_under_vmap_scan_and_remat():
    lhs, rhs, numbers = operands("up", jnp.float32)
    stacked = jnp.stack([rhs, -rhs])

    def total(product):
        def step(carry, weights):
            out = jax.checkpoint(lambda w: product(lhs, w, numbers))(weights)
            return carry + jnp.sum(jnp.sin(out)), None

        def scanned(weights):
            return lax.scan(step, jnp.zeros(()), weights)[0]

        return jax.jit(jax.vmap(jax.grad(scanned)))(jnp.stack([stacked, 2 * stacked]))

    np.testing.assert_allclose(total(dot_general), total(lax.dot_general), rtol=1e-4, atol=1e-5)


def test_other_products_are_left_alone():
    x = jnp.ones((2, 3, 4))
    batched = (((2,), (2,)), ((0,), (0,)))
    jaxpr = str(jax.make_jaxpr(lambda x: dot_general(x, x, batched))(x))
    assert "custom_vjp" not in jaxpr
    np.testing.assert_array_equal(dot_general(x, x, batched), lax.dot_general(x, x, batched))


def test_other_platforms_get_the_plain_gradient():
    lhs, rhs, numbers = operands("query", jnp.float32)
    gradient = jax.jit(jax.grad(loss(dot_general, numbers), (0, 1)))
    cpu, tpu = (gradient.trace(lhs, rhs).lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu"))
    # Folding (batch, time) is a reshape of the activations, and only the CPU's program has it.
    assert "tensor<10x8xf32>" in cpu
    assert "tensor<10x8xf32>" not in tpu
