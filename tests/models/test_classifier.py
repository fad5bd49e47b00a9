"""A text's class does not depend on what lies beside it: alone, in a batch, padded to any length, for every pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import POOLINGS, POSITIONS
from transformer.models.classifier import Classifier
from transformer.models.encoder import Encoder
from transformer.types import UserError

pytestmark = pytest.mark.usefixtures("strict_dtypes")
KINDS_OF_POOLING = ["mean", "max", "first", "attention"]


def make(pooling="mean", kind="rotary", implementation="xla", **changes):
    block = BlockConfig(AttentionConfig(num_heads=2, implementation=implementation), FeedForwardConfig(hidden_dim=24))
    config = ModelConfig(
        vocab_size=13,
        max_length=24,
        num_layers=2,
        embed_dim=16,
        pattern=(block,),
        positions=POSITIONS.find(kind)(),
        pooling=POOLINGS.find(pooling)(),
        init_std=0.5,
        **changes,
    )
    model = Classifier(config, num_classes=3)
    return model, model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def rows(texts, length):
    tokens, segments = np.full((len(texts), length), 9, np.int32), np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    return jnp.asarray(tokens), jnp.asarray(segments)


TEXTS = [[1, 2, 3, 4, 5, 6], [7], [8, 8, 2, 1, 11, 12, 3, 4, 5, 6], [3, 2, 1]]


@pytest.mark.parametrize("pooling", KINDS_OF_POOLING)
@pytest.mark.parametrize("kind", ["learned", "rotary", "alibi", "t5"])
@pytest.mark.parametrize("implementation", ["xla", "blockwise"])
def test_padding_and_neighbours_have_no_effect(pooling, kind, implementation):
    model, variables = make(pooling, kind, implementation)
    apply = jax.jit(lambda tokens, segments: model.apply(variables, tokens, segment_ids_BT=segments))
    alone = np.concatenate([model.apply(variables, jnp.asarray([text], jnp.int32)) for text in TEXTS])
    assert np.ptp(alone, axis=0).min() > 0.05, "the texts must differ for this to say anything"
    for length in (10, 20):
        np.testing.assert_allclose(apply(*rows(TEXTS, length)), alone, atol=1e-5)
    np.testing.assert_allclose(apply(*rows(TEXTS[::-1], 20))[::-1], alone, atol=1e-5)


@pytest.mark.parametrize("pooling", KINDS_OF_POOLING)
def test_every_pooling_reads_the_whole_text(pooling):
    """By attention, if not by the pooling itself."""
    model, variables = make(pooling)
    tokens, segments = rows(TEXTS, 10)
    before = model.apply(variables, tokens, segment_ids_BT=segments)
    after = model.apply(variables, tokens.at[0, 5].set(12), segment_ids_BT=segments)
    assert np.abs(after - before)[0].max() > 1e-3
    np.testing.assert_array_equal(after[1:], before[1:])


def test_parameters_agree_with_an_encoder_and_a_head():
    model, variables = make("attention")
    encoder = Encoder(model.config)
    of_encoder = encoder.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    of_classifier = dict(variables["params"])
    assert set(of_classifier.pop("pooling")) == {"kernel"}
    head = of_classifier.pop("classifier")
    assert {name: x.shape for name, x in head.items()} == {"kernel": (16, 3), "bias": (3,)}
    assert jax.tree.map(jnp.shape, of_classifier) == jax.tree.map(jnp.shape, of_encoder)


def test_dropout_only_in_training_and_float32_logits():
    model, variables = make(dropout=0.5, dtype="bfloat16")
    tokens, segments = rows(TEXTS, 10)

    def run(**options):
        return model.apply(variables, tokens, segment_ids_BT=segments, **options)

    np.testing.assert_array_equal(run(), run())
    assert run().dtype == jnp.float32
    first, second = (run(train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert not np.array_equal(first, second)


def test_classes_must_be_known():
    with pytest.raises(UserError, match="at least two classes, got num_classes=0"):
        Classifier(ModelConfig(vocab_size=3)).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def test_the_pooled_vector_is_dropped_in_training():
    model, variables = make(dropout=0.5)
    tokens, segments = rows(TEXTS, 10)
    read = []

    def look(call, args, kwargs, context):
        if context.module.name == "classifier" and context.method_name == "__call__":
            read.append(np.asarray(args[0]))
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        for train in (True, False):
            model.apply(variables, tokens, segment_ids_BT=segments, train=train, rngs={"dropout": jax.random.key(0)})
    dropped, whole = read
    assert dropped.shape == whole.shape == (len(tokens), 16)
    assert 0.2 < np.mean(dropped == 0) < 0.8
    assert not np.any(whole == 0)
