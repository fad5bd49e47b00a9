"""Cross-entropy against its definition, written out in float64."""

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
    loss, nll = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), label_smoothing=label_smoothing, z_loss=z_loss)
    exact = logits.astype(np.float64)
    normalizer = np.log(np.exp(exact).sum(-1))
    log_p = exact - normalizer[..., None]
    wanted = np.full(exact.shape, label_smoothing / exact.shape[-1])
    np.put_along_axis(wanted, targets[..., None], 1 - label_smoothing + label_smoothing / exact.shape[-1], axis=-1)
    np.testing.assert_allclose(nll, -np.take_along_axis(log_p, targets[..., None], -1)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(loss, -(wanted * log_p).sum(-1) + z_loss * normalizer**2, rtol=1e-5)


def test_far_logits_neither_overflow_nor_vanish():
    loss, nll = cross_entropy(jnp.array([[1e4, 0.0], [-1e4, 0.0]]), jnp.array([0, 0]))
    np.testing.assert_allclose(nll, [0.0, 1e4])
    np.testing.assert_array_equal(loss, nll)


def test_half_precision_logits_are_scored_in_float32(logits_and_targets):
    logits, targets = logits_and_targets
    half = jnp.asarray(logits, jnp.bfloat16)
    loss, nll = cross_entropy(half, jnp.asarray(targets), z_loss=1e-3)
    assert loss.dtype == nll.dtype == jnp.float32
    np.testing.assert_array_equal(nll, cross_entropy(half.astype(jnp.float32), jnp.asarray(targets))[1])
