"""What goes into a model and comes out: no variables but parameters, ids of its tables, padding where a cache has room for it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.embedding import Embed
from transformer.layers.linear import Linear
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.classifier import Classifier
from transformer.models.decoder import Decoder
from transformer.models.encoder import Encoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.ops.positions.learned import LearnedPositions
from transformer.types import UserError

MODELS = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder, "classifier": Classifier}
SIZES = {"source": 17, "target": 13}


@functools.cache
def make(name):
    """A model, its parameters, and the sizes of its tables in the order of its arguments."""
    config = ModelConfig(
        vocab_size=SIZES["target"],
        max_length=4,
        num_layers=1,
        embed_dim=8,
        pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
        positions=LearnedPositions(),
    )
    own = {"encoder_decoder": {"source_vocab_size": SIZES["source"]}, "classifier": {"num_classes": 3}}
    model, names = (
        MODELS[name](config, **own.get(name, {})),
        ("source", "target") if name == "encoder_decoder" else ("target",),
    )
    tokens = [jnp.zeros((1, 1), jnp.int32)] * len(names)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *tokens))["params"]
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * generator.normal(size=leaf.shape), leaf.dtype), shapes)
    return model, params, [SIZES[name] for name in names]


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("name", MODELS)
def test_mutable_is_the_ordinary_idiom(name, rows):
    model, params, sizes = make(name)
    tokens = [jnp.ones((rows, 1), jnp.int32)] * len(sizes)
    out, variables = model.apply({"params": params}, *tokens, mutable=True)
    np.testing.assert_array_equal(out, model.apply({"params": params}, *tokens))
    jax.tree.map(np.testing.assert_array_equal, variables["params"], params)
    assert set(variables) == {"params", "attention", "stream"}


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize(
    ("layer", "method", "shape"),
    [(Linear((3,), ("embed", "hidden")), "__call__", (4,)), (Embed(5, 4), "attend", (4,))],
    ids=["linear", "embed"],
)
def test_updated_variables_are_those_that_are_used(layer, method, shape, rows):
    inputs = jnp.ones((rows, *shape))
    variables = layer.init(jax.random.key(0), inputs, method=method)
    _, updated = layer.apply(variables, inputs, method=method, mutable=True)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, updated)
    out = layer.apply(updated, inputs, method=method)
    np.testing.assert_allclose(layer.apply(doubled, inputs, method=method), 2 * out, rtol=1e-6)
    gradient = jax.grad(lambda variables: layer.apply(variables, inputs, method=method).sum())(updated)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("rows", [1, 9])
def test_operations_are_counted_in_a_table(rows):
    model, _, _ = make("decoder")
    tabulate = nn.tabulate(model, jax.random.key(0), compute_flops=True, console_kwargs={"width": 300})
    table = tabulate(jnp.ones((rows, 1), jnp.int32))
    assert "panels" not in table and "feed_forward" in table


@pytest.mark.parametrize("name", MODELS)
def test_a_token_outside_a_table_is_refused_where_it_is_known_and_nan_where_not(name):
    model, params, sizes = make(name)
    apply = jax.jit(lambda *tokens: model.apply({"params": params}, *tokens))
    for argument, size in enumerate(sizes):
        for wrong in (-1, -100, size, 10**6):
            tokens = [jnp.array([[1, 2]], jnp.int32)] * len(sizes)
            tokens[argument] = jnp.array([[1, wrong]], jnp.int32)
            with pytest.raises(UserError, match=rf"at least 0 and below vocab_size={size}, the input holds .*{wrong}"):
                model.apply({"params": params}, *tokens)
            assert np.isnan(apply(*tokens)).any()
        tokens[argument] = jnp.array([[1, size - 1]], jnp.int32)
        assert np.isfinite(apply(*tokens)).all()


def test_a_position_outside_the_table_is_nan():
    model, params, _ = make("decoder")
    for wrong in (-1, 4):
        positions = jnp.array([[1, wrong]], jnp.int32)
        logits = model.apply({"params": params}, jnp.array([[1, 2]], jnp.int32), positions_BT=positions)
        assert np.isnan(logits[0, 1]).all()


def test_the_gradient_of_a_token_outside_the_table_is_dropped():
    table = jnp.ones((5, 4))
    layer = Embed(5, 4)

    @jax.jit
    def gradient(tokens):
        return jax.grad(lambda table: layer.apply({"params": {"embedding": table}}, tokens).sum())(table)

    np.testing.assert_array_equal(gradient(jnp.array([1, -1, 5]))[:, 0], [0, 1, 0, 0, 0])


PADDINGS = [[0, 1, 1], [1, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
def test_padding_before_a_token_with_a_cache_is_refused_or_nan(name):
    model, params, _ = make(name)
    tokens, valid = jnp.ones((2, 3), jnp.int32), jnp.array([[1, 1, 0], [1, 1, 1]])

    def run(valid):
        cache, arguments = model.init_cache(batch_size=2, capacity=4), {"segment_ids_BT": valid}
        if name == "encoder_decoder":
            encoded = model.apply({"params": params}, tokens, method="encode")
            arguments |= {"encoded_BSD": encoded, "method": "decode"}
        logits, cache = model.apply({"params": params}, tokens, cache=cache, **arguments)
        arguments.pop("segment_ids_BT")
        return logits, model.apply({"params": params}, tokens[:, :1], cache=cache, **arguments)[0]

    compiled = jax.jit(run)
    assert all(np.isfinite(part).all() for part in compiled(valid))
    for padding in PADDINGS:
        padded = valid.at[1].set(jnp.array(padding))
        with pytest.raises(UserError, match=r"row 1 has padding before a token: pad prompts on the right"):
            run(padded)
        logits, later = compiled(padded)
        assert np.isnan(logits[1, np.array(padding) > 0]).all() and np.isnan(later[1]).all()
        assert np.isfinite(logits[0]).all() and np.isfinite(later[0]).all()
