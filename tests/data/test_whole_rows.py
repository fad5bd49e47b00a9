"""Batches without segment ids, whose rows are one document each, are read as those with ids of one."""

import dataclasses

import jax
import numpy as np
import pytest

from transformer.config import Config, DataConfig
from transformer.data.batches import BatchData
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES
from transformer.objectives.classification import Classification
from transformer.objectives.prefix_lm import prefix_tokens
from transformer.parts import Parts, resolve
from transformer.types import Batch, LabelledBatch, PairBatch, UserError

BYTES = ByteTokenizer()
TOKENS = np.arange(1, 13, dtype=np.int32).reshape(2, 6) + 90
ONES = np.ones((2, 6), np.int32)
WEIGHTS = np.array([[0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]], np.float32)
BATCHES = {
    "next_token": Batch.of(TOKENS, TOKENS, weights=WEIGHTS),
    "prefix_lm": Batch.of(TOKENS, TOKENS, weights=WEIGHTS),
    "classification": LabelledBatch.of(TOKENS, np.array([0, 1], np.int32)),
    "seq2seq": PairBatch.of(TOKENS, TOKENS, TOKENS),
    "span_corruption": PairBatch.of(TOKENS, TOKENS, TOKENS),
}


def with_ids(batch):
    return batch._replace(**{name: ONES for name in batch._fields if name.endswith("segment_ids")})


@pytest.mark.parametrize("kind", BATCHES)
def test_they_are_shown_alike(kind):
    objective, batch = OBJECTIVES.find(kind)(), BATCHES[kind]
    assert batch.segment_ids is None
    names = ("a", "b")
    assert list(objective.show(batch, BYTES, names)) == list(objective.show(with_ids(batch), BYTES, names))


def test_a_prefix_agrees_with_the_row():
    np.testing.assert_array_equal(prefix_tokens(WEIGHTS), prefix_tokens(WEIGHTS, ONES))
    assert prefix_tokens(WEIGHTS).sum() == 4


def test_tokens_of_whole_texts_are_dropped():
    block = BlockConfig(AttentionConfig(num_heads=2))
    config = Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(block,)),
        objective=Classification(token_dropout=0.5),
        data=DataConfig(sequence_length=6, batch_size=2),
    )
    parts = Parts(resolve(config, BYTES), BYTES, class_names=("a", "b"))
    params, batch = parts.init_params(jax.random.key(0)), BATCHES["classification"]

    @jax.jit
    def loss(batch, seed):
        return parts.loss.loss(params, (), batch, jax.random.key(seed), True)[0][0]

    np.testing.assert_allclose(loss(batch, 1), loss(with_ids(batch), 1), rtol=1e-6)
    assert abs(loss(batch, 1) - loss(batch, 2)) > 1e-6


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("ids", [None, ONES, "left out"])
def test_given_batches_may_have_ids_or_none(pack, ids):
    config = Config(model=ModelConfig(vocab_size=200), data=DataConfig(sequence_length=6, batch_size=2, pack=pack))
    given = {"inputs": TOKENS, "targets": TOKENS} | ({} if isinstance(ids, str) else {"segment_ids": ids})
    for batches in ([given], [Batch.of(**given)]):
        batch = next(BatchData(batches).for_run(config).train_batches(BYTES))
        assert (batch.segment_ids is None) == (ids is not ONES)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, pack=True))
    with pytest.raises(UserError, match="segment_ids of a batch given as data= must"):
        next(BatchData([given | {"segment_ids": ONES[:, :3]}]).for_run(config).train_batches(BYTES))
