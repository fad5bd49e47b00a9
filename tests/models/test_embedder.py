"""A text's vector does not depend on other texts, has length one, and pools the encoder's hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import POOLINGS
from transformer.models.classifier import Classifier
from transformer.models.embedder import Embedder
from transformer.models.encoder import Encoder

pytestmark = pytest.mark.usefixtures("strict_dtypes")
TEXTS = [[1, 2, 3, 4, 5, 6], [7], [8, 8, 2, 1, 11, 12, 3, 4, 5, 6], [3, 2, 1]]


def config(pooling="mean", **changes):
    block = BlockConfig(AttentionConfig(num_heads=2), FeedForwardConfig(hidden_dim=24))
    sizes = {"vocab_size": 13, "max_length": 24, "num_layers": 2, "embed_dim": 16, "init_std": 0.5}
    return ModelConfig(**sizes, pattern=(block,), pooling=POOLINGS.find(pooling)(), **changes)


def rows(texts, length):
    tokens, segments = np.full((len(texts), length), 9, np.int32), np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    return jnp.asarray(tokens), jnp.asarray(segments)


def make(pooling="mean", normalize=True, **changes):
    model = Embedder(config(pooling, **changes), normalize=normalize)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize("pooling", ["mean", "max", "first", "attention"])
def test_padding_and_neighbours_have_no_effect(pooling):
    model, variables = make(pooling, token_types=2)
    apply = jax.jit(lambda tokens, segments: model.apply(variables, tokens, segment_ids_BT=segments))
    alone = np.concatenate([jax.jit(model.apply)(variables, jnp.asarray([text], jnp.int32)) for text in TEXTS])
    assert np.ptp(alone, axis=0).min() > 0.01
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, rtol=1e-5)
    for length in (10, 20):
        np.testing.assert_allclose(apply(*rows(TEXTS, length)), alone, atol=1e-5)
    np.testing.assert_allclose(apply(*rows(TEXTS[::-1], 20))[::-1], alone, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_mean_of_an_encoders_hidden_states(normalize):
    model, variables = make(normalize=normalize)
    tokens, segments = rows(TEXTS, 10)
    hidden = jax.jit(Encoder(model.config).apply)(variables, tokens, segment_ids_BT=segments)
    hidden = np.asarray(hidden, np.float64)
    means = np.stack([row[: len(text)].mean(axis=0) for row, text in zip(hidden, TEXTS, strict=True)])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True) if normalize else means
    np.testing.assert_allclose(jax.jit(model.apply)(variables, tokens, segment_ids_BT=segments), expected, atol=1e-5)


@pytest.mark.parametrize("pooler", [False, True])
def test_a_classifiers_vector_is_the_same(pooler):
    """A pooler is the classifier's: an embedder keeps its parameters, and does not use them."""
    settings = config("first", pooler=pooler)
    classifier, embedder = Classifier(settings, num_classes=3), Embedder(settings, normalize=False)
    tokens, segments = rows(TEXTS, 10)
    params = jax.jit(classifier.init)(jax.random.key(0), tokens)["params"]
    head = params.pop("classifier")
    shapes = jax.eval_shape(embedder.init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    vectors = jax.jit(embedder.apply)({"params": params}, tokens, segment_ids_BT=segments)
    logits = jax.jit(classifier.apply)({"params": params | {"classifier": head}}, tokens, segment_ids_BT=segments)
    if pooler:
        vectors = jnp.tanh(vectors @ params["pooler"]["kernel"] + params["pooler"]["bias"][None])
    np.testing.assert_allclose(vectors @ head["kernel"] + head["bias"][None], logits, atol=1e-5)


def test_a_row_of_padding_is_zero_with_a_gradient():
    model, variables = make(dtype="bfloat16")
    tokens, segments = rows([[], *TEXTS[:1]], 6)

    def total(variables):
        vectors = model.apply(variables, tokens, segment_ids_BT=segments)
        assert vectors.dtype == jnp.float32
        return jnp.sum(vectors[:, 0]), vectors

    gradient, vectors = jax.jit(jax.grad(total, has_aux=True))(variables)
    np.testing.assert_array_equal(vectors[0], 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0
