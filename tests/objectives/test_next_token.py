"""The next-token objective: what it sums, what it leaves out, and where dropout's randomness comes from."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.objectives.next_token import NextToken
from transformer.types import Batch

TOKEN_BYTES = np.array([0, 1, 2, 3, 1, 1, 4], np.int32)


@pytest.fixture(scope="module")
def model():
    return Decoder(
        ModelConfig(
            vocab_size=7, num_layers=1, embed_dim=8, dropout=0.2, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)
        )
    )


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(1)
    batch = Batch(
        inputs=generator.integers(0, 7, (2, 6)).astype(np.int32),
        targets=generator.integers(0, 7, (2, 6)).astype(np.int32),
        weights=np.array([[1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]], np.float32),
        segment_ids=np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]], np.int32),
        positions=np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]], np.int32),
    )
    return jax.tree.map(jnp.asarray, batch)


def evaluate(objective, params, batch, *, key=0, train=False):
    (loss_sum, weight_sum), (carry, statistics) = objective.loss(params, (), batch, jax.random.key(key), train)
    assert carry == ()
    np.testing.assert_array_equal(weight_sum, objective.weight(batch))
    np.testing.assert_array_equal(statistics["objective"], loss_sum)
    return statistics


def test_statistics_are_sums_over_weighted_targets(model, params, batch):
    statistics = evaluate(NextToken().bind(model, SimpleNamespace(token_bytes=TOKEN_BYTES)), params, batch)
    logits = model.apply(
        {"params": params}, batch.inputs, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids
    )
    log_p = np.asarray(jax.nn.log_softmax(logits))
    nll = -np.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    assert float(statistics["weight"]) == 7
    np.testing.assert_allclose(statistics["loss"], (nll * batch.weights).sum(), rtol=1e-5)
    np.testing.assert_array_equal(statistics["bytes"], (TOKEN_BYTES[batch.targets] * batch.weights).sum())
    np.testing.assert_array_equal(statistics["correct"], ((log_p.argmax(-1) == batch.targets) * batch.weights).sum())
    assert {value.dtype for value in statistics.values()} == {jnp.dtype("float32")}


def test_smoothing_changes_what_is_minimised_and_not_the_score(model, params, batch):
    plain = evaluate(NextToken().bind(model, SimpleNamespace(token_bytes=TOKEN_BYTES)), params, batch)
    smooth = evaluate(
        NextToken(label_smoothing=0.3, z_loss=0.1).bind(model, SimpleNamespace(token_bytes=TOKEN_BYTES)), params, batch
    )
    np.testing.assert_array_equal(smooth["loss"], plain["loss"])
    assert abs(float(smooth["objective"] - plain["objective"])) > 0.1


def test_targets_without_weight_leave_no_trace(model, params, batch):
    objective = NextToken(label_smoothing=0.1, z_loss=0.1).bind(model, SimpleNamespace(token_bytes=TOKEN_BYTES))
    targets = jnp.where(batch.weights > 0, batch.targets, (batch.targets + 1) % 7)
    gradient = jax.grad(lambda params, batch: objective.loss(params, (), batch, jax.random.key(0), False)[0][0])
    assert not np.array_equal(targets, batch.targets)
    for a, b in zip(
        jax.tree.leaves(gradient(params, batch)),
        jax.tree.leaves(gradient(params, batch._replace(targets=targets))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_two_halves_add_up_to_the_batch(model, params, batch):
    objective = NextToken().bind(model, SimpleNamespace(token_bytes=TOKEN_BYTES))
    halves = [evaluate(objective, params, Batch(*(x[row : row + 1] for x in batch))) for row in (0, 1)]
    for name, value in evaluate(objective, params, batch).items():
        np.testing.assert_allclose(sum(half[name] for half in halves), value, rtol=1e-6)


def test_a_memory_is_carried(model, params, batch):
    assert NextToken().bind(model, SimpleNamespace(token_bytes=TOKEN_BYTES)).init_carry(2) == ()
    model = type(model)(dataclasses.replace(model.config, memory_length=3))
    objective = NextToken().bind(model, SimpleNamespace(token_bytes=TOKEN_BYTES))
    carry = objective.init_carry(len(batch.inputs))
    batch = batch._replace(positions=batch.positions + 3)

    def loss(carry):
        return objective.loss(params, carry, batch, jax.random.key(0), False)

    (first, _), (carry, _) = loss(carry)
    (second, _), (again, _) = loss(carry)
    assert carry["recurrence_BLPD"].shape == (len(batch.inputs), model.config.num_layers, 3, model.config.embed_dim)
    assert float(first) != float(second)
    np.testing.assert_array_equal(carry["recurrence_BLPD"][:, 0], again["recurrence_BLPD"][:, 0])


def test_dropout_follows_the_key_and_only_in_training(model, params, batch):
    objective = NextToken().bind(model, SimpleNamespace(token_bytes=TOKEN_BYTES))

    def loss(**options):
        return float(evaluate(objective, params, batch, **options)["loss"])

    assert loss(key=1) == loss(key=2)
    assert loss(key=1, train=True) == loss(key=1, train=True)
    assert loss(key=1, train=True) != loss(key=2, train=True)
