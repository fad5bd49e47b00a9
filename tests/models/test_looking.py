"""Attention can be looked at: weights and streams of every layer, in every form of a stack, and no trace of them unasked."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.runtime import Runtime
from transformer.layers.scan_params import scan_params
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig
from transformer.ops.attention import recorded
from transformer.ops.patterns.strided import StridedPattern
from transformer.parallel.mesh import make_mesh
from transformer.parallel.rules import RULES

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
    out, found = jax.jit(lambda params: model.apply({"params": params}, tokens, mutable=[collection]))(params)
    np.testing.assert_allclose(out, tiny.forward(config)(params, tokens), atol=1e-6)
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


SEGMENTS = np.array([[1, 1, 2, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 1, 0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
PREFIX = np.array([[True, True, True, False, False, False, False, False]] * 2)
PACKED = {"segment_ids_BT": SEGMENTS, "positions_BT": POSITIONS}
CASES = {
    **{kind: (kind, {}, {}) for kind in ("none", "learned", "sinusoidal", "rotary", "alibi", "t5", "transformer_xl")},
    **{f"{kind}, packed": (kind, {}, PACKED) for kind in ("rotary", "alibi", "t5", "transformer_xl")},
    "window": ("rotary", {"attention": {"window": 3}}, {}),
    "pattern": ("rotary", {"attention": {"pattern": StridedPattern(block_size=2, stride=2)}}, {}),
    "cap, QK-norm": ("rotary", {"attention": {"logits_soft_cap": 2.0, "qk_norm": True}}, {}),
    "blockwise": ("rotary", {"attention": {"implementation": "blockwise"}}, PACKED),
    "splash": ("rotary", {"attention": {"implementation": "splash"}}, {}),
    "experts": ("rotary", {"block": {"feed_forward": FeedForwardConfig(hidden_dim=8, num_experts=4)}}, {}),
    "prefix": ("t5", {"architecture": "prefix"}, {"prefix_BT": PREFIX}),
    "encoder": ("alibi", {"architecture": "encoder"}, {"segment_ids_BT": SEGMENTS}),
    "scaled heads": (
        "rotary",
        {"attention": {"num_heads": 4, "num_kv_heads": 1, "query_scale": 0.7, "head_dim": 6}},
        {},
    ),
}


def mixed_by_hand(model, params, tokens, **options):
    """Of each call of attention: its weights times its values, and what its output projection read."""
    values, outs = [], []  # of the traced call

    def watch(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name in ("value", "out"):
            (values if context.module.name == "value" else outs).append(
                result if context.module.name == "value" else args[0]
            )
        return result

    @jax.jit
    def call(params, tokens, options):
        with nn.intercept_methods(watch):
            _, found = model.apply({"params": params}, *tokens, **options, mutable=["attention"])
        return found, values, outs

    found, values, outs = jax.device_get(call(params, tokens, options))
    weights = [
        leaf
        for stack in sorted(found["attention"], reverse=True)
        for leaf in jax.tree.leaves(found["attention"][stack])
    ]
    assert len(weights) == len(values) == len(outs)
    repeated = [
        np.repeat(value, w.shape[1] // value.shape[2], axis=2) for value, w in zip(values, weights, strict=True)
    ]
    return weights, [np.einsum("bhts,bshk->bthk", w, v) for w, v in zip(weights, repeated, strict=True)], outs


@pytest.mark.parametrize("case", CASES)
def test_weights_times_values_are_what_the_layer_projects(tiny, case):
    kind, changes, options = CASES[case]
    config = tiny.config(kind, **changes)
    weights, mixed, outs = mixed_by_hand(tiny.build(config), tiny.params(config), (tiny.tokens((2, 8)),), **options)
    assert len(weights) == config.num_layers
    for w, ours, theirs in zip(weights, mixed, outs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        ids = options.get("segment_ids_BT", np.ones((2, 8), int))
        real = ids != 0
        np.testing.assert_allclose(w.sum(axis=-1)[np.broadcast_to(real[:, None], w.shape[:3])], 1, atol=1e-5)
        same = (ids[:, :, None] == ids[:, None]) & real[:, None]
        if changes.get("architecture") != "encoder":
            earlier = np.tri(8, dtype=bool)[None] | options.get("prefix_BT", np.zeros((2, 8), bool))[:, None]
            same = same & earlier
        assert not np.asarray(w)[np.broadcast_to(~same[:, None], w.shape)].any()


def test_weights_over_a_memory(tiny):
    config = tiny.config("transformer_xl", memory_length=4)
    model, params, tokens = tiny.build(config), tiny.params(config), tiny.tokens((2, 6))
    first = {"positions_BT": np.arange(6)[None], "memory_BLPD": model.init_memory(2)}
    _, memory = tiny.forward(config)(params, tokens, **first)
    options = {"positions_BT": np.arange(6, 12)[None], "memory_BLPD": memory}
    weights, mixed, outs = mixed_by_hand(model, params, (tokens,), **options)
    for w, ours, theirs in zip(weights, mixed, outs, strict=True):
        assert w.shape == (2, 4, 6, 10) and (np.asarray(w)[..., :4].sum(axis=-1) > 0).all()
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_all_weights_of_a_translator(tiny):
    config = tiny.config("t5", architecture="encoder_decoder", num_layers=2)
    pair = (tiny.tokens((2, 5)), tiny.tokens((2, 3)))
    weights, mixed, outs = mixed_by_hand(tiny.build(config), tiny.params(config), pair)
    assert [w.shape[2:] for w in weights] == [(5, 5)] * 2 + [(3, 3), (3, 5)] * 2
    for ours, theirs in zip(mixed, outs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_ring_refuses(tiny):
    """Its rows lie on devices in another order, in which the mask of the reference would be wrong."""
    config = tiny.config("rotary")
    model, tokens = tiny.build(config).clone(runtime=Runtime(sharding=RULES)), tiny.tokens((4, 8))
    with jax.set_mesh(make_mesh({"data": 4, "context": 2})):
        options = {"positions_BT": jnp.arange(8)[None]}
        with pytest.raises(ValueError, match="need all keys of a row on one device, got a mesh with a context axis"):
            jax.eval_shape(
                lambda p: model.apply({"params": p}, tokens, **options, mutable=["attention"]), tiny.params(config)
            )
        jax.eval_shape(lambda p: model.apply({"params": p}, tokens, **options), tiny.params(config))


def test_streams_are_the_inputs_of_what_follows(tiny):
    streams, tokens = seen(tiny, "loop", "stream")
    base = tiny.config("rotary", num_layers=4)
    without = tiny.config("rotary", num_layers=4, final_norm=False)
    params = dict(tiny.params(base))
    params["decoder"] = {name: part for name, part in params["decoder"].items() if name != "final_norm"}
    hidden = jax.jit(lambda params: tiny.build(without).apply({"params": params}, tokens, head=False))(params)
    np.testing.assert_allclose(streams[-1], hidden, atol=1e-6)


def test_a_translator_shows_cross_attention(tiny):
    config = tiny.config("rotary", architecture="encoder_decoder", num_layers=1)
    source, target = tiny.tokens((2, 5)), tiny.tokens((2, 3))
    model, params = tiny.build(config), tiny.params(config)
    _, found = jax.eval_shape(
        lambda params: model.apply({"params": params}, source, target, mutable=["attention"]), params
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, found["attention"])
    assert shapes["encoder"]["blocks"]["block_0"]["attention"]["weights"] == ((2, 4, 5, 5),)
    assert shapes["decoder"]["blocks"]["block_0"]["cross_attention"]["weights"] == ((2, 4, 3, 5),)


@pytest.mark.parametrize("form", ["loop", "scan, remat"])
def test_no_program_holds_weights_without_a_request(tiny, form):
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
