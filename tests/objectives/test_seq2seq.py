"""The sequence-to-sequence objective: sums over target tokens; filler and padding leave no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.objectives.seq2seq import Seq2Seq
from transformer.types import PairBatch


@pytest.fixture(scope="module")
def model():
    return EncoderDecoder(
        ModelConfig(
            vocab_size=7,
            num_layers=1,
            embed_dim=8,
            pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
            init_std=0.7,
        )
    )


def make_batch(lengths, rows, length, fill=0):
    generator = np.random.default_rng(1)
    fields = [np.full((rows, length), fill, np.int32) for _ in range(3)]
    segments = np.zeros((2, rows, length), np.int32)
    for row, (source, target) in enumerate(lengths):
        fields[0][row, :source] = generator.integers(0, 7, source)
        fields[1][row, :target], fields[2][row, :target] = generator.integers(0, 7, (2, target))
        segments[0, row, :source], segments[1, row, :target] = 1, 1
    source, inputs, targets = fields
    batch = PairBatch(source, segments[0], inputs, targets, segments[1].astype(np.float32), segments[1])
    return jax.tree.map(jnp.asarray, batch)


LENGTHS = [(5, 3), (1, 6), (4, 1)]


def test_sums_do_not_depend_on_padding(model):
    batch = make_batch(LENGTHS, 3, 6)
    params = model.init(jax.random.key(0), batch.source, batch.inputs)["params"]
    objective = Seq2Seq(label_smoothing=0.1).bind(model, None)

    def gradient_and_statistics(batch):
        def loss(params):
            (loss_sum, weight_sum), (_, statistics) = objective.loss(params, (), batch, jax.random.key(0), False)
            return loss_sum, (weight_sum, statistics)

        (_, (weight, statistics)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        assert float(weight) == float(objective.weight(batch)) == 10
        return statistics, gradient

    expected = gradient_and_statistics(batch)
    padded = gradient_and_statistics(make_batch(LENGTHS, 5, 12, fill=3))
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_statistics_by_definition(model):
    batch = make_batch([(5, 3)], 1, 5)
    params = model.init(jax.random.key(0), batch.source, batch.inputs)["params"]
    objective = Seq2Seq().bind(model, None)
    _, (_, statistics) = objective.loss(params, (), batch, jax.random.key(0), False)
    logits = np.asarray(model.apply({"params": params}, batch.source, batch.inputs[:, :3]))[0]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    targets = np.asarray(batch.targets)[0, :3]
    np.testing.assert_allclose(statistics["loss"], -log_p[np.arange(3), targets].sum(), rtol=1e-5)
    assert float(statistics["correct"]) == (log_p.argmax(axis=-1) == targets).sum()
