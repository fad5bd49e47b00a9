"""The classification objective: sums over texts, filler rows left out, a confusion matrix that adds up."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ObjectiveConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.classifier import Classifier
from transformer.objectives.classification import classification
from transformer.types import LabelledBatch


@pytest.fixture(scope="module")
def model():
    return Classifier(
        ModelConfig(
            architecture="encoder",
            vocab_size=7,
            num_layers=1,
            embed_dim=8,
            pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
            num_classes=3,
            init_std=1.0,
        )
    )


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(1)
    return LabelledBatch(
        inputs=jnp.asarray(generator.integers(0, 7, (6, 5)), jnp.int32),
        segment_ids=jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]] * 2 + [[0] * 5] * 2, jnp.int32),
        labels=jnp.asarray([0, 1, 2, 1, 2, 0], jnp.int32),
        weights=jnp.asarray([1, 1, 1, 1, 0, 0], jnp.float32),
    )


def statistics(model, params, batch, *, train=False, config=ObjectiveConfig(kind="classification")):  # noqa: B008
    objective = classification(model, config, mask_token=6)
    (loss_sum, weight_sum), (_, found) = objective.loss(params, (), batch, jax.random.key(0), train)
    np.testing.assert_array_equal(weight_sum, objective.weight(batch))
    np.testing.assert_array_equal(loss_sum, found["objective"])
    return found


def test_sums_over_texts(model, params, batch):
    found = statistics(model, params, batch)
    logits = np.asarray(model.apply({"params": params}, batch.inputs, segment_ids_BT=batch.segment_ids))[:4]
    labels, given = np.asarray(batch.labels[:4]), logits.argmax(axis=1)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found["loss"], -log_p[np.arange(4), labels].sum(), rtol=1e-5)
    assert float(found["weight"]) == 4
    assert float(found["correct"]) == (given == labels).sum()
    expected = np.zeros((3, 3))
    np.add.at(expected, (labels, given), 1)
    np.testing.assert_array_equal(found["confusion"], expected)


def test_parts_add_up(model, params, batch):
    parts = [statistics(model, params, jax.tree.map(lambda x, s=s: x[s], batch)) for s in (slice(2), slice(2, 6))]
    for name, whole in statistics(model, params, batch).items():
        np.testing.assert_allclose(parts[0][name] + parts[1][name], whole, rtol=1e-6)


def test_training_has_no_confusion_and_smoothing_no_effect_on_the_score(model, params, batch):
    assert "confusion" not in statistics(model, params, batch, train=True)
    smooth = statistics(model, params, batch, config=ObjectiveConfig(kind="classification", label_smoothing=0.2))
    plain = statistics(model, params, batch)
    np.testing.assert_array_equal(smooth["loss"], plain["loss"])
    assert float(smooth["objective"]) != float(plain["objective"])


def test_token_dropout_hides_some_tokens_of_training_and_nothing_else():
    """What the model reads: the mask at about the share asked for, never in padding, never in evaluation, drawn anew."""
    read = []

    class Reader(nn.Module):
        def __call__(self, inputs, *, segment_ids_BT, train):
            read.append(np.asarray(inputs))
            return jnp.zeros((len(inputs), 3))

    segment_ids = np.repeat([[1, 0]], 64, axis=0).repeat(64, axis=1)
    batch = LabelledBatch(
        inputs=jnp.arange(64 * 128).reshape(64, 128) % 6,
        segment_ids=jnp.asarray(segment_ids),
        labels=jnp.zeros(64, jnp.int32),
        weights=jnp.ones(64),
    )
    config = ObjectiveConfig(kind="classification", token_dropout=0.3)
    objective = classification(Reader(), config, mask_token=6)
    for seed, train in ((0, True), (1, True), (0, True), (0, False)):
        objective.loss({}, (), batch, jax.random.key(seed), train)
    first, second, again, evaluated = read
    hidden = first == 6
    np.testing.assert_array_equal(first[~hidden], np.asarray(batch.inputs)[~hidden])
    assert not hidden[segment_ids == 0].any()
    assert 0.27 < hidden[segment_ids == 1].mean() < 0.33
    assert (hidden != (second == 6)).any()
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(evaluated, batch.inputs)
