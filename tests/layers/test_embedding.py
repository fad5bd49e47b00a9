"""Look-ups, tied products and position vectors."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.embedding import Embed
from transformer.layers.positions import PositionEmbedding
from transformer.layers.runtime import Runtime
from transformer.model_kinds import POSITIONS
from transformer.ops.positions.learned import LearnedPositions
from transformer.ops.positions.sinusoidal import SinusoidalPositions, sinusoidal

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_embed_looks_up_and_scales(small):
    table, indices = small.normal(5, 4), jnp.array([[3, 0, 3]])
    np.testing.assert_array_equal(small.apply(Embed(5, 4), {"embedding": table}, indices), table[indices])
    scaled = small.apply(Embed(5, 4, scale=True), {"embedding": table}, indices)
    np.testing.assert_allclose(scaled, 2 * table[indices], rtol=1e-6)
    half = small.apply(Embed(5, 4, runtime=Runtime(dtype=jnp.bfloat16)), {"embedding": table}, indices)
    np.testing.assert_array_equal(half, table[indices].astype(jnp.bfloat16))


def test_a_token_beyond_the_table_is_nan(small):
    out = small.apply(Embed(5, 4), {"embedding": small.normal(5, 4)}, jnp.array([4, 5]))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attend_is_a_product_in_float32(small, dtype):
    table, hidden = small.normal(5, 4), small.normal(2, 3, 4, seed=1)
    logits = small.apply(Embed(5, 4, runtime=Runtime(dtype=dtype)), {"embedding": table}, hidden, method="attend")
    assert logits.dtype == jnp.float32
    exact = hidden.astype(dtype).astype(jnp.float32) @ table.astype(dtype).astype(jnp.float32).T
    np.testing.assert_allclose(logits, exact, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "rotary", "alibi", "sinusoidal", "learned"])
def test_position_vectors(small, kind):
    inputs, positions = small.normal(2, 3, 4), jnp.array([[0, 1, 2], [5, 0, 1]])
    config = SinusoidalPositions(theta=100.0) if kind == "sinusoidal" else POSITIONS.find(kind)()
    layer = PositionEmbedding(config, max_length=6)
    params = small.random_params(layer, inputs, positions)
    assert sorted(params) == (["embedding"] if kind == "learned" else [])
    added = 0
    if kind == "learned":
        added = params["embedding"][positions]
    elif kind == "sinusoidal":
        added = sinusoidal(positions, 4, theta=100.0)
    np.testing.assert_allclose(small.apply(layer, params, inputs, positions), inputs + added, atol=1e-6)


def test_rows_before_position_0(small):
    """RoBERTa's table: position p has row p + 2, and those before it are of no position."""
    plain, offset = (PositionEmbedding(LearnedPositions(rows), max_length=6) for rows in (0, 2))
    inputs, positions = small.normal(2, 3, 8), jnp.array([[0, 5, 2]])
    params = small.random_params(offset, inputs, positions)
    assert params["embedding"].shape == (8, 8)
    expected = small.apply(plain, {"embedding": params["embedding"][2:]}, inputs, positions)
    np.testing.assert_array_equal(small.apply(offset, params, inputs, positions), expected)
    np.testing.assert_allclose(expected[0, 0], inputs[0, 0] + params["embedding"][2], rtol=1e-6)
    beyond = small.apply(offset, params, inputs, jnp.array([[-1, 6, 0]]))
    assert np.isnan(beyond[:, :2]).all() and np.isfinite(beyond[:, 2]).all()


def test_learned_positions_end(small):
    inputs = small.normal(1, 3, 4)
    layer = PositionEmbedding(LearnedPositions(), max_length=2)
    with pytest.raises(ValueError, match="Learned positions reach max_length=2 tokens, got 3; raise max_length"):
        small.random_params(layer, inputs, jnp.array([[0, 1, 2]]))
    layer = PositionEmbedding(LearnedPositions(), max_length=3)
    beyond = jnp.array([[0, 1, 3]])
    out = small.apply(layer, small.random_params(layer, inputs, beyond), inputs, beyond)
    assert np.isfinite(out[0, :2]).all()
    assert np.isnan(out[0, 2]).all()
