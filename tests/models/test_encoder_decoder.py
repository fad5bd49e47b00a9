"""What an encoder-decoder keeps to: causal targets, sources seen whole, packed pairs apart, caches exact."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.cache import cache_lengths, cache_overflow
from transformer.layers.scan_params import scan_params
from transformer.types import UserError

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def pair(tiny, kind="rotary", **changes):
    return tiny.config(kind, architecture="encoder_decoder", **changes)


@pytest.mark.parametrize("kind", ["rotary", "learned"])
def test_targets_are_causal_and_sources_seen_whole(tiny, kind):
    config = pair(tiny, kind)
    source, target = tiny.tokens((1, 4)), tiny.tokens((1, 5), seed=1)
    logits = np.asarray(tiny.forward(config)(tiny.params(config), source, target))
    for place in range(5):
        changed = tiny.forward(config)(tiny.params(config), source, target.at[0, place].add(-1))
        effect = np.abs(changed - logits)[0].max(axis=-1)
        assert (effect[:place] == 0).all()
        assert (effect[place:] > 1e-4).all()
    encoded = tiny.forward(config, "encode")(tiny.params(config), source)
    later = tiny.forward(config, "encode")(tiny.params(config), source.at[0, 3].add(-1))
    assert (np.abs(later - encoded)[0].max(axis=-1) > 1e-4).all()
    for place in range(4):
        changed = tiny.forward(config)(tiny.params(config), source.at[0, place].add(-1), target)
        assert (np.abs(changed - logits)[0].max(axis=-1) > 1e-4).all()


def test_packed_pairs_are_separate(tiny):
    # A window is for self-attention only.
    config = pair(tiny, attention={"window": 2}, num_layers=1)
    params, sources, targets = tiny.params(config), tiny.tokens((2, 4)), tiny.tokens((2, 3), seed=1)
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 13)), jnp.float32)
    gradient, logits = tiny.graded(config)(params, weights, sources, targets)
    source = jnp.pad(sources.reshape(1, 8), ((0, 0), (0, 2)), constant_values=7)
    packing = {
        "source_positions_BS": jnp.array([[0, 1, 2, 3] * 2 + [0, 0]]),
        "source_segment_ids_BS": jnp.array([[1] * 4 + [2] * 4 + [0] * 2]),
        "target_positions_BT": jnp.array([[0, 1, 2] * 2]),
        "target_segment_ids_BT": jnp.array([[1] * 3 + [2] * 3]),
    }
    packed_gradient, packed = tiny.graded(config)(
        params, weights.reshape(1, 6, 13), source, targets.reshape(1, 6), **packing
    )
    np.testing.assert_allclose(packed.reshape(logits.shape), logits, atol=2e-5)
    tiny.assert_trees_close(packed_gradient, gradient)
    blockwise = pair(tiny, attention={"window": 2, "implementation": "blockwise"}, num_layers=1)
    packed = tiny.forward(blockwise)(params, source, targets.reshape(1, 6), **packing)
    np.testing.assert_allclose(packed.reshape(logits.shape), logits, atol=2e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_cached_is_full(tiny, scan):
    config = pair(tiny)
    source, target = tiny.tokens((2, 4)), tiny.tokens((2, 6), seed=1)
    segments = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    full = tiny.forward(config)(tiny.params(config), source, target, source_segment_ids_BS=segments)
    params = tiny.params(config)
    if scan:
        config, params = dataclasses.replace(config, scan_layers=True), scan_params(params)
    encoded = tiny.forward(config, "encode")(params, source, segment_ids_BS=segments)
    decode = tiny.forward(config, "decode")
    cache = tiny.build(config).init_cache(2, 6)
    # Right padding in the prompt: the second row reads one token less, and is one behind from there on.
    valid = jnp.array([[1, 1, 1], [1, 1, 0]])
    prompt, cache = decode(
        params, target[:, :3], encoded, source_segment_ids_BS=segments, segment_ids_BT=valid, cache=cache
    )
    np.testing.assert_allclose(prompt[0], full[0, :3], atol=2e-5)
    np.testing.assert_allclose(prompt[1, :2], full[1, :2], atol=2e-5)
    rows, places = jnp.arange(2), jnp.array([3, 2])
    for step in range(3):
        logits, cache = decode(
            params, target[rows, places + step][:, None], source_segment_ids_BS=segments, cache=cache
        )
        np.testing.assert_allclose(logits[:, 0], full[rows, places + step], atol=2e-5)
    assert cache_lengths(cache).tolist() == [6, 5]
    assert not cache_overflow(cache)


def test_first_cached_call_needs_the_memory(tiny):
    config = pair(tiny, num_layers=1)
    model = tiny.build(config)
    with pytest.raises(
        ValueError, match="Cross-attention needs the encoder output in the first call with a cache; pass encoded"
    ):
        jax.eval_shape(
            functools.partial(model.apply, method="decode"),
            {"params": tiny.params(config)},
            tiny.tokens((1, 2)),
            cache=model.init_cache(1, 4),
        )


def test_source_padding_has_no_effect(tiny):
    config = pair(tiny, "sinusoidal", num_layers=1)
    source, target = tiny.tokens((2, 4)), tiny.tokens((2, 3), seed=1)
    logits = tiny.forward(config)(tiny.params(config), source, target)
    padded = jnp.pad(source, ((0, 0), (0, 2)), constant_values=7)
    segments = jnp.array([[1] * 4 + [0] * 2] * 2)
    result = tiny.forward(config)(tiny.params(config), padded, target, source_segment_ids_BS=segments)
    np.testing.assert_allclose(result, logits, atol=2e-5)


def test_bfloat16_and_dropout_run(tiny):
    config = pair(tiny, dtype="bfloat16", dropout=0.1, attention={"dropout": 0.1}, num_layers=1)
    model, params = tiny.build(config), tiny.params(config)
    source, target = tiny.tokens((1, 4)), tiny.tokens((1, 3), seed=1)
    run = tiny.jit(lambda key: model.apply({"params": params}, source, target, train=True, rngs={"dropout": key}))
    logits = run(jax.random.key(0))
    assert logits.dtype == jnp.float32
    assert np.abs(logits - run(jax.random.key(1))).max() > 1e-3


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("scan", [False, True])
def test_two_depths(tiny, layers, scan):
    """Encoder and decoder may differ in depth; scanned equals looped, cached equals full."""
    config = tiny.config("t5", architecture="encoder_decoder", decoder_layers=layers)
    params, source, target = tiny.params(config), tiny.tokens((2, 5)), tiny.tokens((2, 4))
    depths = {name: len(params[name]["blocks"]) for name in ("encoder", "decoder")}
    assert depths == {"encoder": 2, "decoder": layers}
    same = {"encoder": tiny.config("t5", architecture="encoder_decoder"), "decoder": config.decoder}
    encoded = tiny.forward(same["encoder"], "encode")({k: v for k, v in params.items() if k != "decoder"}, source)
    expected = tiny.forward(same["decoder"], "decode")(
        {k: v for k, v in params.items() if k != "encoder"}, target, encoded
    )
    run = dataclasses.replace(config, scan_layers=scan)
    params = scan_params(params) if scan else params
    np.testing.assert_allclose(tiny.forward(run)(params, source, target), expected, atol=1e-4)
    cache, parts = tiny.build(run).init_cache(2, 6), []
    for index, part in enumerate((target[:, :2], target[:, 2:])):
        logits, cache = tiny.forward(run, "decode")(params, part, encoded if index == 0 else None, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-4)


def test_a_decoder_holds_its_pattern(tiny):
    block = tiny.config().pattern[0]
    with pytest.raises(UserError, match=r"decoder_layers must hold the 0 first blocks and the pattern's 2, got 1"):
        tiny.config(architecture="encoder_decoder", pattern=(block, block), decoder_layers=1)
