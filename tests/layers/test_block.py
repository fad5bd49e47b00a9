"""Blocks: where norms stand, which sub-layers there are, and what dropout touches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.attention import Attention
from transformer.layers.block import Block
from transformer.layers.feed_forward import FeedForward
from transformer.layers.norm import Normalize
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig
from transformer.model_kinds import NORMS
from transformer.ops.masks import AttentionMask
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.rotary import RotaryPositions
from transformer.types import UserError

pytestmark = pytest.mark.usefixtures("strict_dtypes")
CAUSAL = AttentionMask(causal=True)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "output"])
@pytest.mark.parametrize("cross", [False, True])
def test_block_is_its_formula(small, kind, placement, cross):
    config = BlockConfig(attention=AttentionConfig(num_heads=2, window=3), norm=NORMS.find(kind)(placement))
    positions = RotaryPositions()
    block = Block(config, positions=positions, cross_attention=cross)
    inputs, encoded = small.normal(2, 5, 8), small.normal(2, 6, 8, seed=1) if cross else None
    arguments = {"mask": CAUSAL, "encoded_BSD": encoded}
    params = small.random_params(block, inputs, **arguments)

    def f(role, x):
        if role == "attention":
            layer = Attention(config.attention, positions=positions)
            return layer.apply({"params": params[role]}, x, mask=CAUSAL)
        if role == "cross_attention":  # without positions and window
            return Attention(AttentionConfig(num_heads=2)).apply({"params": params[role]}, x, encoded_BSD=encoded)
        return FeedForward(config.feed_forward).apply({"params": params[role]}, x)

    def n(name, x):
        return Normalize(config.norm).apply({"params": params[name]}, x)

    @small.jit
    def formula(x):
        for role in ["attention", *["cross_attention"] * cross, "feed_forward"]:
            if placement == "pre":
                x = x + f(role, n(f"pre_{role}_norm", x))
            elif placement == "post":
                x = n(f"post_{role}_norm", x + f(role, x))
            elif placement == "output":
                x = x + n(f"post_{role}_norm", f(role, x))
            else:
                x = x + n(f"post_{role}_norm", f(role, n(f"pre_{role}_norm", x)))
        return x

    np.testing.assert_allclose(small.apply(block, params, inputs, **arguments), formula(inputs), atol=2e-5)
    roles = ["attention", "feed_forward"] + ["cross_attention"] * cross
    sides = {"pre": ["pre"], "post": ["post"], "sandwich": ["pre", "post"], "output": ["post"]}[placement]
    assert sorted(params) == sorted(roles + [f"{side}_{role}_norm" for side in sides for role in roles])


def test_dropout_is_on_what_sub_layers_add(small):
    block, inputs = Block(BlockConfig(), dropout=0.5), small.normal(2, 5, 8)
    params = jax.tree.map(jnp.zeros_like, small.random_params(block, inputs))
    # Sub-layers that add nothing: the stream itself passes untouched.
    out = small.apply(block, params, inputs, train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(out, inputs)
    # A feed-forward network that adds ones: half of them arrive, doubled.
    block = Block(BlockConfig(feed_forward=FeedForwardConfig(use_bias=True)), dropout=0.5)
    params = jax.tree.map(jnp.zeros_like, small.random_params(block, inputs))
    params["feed_forward"]["down"]["bias"] += 1.0
    added = small.apply(block, params, inputs, train=True, rngs={"dropout": jax.random.key(0)}) - inputs
    np.testing.assert_allclose(np.unique(np.round(added, 4)), [0, 2])
    np.testing.assert_allclose(small.apply(block, params, inputs) - inputs, 1, atol=1e-5)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_parallel_sub_layers_and_a_block_without_its_first_norm(small, normed, parallel):
    config = BlockConfig(AttentionConfig(num_heads=2), attention_norm=normed, parallel=parallel)
    block, x = Block(config), small.normal(2, 5, 8)
    params = small.random_params(block, x, mask=CAUSAL)

    def n(name, x):
        return Normalize(config.norm).apply({"params": params[name]}, x)

    @small.jit
    def formula(x):
        attended = Attention(config.attention).apply(
            {"params": params["attention"]}, n("pre_attention_norm", x) if normed else x, mask=CAUSAL
        )
        read = x if parallel else x + attended
        network = FeedForward(config.feed_forward).apply(
            {"params": params["feed_forward"]}, n("pre_feed_forward_norm", read)
        )
        return x + attended + network

    np.testing.assert_allclose(small.apply(block, params, x, mask=CAUSAL), formula(x), atol=2e-5)
    assert ("pre_attention_norm" in params) == normed


def test_what_a_block_refuses(small):
    with pytest.raises(UserError, match=r"parallel=True is for norm.placement=pre, got sandwich"):
        BlockConfig(norm=RMSNorm(placement="sandwich"), parallel=True)
    with pytest.raises(UserError, match=r"attention_norm=False is for norm.placement=pre or sandwich, got output"):
        BlockConfig(norm=RMSNorm(placement="output"), attention_norm=False)
    block = Block(BlockConfig(AttentionConfig(num_heads=2), parallel=True), cross_attention=True)
    with pytest.raises(UserError, match="parallel=True is for blocks without cross-attention"):
        block.init(jax.random.key(0), small.normal(2, 5, 8), encoded_BSD=small.normal(2, 5, 8))
