"""Attention can be looked at: weights and streams of every layer, in every form of a stack, and no trace of them unasked."""

import dataclasses

import jax
import numpy as np
import pytest

from transformer.layers.scan_params import scan_params
from transformer.model_config import AttentionConfig, BlockConfig
from transformer.ops.attention import recorded

FORMS = {
    "loop": {},
    "scan": {"scan_layers": True},
    "remat": {"remat": "full"},
    "scan, remat": {"scan_layers": True, "remat": "dots"},
}


def seen(tiny, form, collection, **changes):
    """The collection of a decoder's blocks [L, ...], and the tokens."""
    base = tiny.config("rotary", num_layers=4, **changes)
    config, tokens = dataclasses.replace(base, **FORMS[form]), tiny.tokens((2, 6))
    params = scan_params(tiny.params(base)) if config.scan_layers else tiny.params(base)
    model = tiny.build(config)
    out, found = model.apply({"params": params}, tokens, mutable=[collection])
    np.testing.assert_allclose(out, model.apply({"params": params}, tokens), atol=1e-6)
    leaves = jax.tree.leaves(found["decoder" if collection not in found else collection])
    stacked = [leaf if config.scan_layers else leaf[None] for leaf in leaves]
    return np.concatenate(stacked), tokens


@pytest.mark.parametrize("collection", ["attention", "stream"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_shows_the_same(tiny, form, collection):
    found, _ = seen(tiny, form, collection)
    expected, _ = seen(tiny, "loop", collection)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_weights_are_those_that_are_used(tiny):
    weights, _ = seen(tiny, "loop", "attention")
    assert weights.shape == (4, 2, 4, 6, 6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert not np.triu(weights, 1).any()
    windowed, _ = seen(tiny, "loop", "attention", attention={"window": 2})
    assert not np.tril(windowed, -2).any()


def test_streams_are_the_inputs_of_what_follows(tiny):
    streams, tokens = seen(tiny, "loop", "stream")
    base = tiny.config("rotary", num_layers=4)
    without = tiny.config("rotary", num_layers=4, final_norm=False)
    params = dict(tiny.params(base))
    params["decoder"] = {name: part for name, part in params["decoder"].items() if name != "final_norm"}
    hidden = tiny.build(without).apply({"params": params}, tokens, head=False)
    np.testing.assert_allclose(streams[-1], hidden, atol=1e-6)


def test_a_translator_shows_cross_attention(tiny):
    config = tiny.config("rotary", architecture="encoder_decoder", num_layers=1)
    source, target = tiny.tokens((2, 5)), tiny.tokens((2, 3))
    _, found = tiny.build(config).apply({"params": tiny.params(config)}, source, target, mutable=["attention"])
    shapes = jax.tree.map(lambda leaf: leaf.shape, found["attention"])
    assert shapes["encoder"]["blocks"]["block_0"]["attention"]["weights"] == ((2, 4, 5, 5),)
    assert shapes["decoder"]["blocks"]["block_0"]["cross_attention"]["weights"] == ((2, 4, 3, 5),)


@pytest.mark.parametrize("form", ["loop", "scan, remat"])
def test_unasked_no_program_holds_weights(tiny, form):
    """Of a blockwise layer, whose own program has no array of queries by keys."""
    base = tiny.config("rotary", pattern=(BlockConfig(AttentionConfig(num_heads=4, implementation="blockwise")),))
    config, tokens = dataclasses.replace(base, **FORMS[form]), tiny.tokens((1, 300))
    params = scan_params(tiny.params(base)) if config.scan_layers else tiny.params(base)
    model = tiny.build(config)

    def text(**arguments):
        return str(jax.make_jaxpr(lambda params: model.apply({"params": params}, tokens, **arguments))(params))

    assert "300,300]" not in text()
    assert "300,300]" not in text(mutable=["routing"])
    assert "300,300]" in text(mutable=["attention"])


def test_calls_are_recorded_while_tracing(tiny):
    config, tokens = tiny.config("rotary", num_layers=2), tiny.tokens((1, 4))
    params = tiny.params(config)
    with recorded() as requests:
        jax.eval_shape(lambda params: tiny.build(config).apply({"params": params}, tokens), params)
    assert [request.backend("cpu") for request in requests] == ["xla", "xla"]
    tiny.build(config).apply({"params": params}, tokens)
    assert len(requests) == 2
    assert requests[0].call.query_BTHK.shape == (1, 4, 4, 4)
