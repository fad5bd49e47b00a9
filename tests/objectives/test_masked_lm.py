"""Masked language modelling: the loss of the masked tokens, computed for them alone, equals the loss of a full pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import Config
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.encoder import Encoder
from transformer.objectives.masked_lm import MaskedLM
from transformer.ops.positions.learned import LearnedPositions
from transformer.parts import Parts, StandIn
from transformer.types import Batch, UserError

CONFIG = MaskedLM(mask_rate=0.4)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request):
    return Encoder(
        ModelConfig(
            vocab_size=9,
            num_layers=1,
            embed_dim=8,
            pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
            tie_embeddings=request.param,
            init_std=0.7,
        )
    )


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(1)
    inputs, targets = jnp.asarray(generator.integers(0, 9, (2, 3, 10)), jnp.int32)
    weights = np.zeros((3, 10), np.float32)
    weights[0, [1, 3, 8, 9]] = 1  # as many as may be hidden
    weights[1, [5]] = 1
    segments = jnp.asarray([[1] * 5 + [2] * 5, [1] * 10, [0] * 10], jnp.int32)
    positions = jnp.asarray([[*range(5), *range(5)], [*range(10)], [0] * 10], jnp.int32)
    return Batch(inputs, targets, jnp.asarray(weights), segments, positions)


def full_pass(model, params, batch):
    logits = model.apply(
        {"params": params},
        batch.inputs,
        positions_BT=batch.positions,
        segment_ids_BT=batch.segment_ids,
        method="logits",
    )
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    hits = (jnp.argmax(logits, axis=-1) == batch.targets).astype(jnp.float32)
    return jnp.sum(nll * batch.weights), jnp.sum(hits * batch.weights)


def test_equals_a_full_pass_in_value_and_gradient(model, batch):
    params = model.init(jax.random.key(0), batch.inputs, method="logits")["params"]
    objective = CONFIG.bind(model, None)

    def loss(params):
        (loss_sum, weight_sum), (_, statistics) = objective.loss(params, (), batch, jax.random.key(0), False)
        return loss_sum, (weight_sum, statistics)

    (value, (weight, statistics)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    (expected, hits), expected_gradient = jax.value_and_grad(lambda p: full_pass(model, p, batch), has_aux=True)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert float(weight) == float(objective.weight(batch)) == 5
    assert float(statistics["correct"]) == float(hits)
    assert "bytes" not in statistics
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_positions_are_those_of_the_batch(batch):
    """Positions of each document of a row; not rotary ones, since their distances equal distances of indices."""
    config = ModelConfig(
        vocab_size=9,
        num_layers=1,
        embed_dim=8,
        max_length=10,
        pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
        positions=LearnedPositions(),
        init_std=0.7,
    )
    model = Encoder(config)
    params = jax.jit(lambda key: model.init(key, batch.inputs, method="logits"))(jax.random.key(0))["params"]
    loss = jax.jit(CONFIG.bind(model, None).loss, static_argnums=4)
    (value, _), _ = loss(params, (), batch, jax.random.key(0), False)
    expected, _ = jax.jit(lambda params: full_pass(model, params, batch))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    elsewhere = batch._replace(positions=jnp.broadcast_to(jnp.arange(10, dtype=jnp.int32), (3, 10)))
    (other, _), _ = loss(params, (), elsewhere, jax.random.key(0), False)
    assert abs(float(other - value)) > 1e-2


def test_dropout_is_drawn_from_the_steps_key(batch):
    model = Encoder(ModelConfig(vocab_size=9, num_layers=1, embed_dim=8, dropout=0.5, init_std=0.7))
    params = jax.jit(lambda key: model.init(key, batch.inputs, method="logits"))(jax.random.key(0))["params"]
    loss = jax.jit(CONFIG.bind(model, None).loss, static_argnums=4)
    first, again, other, plain, still = (
        float(loss(params, (), batch, jax.random.key(seed), train)[0][0])
        for seed, train in ((1, True), (1, True), (2, True), (1, False), (2, False))
    )
    assert first == again != other
    assert plain == still != first


def test_more_tokens_to_predict_than_logits_are_refused():
    """Computed for the first of them only, the loss would be divided by the weights of all."""
    tokens = np.ones((2, 16), np.int32)
    objective = MaskedLM(mask_rate=0.25)
    weights = np.zeros((2, 16), np.float32)
    weights[1, :4] = 1
    objective.check_batch(Batch.of(tokens, tokens, weights=weights))
    weights[1, 4] = 0.5
    with pytest.raises(UserError, match="predicts at most 4 tokens of a row of 16, a row of the batch has 5"):
        objective.check_batch(Batch.of(tokens, tokens, weights=weights))
    parts = Parts(Config(objective=objective, model=ModelConfig(vocab_size=9)), StandIn(8))
    with pytest.raises(UserError, match="a row of the batch has 16"):
        parts.check_batch(Batch.of(tokens, tokens))
