"""Cross-entropy against its definition, written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.ops.losses import cross_entropy


@pytest.fixture
def logits_and_targets():
    generator = np.random.default_rng(0)
    return generator.normal(size=(2, 3, 5)).astype(np.float32) * 4, generator.integers(0, 5, (2, 3)).astype(np.int32)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.usefixtures("strict_dtypes")
def test_equals_the_definition(logits_and_targets, label_smoothing, z_loss):
    logits, targets = logits_and_targets
    loss, nll, _ = cross_entropy(
        jnp.asarray(logits), jnp.asarray(targets), label_smoothing=label_smoothing, z_loss=z_loss
    )
    exact = logits.astype(np.float64)
    normalizer = np.log(np.exp(exact).sum(-1))
    log_p = exact - normalizer[..., None]
    wanted = np.full(exact.shape, label_smoothing / exact.shape[-1])
    np.put_along_axis(wanted, targets[..., None], 1 - label_smoothing + label_smoothing / exact.shape[-1], axis=-1)
    np.testing.assert_allclose(nll, -np.take_along_axis(log_p, targets[..., None], -1)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(loss, -(wanted * log_p).sum(-1) + z_loss * normalizer**2, rtol=1e-5)


def test_far_logits_neither_overflow_nor_vanish():
    loss, nll, _ = cross_entropy(jnp.array([[1e4, 0.0], [-1e4, 0.0]]), jnp.array([0, 0]))
    np.testing.assert_allclose(nll, [0.0, 1e4])
    np.testing.assert_array_equal(loss, nll)


def test_half_precision_logits_are_scored_in_float32(logits_and_targets):
    logits, targets = logits_and_targets
    half = jnp.asarray(logits, jnp.bfloat16)
    loss, nll, _ = cross_entropy(half, jnp.asarray(targets), z_loss=1e-3)
    assert loss.dtype == nll.dtype == jnp.float32
    np.testing.assert_array_equal(nll, cross_entropy(half.astype(jnp.float32), jnp.asarray(targets))[1])


@pytest.mark.parametrize(
    "settings", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"label_smoothing": 1.0, "z_loss": 0.1}]
)
def test_an_impossible_token_is_as_if_it_were_not_there(settings):
    logits, targets = jnp.array([[1.0, 3.0, 2.0]]), jnp.array([2])
    longer = jnp.array([[1.0, -jnp.inf, 3.0, 2.0]])

    def loss(logits, targets):
        return cross_entropy(logits, targets, **settings)[0].sum()

    np.testing.assert_allclose(loss(longer, targets + 1), loss(logits, targets), rtol=1e-6)
    gradient = jax.grad(loss)(longer, targets + 1)
    np.testing.assert_allclose(gradient[0, jnp.array([0, 2, 3])], jax.grad(loss)(logits, targets)[0], rtol=1e-6)
    assert gradient[0, 1] == 0
    assert cross_entropy(longer, jnp.array([1]), **settings)[1] == jnp.inf


@pytest.mark.parametrize("target", [-1, -100, 3, 1000])
def test_a_target_outside_the_logits_is_nan(target):
    for settings in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}):
        loss, nll, _ = jax.jit(lambda t, s=settings: cross_entropy(jnp.zeros((1, 3)), t, **s))(jnp.array([target]))
        assert np.isnan(loss).all() and np.isnan(nll).all()
