"""The classification objective: sums over texts, filler rows left out, a confusion matrix that adds up."""

import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.classifier import Classifier
from transformer.objectives.classification import Classification, balanced_weights
from transformer.parallel.mesh import MeshRunner, make_mesh
from transformer.parallel.pmap import AXIS_NAME, PmapRunner
from transformer.training.metrics import derive
from transformer.training.state import create_state
from transformer.training.step import EvaluateStep, TrainStep
from transformer.types import LabelledBatch


@pytest.fixture(scope="module")
def model():
    return Classifier(
        ModelConfig(
            vocab_size=7,
            num_layers=1,
            embed_dim=8,
            pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
            init_std=1.0,
        ),
        num_classes=3,
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


def statistics(model, params, batch, *, train=False, config=Classification()):  # noqa: B008
    objective = config.bind(model, SimpleNamespace(vocab_size=6))
    (loss_sum, weight_sum), (_, found) = objective.loss(params, (), batch, jax.random.key(0), train)
    if train or config.class_weights == "none":
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
    texts, confidence, right = found["calibration"]
    assert (float(texts.sum()), float(right.sum())) == (4, (given == labels).sum())
    np.testing.assert_allclose(confidence.sum(), np.exp(log_p).max(axis=1).sum(), rtol=1e-5)


def test_parts_add_up(model, params, batch):
    parts = [statistics(model, params, jax.tree.map(lambda x, s=s: x[s], batch)) for s in (slice(2), slice(2, 6))]
    for name, whole in statistics(model, params, batch).items():
        np.testing.assert_allclose(parts[0][name] + parts[1][name], whole, rtol=1e-6)


def test_training_has_no_confusion_and_smoothing_no_effect_on_the_score(model, params, batch):
    assert "confusion" not in statistics(model, params, batch, train=True)
    smooth = statistics(model, params, batch, config=Classification(label_smoothing=0.2))
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
    config = Classification(token_dropout=0.3)
    objective = config.bind(Reader(), SimpleNamespace(vocab_size=6))
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


WEIGHTED = Classification(class_weights=(0.5, 1.0, 8.0), label_smoothing=0.1, z_loss=0.01)


def test_class_weights_make_a_weighted_mean(model, params, batch):
    """`sum_i w_i loss_i / sum_i w_i` in training; evaluation, accuracy and the plain loss count every text alike."""
    found = statistics(model, params, batch, train=True, config=WEIGHTED)
    w = np.array([0.5, 1.0, 8.0])[np.asarray(batch.labels)] * np.asarray(batch.weights)
    unweighted = dataclasses.replace(WEIGHTED, class_weights="none")
    single = [
        statistics(model, params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch), config=unweighted)["objective"]
        for i in range(4)
    ]
    np.testing.assert_allclose(found["objective"], np.dot(w[:4], single), rtol=1e-5)
    np.testing.assert_allclose(found["objective_weight"], w.sum(), rtol=1e-6)
    metrics = derive({name: float(value) for name, value in found.items()})
    assert metrics["objective"] == pytest.approx(np.dot(w[:4], single) / w.sum(), rel=1e-5)
    plain = statistics(model, params, batch, config=unweighted)
    for name in ("loss", "correct", "weight"):
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-6)
    evaluated = statistics(model, params, batch, config=WEIGHTED)
    np.testing.assert_array_equal(evaluated["objective"], plain["objective"])
    assert "objective_weight" not in evaluated


def test_a_weighted_step_does_not_depend_on_how_rows_are_divided(model, params, batch):
    """Each part of the batch has other classes, hence another sum of weights."""
    batch = jax.tree.map(lambda x: np.concatenate([np.asarray(x)[:4]] * 2), batch)
    batch = batch._replace(labels=np.array([2, 0, 2, 0, 2, 1, 0, 0], np.int32))
    objective, optimizer = WEIGHTED.bind(model, SimpleNamespace(vocab_size=6)), optax.sgd(1.0)

    def step(parts=1, axis_name=None):
        options = {"accumulate_steps": parts, "axis_name": axis_name}
        train_step = TrainStep(objective, optimizer, lambda _: 1.0, **options)
        return train_step, EvaluateStep(objective, axis_name=axis_name)

    def after(runner):
        state = runner.init_state(
            lambda params: create_state(params, optimizer, jax.random.key(1)), jax.device_get(params)
        )
        state, found = runner.step(state, runner.place_batch(batch))
        return jax.device_get((runner.gather(runner.fetch_state(state)).params, found))

    whole = after(MeshRunner(make_mesh(1), *step()))
    divided = {
        "micro-batches on a mesh": MeshRunner(make_mesh(2), *step(parts=2)),
        "pmap": PmapRunner(4, *step(axis_name=AXIS_NAME)),
    }
    for name, runner in divided.items():
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name),
            after(runner),
            whole,
        )


def test_balanced_weights_are_scikit_learns():
    # compute_class_weight("balanced", classes=[0, 1, 2], y=[0] * 90 + [1] * 7 + [2] * 3), scikit-learn 1.9.
    expected = (0.37037037037037035, 4.761904761904762, 11.11111111111111)
    assert balanced_weights([0] * 90 + [1] * 7 + [2] * 3, 3) == pytest.approx(expected, rel=1e-12)
    assert balanced_weights([0, 0, 2, 2], 3) == (1.0, 1.0, 1.0)  # the second does not occur


def test_balanced_is_a_number_before_it_trains(model, params, batch):
    with pytest.raises(ValueError, match="must be numbers before training"):
        statistics(model, params, batch, train=True, config=dataclasses.replace(WEIGHTED, class_weights="balanced"))


def test_token_dropout_and_dropout_draw_from_keys_of_their_own():
    """Else the tokens that are hidden would be those whose vectors are dropped."""
    read = {}

    class Reader(nn.Module):
        def apply(self, variables, inputs, *, rngs, **others):
            read.update(inputs=inputs, key=rngs["dropout"])
            return jnp.zeros((len(inputs), 3)), {}

    ones = jnp.ones((16, 64), jnp.int32)
    batch = LabelledBatch(ones, ones, jnp.zeros(16, jnp.int32), jnp.ones(16))
    config = Classification(token_dropout=0.5)
    key = jax.random.key(3)
    config.bind(Reader(), SimpleNamespace(vocab_size=6)).loss({}, (), batch, key, True)
    hidden = np.asarray(read["inputs"] == 6)
    for used in (read["key"], key):
        alike = np.mean(hidden == np.asarray(jax.random.bernoulli(used, 0.5, ones.shape)))
        assert 0.4 < alike < 0.6
    assert not np.array_equal(jax.random.key_data(read["key"]), jax.random.key_data(key))
