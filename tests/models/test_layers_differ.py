"""What differs by layer: positions of a block's own, first blocks of another kind, and a last period that is incomplete."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.block import Block
from transformer.layers.scan_params import loop_params, scan_params
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig
from transformer.models.decoder import Decoder
from transformer.ops.masks import AttentionMask
from transformer.ops.positions.none import NoPositions
from transformer.ops.positions.rotary import RotaryPositions
from transformer.ops.positions.t5 import T5Positions
from transformer.ops.positions.transformer_xl import TransformerXLPositions

HEADS = AttentionConfig(num_heads=4, num_kv_heads=2)
LOCAL = BlockConfig(dataclasses.replace(HEADS, window=3), FeedForwardConfig(24))
FULL = BlockConfig(HEADS, FeedForwardConfig(24), own_positions=RotaryPositions(theta=100.0, fraction=0.5))
WIDE = BlockConfig(HEADS, FeedForwardConfig(40, gated=True), own_positions=NoPositions())
SHAPES = {
    "a remainder": {"num_layers": 5, "pattern": (LOCAL, FULL)},
    "first blocks": {"num_layers": 5, "pattern": (FULL, LOCAL), "first": (WIDE,)},
    "both": {"num_layers": 6, "pattern": (LOCAL, FULL), "first": (WIDE,)},
    "26 layers of a period of 6": {"num_layers": 26, "pattern": (LOCAL,) * 5 + (FULL,)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_scanned_is_looped(tiny, shape):
    config, tokens = tiny.config("rotary", **SHAPES[shape]), tiny.tokens((2, 7))
    blocks = len(config.pattern), len(config.first)
    params, scanned = tiny.params(config), dataclasses.replace(config, scan_layers=True)
    assert len(params["decoder"]["blocks"]) == config.num_layers
    stacked = scan_params(params, *blocks)
    jax.tree.map(np.testing.assert_array_equal, loop_params(stacked), params)
    shapes = jax.eval_shape(lambda: Decoder(scanned).init(jax.random.key(0), tokens))["params"]
    assert jax.tree.map(lambda x: x.shape, stacked) == jax.tree.map(lambda x: x.shape, shapes)
    parts = {"first": len(config.first), "blocks": len(config.pattern), "last": len(config.remainder)}
    assert {name: len(shapes["decoder"].get(name, {})) for name in parts} == parts
    np.testing.assert_allclose(
        tiny.forward(scanned)(stacked, tokens), tiny.forward(config)(params, tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("shape", ["a remainder", "both"])
@pytest.mark.parametrize("scan", [False, True])
def test_cached_is_full(tiny, shape, scan):
    config, tokens = tiny.config("rotary", scan_layers=scan, **SHAPES[shape]), tiny.tokens((2, 7))
    params = tiny.params(dataclasses.replace(config, scan_layers=False))
    params = scan_params(params, len(config.pattern), len(config.first)) if scan else params
    forward, cache, parts = tiny.forward(config), Decoder(config).init_cache(2, 8), []
    for chunk in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        logits, cache = forward(params, chunk, cache=cache)
        parts.append(logits)
    full = forward(params, tokens)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, atol=1e-4, rtol=1e-4)


def test_a_memory_goes_through_all_parts(tiny):
    shape = {**SHAPES["both"], "positions": TransformerXLPositions(), "memory_length": 3}
    base = tiny.config("transformer_xl", **shape)
    tokens = tiny.tokens((2, 6))
    outs = []
    for scan in (False, True):
        config = dataclasses.replace(base, scan_layers=scan)
        params = scan_params(tiny.params(base), len(base.pattern), len(base.first)) if scan else tiny.params(base)
        memory, parts = Decoder(config).init_memory(2), []
        for start in (0, 3):
            positions = np.arange(start, start + 3, dtype=np.int32)[None]
            chunk = tokens[:, start : start + 3]
            out, memory = tiny.forward(config)(params, chunk, positions_BT=positions, memory_BLPD=memory)
            parts.append(out)
        outs.append((np.concatenate(parts, axis=1), memory))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), *outs)


def test_own_positions_are_a_model_of_them(tiny):
    """A model whose every block has its own equals one that has them as its positions."""
    tokens = tiny.tokens((2, 7))
    own = RotaryPositions(theta=50.0, fraction=0.5)
    block = BlockConfig(HEADS, FeedForwardConfig(24))
    as_own = tiny.config("alibi", pattern=(dataclasses.replace(block, own_positions=own),))
    as_models = tiny.config("rotary", pattern=(block,), positions=own)
    assert tiny.params(as_own).keys() == tiny.params(as_models).keys()
    outs = [tiny.forward(config)(tiny.params(as_models), tokens) for config in (as_own, as_models)]
    np.testing.assert_array_equal(*outs)
    other = tiny.forward(tiny.config("rotary", pattern=(block,)))(tiny.params(as_models), tokens)
    assert np.abs(outs[0] - other).max() > 1e-3


def test_a_block_without_rotary_positions(tiny):
    """Every fourth block turns nothing (SmolLM3): as its blocks one by one."""
    tokens, turned = tiny.tokens((2, 7)), BlockConfig(HEADS, FeedForwardConfig(24))
    still = dataclasses.replace(turned, own_positions=NoPositions())
    config = tiny.config("rotary", num_layers=4, pattern=(turned, turned, turned, still), final_norm=False)
    params = tiny.params(config)

    @jax.jit
    def block_by_block(params):
        x = params["token_embedding"]["embedding"][tokens]
        for index, kind in enumerate([RotaryPositions()] * 3 + [NoPositions()]):
            block = {"params": params["decoder"]["blocks"][f"block_{index}"]}
            x = Block(turned, positions=kind).apply(block, x, mask=AttentionMask(causal=True))
        return x @ params["token_embedding"]["embedding"].T

    expected = block_by_block(params)
    np.testing.assert_allclose(tiny.forward(config)(params, tokens), expected, atol=1e-4)
    everywhere = tiny.forward(dataclasses.replace(config, pattern=(turned,)))(params, tokens)
    assert np.abs(everywhere - expected).max() > 1e-3


def test_a_shared_bias_reaches_only_blocks_without_their_own(tiny):
    tokens = tiny.tokens((2, 7))
    plain = BlockConfig(HEADS, FeedForwardConfig(24))
    config = tiny.config(
        "t5", positions=T5Positions(), pattern=(plain, dataclasses.replace(plain, own_positions=NoPositions()))
    )
    params = dict(tiny.params(config))
    alone = tiny.config("none", pattern=(plain,))
    params["decoder"] = {
        **params["decoder"],
        "relative_bias": {"embedding": 0 * params["decoder"]["relative_bias"]["embedding"]},
    }
    out = tiny.forward(config)(params, tokens)
    rest = {**params, "decoder": {name: part for name, part in params["decoder"].items() if name != "relative_bias"}}
    np.testing.assert_allclose(out, tiny.forward(alone)(rest, tokens), atol=1e-5)


def test_a_fraction_leaves_the_other_elements(tiny):
    del tiny
    positions = RotaryPositions(fraction=0.25)
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    index = jnp.arange(3, dtype=jnp.int32)[None]
    turned, _ = positions.rotate(x, x, lambda: (index, index))
    np.testing.assert_array_equal(turned[..., 2:], x[..., 2:])
    whole, _ = RotaryPositions().rotate(x[..., :2], x[..., :2], lambda: (index, index))
    np.testing.assert_array_equal(turned[..., :2], whole)
    assert np.abs(turned[:, 1:, :, :2] - x[:, 1:, :, :2]).max() > 0.1
