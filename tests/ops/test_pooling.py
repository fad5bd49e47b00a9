"""Pooling leaves padding out, whatever it holds, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.model_kinds import POOLINGS

KINDS = POOLINGS.names


def pool(x, valid, kind, scores=None):
    return POOLINGS.find(kind)()(x, valid, lambda: scores)


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(3, 5, 4)), jnp.float32)
    valid = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
    return x, valid, jnp.asarray(generator.normal(size=(3, 5)), jnp.float32)


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition_on_the_valid_part(arrays, kind):
    x, valid, scores = arrays
    pooled = pool(x, valid, kind, scores)
    for row, length in enumerate((3, 5, 1)):
        part, weights = np.asarray(x[row, :length]), np.exp(np.asarray(scores[row, :length]))
        expected = {
            "mean": part.mean(axis=0),
            "max": part.max(axis=0),
            "first": part[0],
            "last": part[-1],
            "attention": (weights / weights.sum()) @ part,
        }[kind]
        np.testing.assert_allclose(pooled[row], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gets_no_gradient_and_has_no_influence(arrays, kind):
    x, valid, scores = arrays
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(pool(x, valid, kind, scores))))(x)
    assert not np.asarray(gradient)[~np.asarray(valid)].any()
    assert np.asarray(gradient)[np.asarray(valid)].any()
    other = jnp.where(valid[..., None], x, 1e9)
    np.testing.assert_array_equal(pool(other, valid, kind, scores), pool(x, valid, kind, scores))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_padding_is_zeros_with_a_finite_gradient(arrays, kind):
    x, valid, scores = arrays
    nothing = jnp.zeros_like(valid)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(pool(x, nothing, kind, scores)))(x)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)


def test_half_precision_is_pooled_in_float32(arrays):
    x, valid, _ = arrays
    half = x.astype(jnp.bfloat16)
    pooled = pool(half, valid, "mean")
    assert pooled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pooled, pool(half.astype(jnp.float32), valid, "mean").astype(jnp.bfloat16))
