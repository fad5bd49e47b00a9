"""Properties of every encoder: both directions, padding without effect, positions only if requested."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.scan_params import scan_params

pytestmark = pytest.mark.usefixtures("strict_dtypes")
KINDS = ["none", "learned", "sinusoidal", "rotary", "alibi", "t5"]


@pytest.mark.parametrize("kind", KINDS)
def test_permutation_equivariance_only_without_positions(tiny, kind):
    config, tokens = tiny.config(kind, architecture="encoder"), tiny.tokens((2, 6))
    permutation = np.array([3, 5, 0, 1, 4, 2])
    hidden = tiny.forward(config)(tiny.params(config), tokens)
    permuted = tiny.forward(config)(tiny.params(config), tokens[:, permutation])
    difference = np.abs(permuted - hidden[:, permutation]).max()
    assert difference < 2e-5 if kind == "none" else difference > 1e-2
    # Positions are data: moved along with their tokens, order does not matter for any kind.
    positions = jnp.asarray(np.tile(permutation, (2, 1)), jnp.int32)
    moved = tiny.forward(config)(tiny.params(config), tokens[:, permutation], positions_BT=positions)
    np.testing.assert_allclose(moved, hidden[:, permutation], atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_at_two_indices_is_one_input_only_without_positions(tiny, kind):
    config, tokens = tiny.config(kind, architecture="encoder"), tiny.tokens((1, 6)).at[0, jnp.array([1, 4])].set(3)
    hidden = tiny.forward(config)(tiny.params(config), tokens)
    difference = np.abs(hidden[0, 1] - hidden[0, 4]).max()
    assert difference < 2e-5 if kind == "none" else difference > 1e-2


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_padding_has_no_effect(tiny, backend):
    config = tiny.config("learned", architecture="encoder", attention={"implementation": backend})
    tokens = tiny.tokens((2, 5))
    hidden = tiny.forward(config)(tiny.params(config), tokens)
    for fill in (0, 7):
        padded = jnp.pad(tokens, ((0, 0), (0, 3)), constant_values=fill)
        segments = jnp.tile(jnp.array([[1] * 5 + [0] * 3]), (2, 1))
        result = tiny.forward(config)(tiny.params(config), padded, segment_ids_BT=segments)
        np.testing.assert_allclose(result[:, :5], hidden, atol=2e-5)
    assert np.isfinite(result).all()


def test_every_token_sees_every_other(tiny):
    config, tokens = tiny.config("rotary", architecture="encoder"), tiny.tokens((1, 5))
    hidden = np.asarray(tiny.forward(config)(tiny.params(config), tokens))
    for place in range(5):
        changed = tiny.forward(config)(tiny.params(config), tokens.at[0, place].add(-1))
        assert (np.abs(changed - hidden).max(axis=(0, 2)) > 1e-4).all()


def test_packed_is_separate(tiny):
    config, documents = tiny.config("rotary", architecture="encoder"), tiny.tokens((2, 4))
    hidden = tiny.forward(config)(tiny.params(config), documents)
    packed = tiny.forward(config)(
        tiny.params(config),
        documents.reshape(1, 8),
        positions_BT=jnp.tile(jnp.arange(4), 2)[None],
        segment_ids_BT=jnp.repeat(jnp.array([3, 1]), 4)[None],
    )
    np.testing.assert_allclose(packed.reshape(hidden.shape), hidden, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_hidden_states(tiny, tied):
    config, tokens = tiny.config(architecture="encoder", tie_embeddings=tied), tiny.tokens((2, 5))
    params = tiny.params(config)
    hidden = tiny.forward(config)(params, tokens)
    kernel = params["token_embedding"]["embedding"].T if tied else params["output"]["kernel"]
    logits = tiny.forward(config, "logits")(params, tokens)
    np.testing.assert_allclose(logits, hidden @ kernel, atol=2e-5)


def test_scanned_bfloat16(tiny):
    config, tokens = tiny.config(architecture="encoder"), tiny.tokens((2, 5))
    expected = tiny.forward(config)(tiny.params(config), tokens)
    half = dataclasses.replace(config, dtype="bfloat16", scan_layers=True, remat="full")
    hidden = tiny.forward(half)(scan_params(tiny.params(config)), tokens)
    assert hidden.dtype == jnp.bfloat16
    assert np.abs(hidden.astype(jnp.float32) - expected).max() < 0.1 * np.abs(expected).max()


def test_dropout_in_training(tiny):
    config = tiny.config(architecture="encoder", dropout=0.5, num_layers=1)
    model, params, tokens = tiny.build(config), tiny.params(config), tiny.tokens((2, 5))
    dropped = tiny.jit(lambda key: model.apply({"params": params}, tokens, train=True, rngs={"dropout": key}))
    assert np.abs(dropped(jax.random.key(0)) - dropped(jax.random.key(1))).max() > 1e-2
