"""The prefix-LM objective: which tokens are a prefix, and the loss of what follows them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.objectives.prefix_lm import PrefixLM, prefix_tokens
from transformer.ops.positions.learned import LearnedPositions
from transformer.types import Batch


@pytest.fixture(scope="module")
def model():
    return Decoder(
        ModelConfig(
            vocab_size=7,
            num_layers=2,  # one layer sees only embeddings, which no mask changes
            embed_dim=8,
            pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
            init_std=0.7,
        ),
        bidirectional_prefix=True,
    )


WEIGHTS = np.array([[0, 0, 1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0]], np.float32)
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
PREFIX = np.array([[1, 1, 1, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 1, 1]], bool)


def make_batch():
    inputs, targets = np.random.default_rng(1).integers(0, 7, (2, 2, 8)).astype(np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 0, 0]], np.int32)
    return jax.tree.map(jnp.asarray, Batch(inputs, targets, WEIGHTS, SEGMENTS, positions))


def test_a_prefix_ends_where_the_first_target_counts():
    np.testing.assert_array_equal(jax.jit(prefix_tokens)(WEIGHTS, SEGMENTS), PREFIX)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_prefixes_by_definition(row):
    weights = np.array([[float(counts) for counts, _ in row]], np.float32)
    segments = np.cumsum([[starts for _, starts in row]], axis=1).astype(np.int32)
    expected = [
        not any(weights[0, i] > 0 for i in range(j) if segments[0, i] == segments[0, j]) for j in range(len(row))
    ]
    assert np.asarray(prefix_tokens(weights, segments))[0].tolist() == expected


def test_sums_are_over_what_follows_the_prefix(model):
    batch = make_batch()
    params = model.init(jax.random.key(0), batch.inputs)["params"]
    objective = PrefixLM().bind(model, None)
    (loss_sum, weight_sum), (carry, statistics) = objective.loss(params, (), batch, jax.random.key(0), False)
    logits = model.apply(
        {"params": params},
        batch.inputs,
        positions_BT=batch.positions,
        segment_ids_BT=batch.segment_ids,
        prefix_BT=jnp.asarray(PREFIX),
    )
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch.targets[..., None], -1)[..., 0]
    assert carry == ()
    assert float(weight_sum) == float(objective.weight(batch)) == 7
    np.testing.assert_allclose(loss_sum, (nll * WEIGHTS).sum(), rtol=1e-5)
    assert set(statistics) == {"loss", "weight", "correct", "objective"}


def test_positions_are_those_of_the_batch():
    """Positions of each document of a row; not rotary ones, since their distances equal distances of indices."""
    block = BlockConfig(AttentionConfig(num_heads=2))
    model = Decoder(
        ModelConfig(
            vocab_size=7,
            num_layers=1,
            embed_dim=8,
            max_length=8,
            pattern=(block,),
            positions=LearnedPositions(),
            init_std=0.7,
        ),
        bidirectional_prefix=True,
    )
    batch = make_batch()
    params = jax.jit(model.init)(jax.random.key(0), batch.inputs)["params"]
    sums = jax.jit(PrefixLM().bind(model, None).loss, static_argnums=4)

    def loss(batch):
        return float(sums(params, (), batch, jax.random.key(0), False)[0][0])

    logits = jax.jit(model.apply)(
        {"params": params},
        batch.inputs,
        positions_BT=batch.positions,
        segment_ids_BT=batch.segment_ids,
        prefix_BT=jnp.asarray(PREFIX),
    )
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch.targets[..., None], -1)[..., 0]
    assert loss(batch) == pytest.approx((nll * WEIGHTS).sum(), rel=1e-5)
    indices = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
    assert abs(loss(batch._replace(positions=indices)) - loss(batch)) > 1e-2
