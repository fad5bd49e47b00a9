"""The attention layer: heads by hand, permutations, positions, caches, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.attention import Attention
from transformer.layers.cache import init_cache, init_cross_attention_cache
from transformer.layers.runtime import Runtime
from transformer.model_config import AttentionConfig
from transformer.model_kinds import POSITIONS
from transformer.ops.masks import AttentionMask
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.rotary import RotaryPositions
from transformer.parallel.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("strict_dtypes")
CAUSAL = AttentionMask(causal=True)


def per_head(params, inputs, encoded, visible, config, head_dim, norm):
    """Vaswani et al. 2017, section 3.2.2, written as a loop over heads in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    inputs, encoded = np.asarray(inputs, np.float64), np.asarray(encoded, np.float64)

    def project(role, x, head):
        projected = x @ params[role]["kernel"][:, head] + params[role].get("bias", np.zeros((9, 1)))[head]
        if config.qk_norm and role != "value":
            projected /= np.sqrt((of_norm(role, x, projected) ** 2).mean(axis=-1, keepdims=True) + norm.epsilon)
            scale = params[f"{role}_norm"]["scale"]
            projected *= norm.unit_offset + (scale[head] if config.qk_norm_scope == "all" else scale)
        return projected

    def of_norm(role, x, projected):
        """What is normalised together: a head, or all of them."""
        if config.qk_norm_scope == "head":
            return projected
        all_heads = np.einsum("btd,dhk->bthk", x, params[role]["kernel"]) + params[role].get("bias", 0)
        return all_heads.reshape(*x.shape[:2], -1)

    out = np.zeros_like(inputs) + params["out"].get("bias", 0)
    for head in range(config.num_heads):
        shared = head * config.kv_heads // config.num_heads
        query = project("query", inputs, head)
        key, value = project("key", encoded, shared), project("value", encoded, shared)
        logits = np.einsum("btk,bsk->bts", query, key) * (config.query_scale or 1 / np.sqrt(head_dim))
        if config.logits_soft_cap:
            logits = config.logits_soft_cap * np.tanh(logits / config.logits_soft_cap)
        weights = np.where(visible, np.exp(logits), 0)
        weights /= weights.sum(axis=-1, keepdims=True)
        out += np.einsum("bts,bsk->btk", weights, value) @ params["out"]["kernel"][head]
    return out


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(num_heads=4),
        AttentionConfig(num_heads=4, num_kv_heads=2, use_bias=True, qk_norm=True),
        AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=3, logits_soft_cap=1.5),
        AttentionConfig(num_heads=2, implementation="blockwise", use_bias=True),
        AttentionConfig(num_heads=4, num_kv_heads=2, use_bias=True, out_bias=False, query_scale=0.9),
        AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True, qk_norm_scope="all", use_bias=True),
        AttentionConfig(num_heads=4, query_scale=0.3, implementation="blockwise", qk_norm=True),
    ],
    ids=[
        "plain",
        "grouped_bias_norm",
        "one_kv_head_cap",
        "blockwise",
        "scale_no_out_bias",
        "norm_of_all",
        "blockwise_scale",
    ],
)
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_is_a_loop_over_heads(small, config, cross):
    norm = RMSNorm(epsilon=0.3, unit_offset=config.query_scale > 0)
    layer, inputs = Attention(config, norm=norm), small.normal(2, 5, 8)
    encoded = small.normal(2, 7, 6, seed=1) if cross else None
    params = small.random_params(layer, inputs, encoded_BSD=encoded)
    assert all(("bias" in params[role]) == config.use_bias for role in ("query", "key", "value"))
    assert ("bias" in params["out"]) == (config.use_bias and config.out_bias)
    mask = AttentionMask() if cross else CAUSAL
    visible = np.ones((5, 7), bool) if cross else np.tri(5, dtype=bool)
    out = small.apply(layer, params, inputs, encoded_BSD=encoded, mask=mask)
    expected = per_head(
        params,
        inputs,
        inputs if encoded is None else encoded,
        visible,
        config,
        config.head_dim or 8 // config.num_heads,
        norm,
    )
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["none", "rotary", "alibi", "transformer_xl"])
def test_permutation_equivariance_only_without_positions(small, kind):
    layer = Attention(AttentionConfig(num_heads=2), positions=POSITIONS.find(kind)())
    inputs, permutation = small.normal(2, 5, 8), np.array([2, 0, 4, 1, 3])
    params = small.random_params(layer, inputs)
    out = small.apply(layer, params, inputs)
    permuted = small.apply(layer, params, inputs[:, permutation])
    difference = np.abs(permuted - out[:, permutation]).max()
    assert difference < 1e-5 if kind == "none" else difference > 1e-2
    assert np.abs(small.apply(layer, params, inputs, mask=CAUSAL) - out).max() > 1e-2


@pytest.mark.parametrize("kind", ["rotary", "alibi", "transformer_xl"])
def test_only_distances_matter(small, kind):
    layer = Attention(AttentionConfig(num_heads=2), positions=POSITIONS.find(kind)())
    inputs, positions = small.normal(2, 5, 8), jnp.arange(5)[None]
    params = small.random_params(layer, inputs)
    out = small.apply(layer, params, inputs)
    np.testing.assert_allclose(small.apply(layer, params, inputs, positions_BT=positions + 100), out, atol=1e-4)
    assert np.abs(small.apply(layer, params, inputs, positions_BT=2 * positions) - out).max() > 1e-3


def test_rotary_options_reach_the_operation(small):
    inputs = small.normal(1, 5, 8)
    config = AttentionConfig(num_heads=1)
    plain = Attention(config, positions=RotaryPositions())
    params = small.random_params(plain, inputs)
    out = small.apply(plain, params, inputs)
    for changed in (
        RotaryPositions(theta=10.0),
        RotaryPositions(scaling="linear", scaling_factor=2.0),
        RotaryPositions(scaling="llama3", scaling_factor=8.0, original_length=16),
    ):
        assert np.abs(small.apply(Attention(config, positions=changed), params, inputs) - out).max() > 1e-4


def test_window_of_config_and_of_mask_both_hold(small):
    inputs = small.normal(1, 6, 8)
    free = Attention(AttentionConfig(num_heads=2))
    params = small.random_params(free, inputs)
    for of_config, of_mask in [(2, 0), (2, 4), (4, 2)]:
        layer = Attention(AttentionConfig(num_heads=2, window=of_config))
        out = small.apply(layer, params, inputs, mask=AttentionMask(causal=True, window=of_mask))
        expected = small.apply(free, params, inputs, mask=AttentionMask(causal=True, window=2))
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_attention_dropout(small):
    layer, inputs = Attention(AttentionConfig(num_heads=2, dropout=0.5)), small.normal(1, 5, 8)
    params = small.random_params(layer, inputs)
    plain = small.apply(layer, params, inputs)
    dropped = [
        small.apply(layer, params, inputs, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 1e-2
    assert np.abs(dropped[0] - plain).max() > 1e-2


@pytest.mark.parametrize("grouped", [1, 2])
def test_cached_is_full(small, grouped):
    layer = Attention(AttentionConfig(num_heads=4, num_kv_heads=grouped), positions=RotaryPositions())
    inputs = small.normal(2, 5, 8)
    params = small.random_params(layer, inputs)
    full = small.apply(layer, params, inputs, mask=CAUSAL)

    @small.jit
    def cached(params, inputs):
        cache, out = init_cache(2, 6, grouped, 2), []
        for start, end in [(0, 2), (2, 3), (3, 5)]:
            # The cache makes it causal: no mask is needed.
            part, cache = layer.apply({"params": params}, inputs[:, start:end], cache=cache)
            out.append(part)
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(cached(params, inputs), full, atol=1e-5)


def test_memory_is_projected_once(small):
    layer = Attention(AttentionConfig(num_heads=2))
    inputs, encoded = small.normal(2, 3, 8), small.normal(2, 4, 8, seed=1)
    params = small.random_params(layer, inputs, encoded_BSD=encoded)
    full = small.apply(layer, params, inputs, encoded_BSD=encoded)
    first, cache = small.apply(
        layer, params, inputs[:, :2], encoded_BSD=encoded, cache=init_cross_attention_cache(2, 2, 4)
    )
    queries = {"params": {name: params[name] for name in ("query", "out")}}
    then, _ = layer.apply(queries, inputs[:, 2:], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([first, then], axis=1), full, atol=1e-5)


def test_bfloat16(small):
    config = AttentionConfig(num_heads=2, qk_norm=True, use_bias=True)
    inputs = small.normal(2, 5, 8)
    params = small.random_params(Attention(config), inputs)
    expected = small.apply(Attention(config, positions=RotaryPositions()), params, inputs, mask=CAUSAL)
    layer = Attention(config, positions=RotaryPositions(), runtime=Runtime(dtype=jnp.bfloat16))
    out = small.apply(layer, params, inputs.astype(jnp.bfloat16), mask=CAUSAL)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.1)


@pytest.mark.parametrize(
    ("config", "positions", "arguments", "message"),
    [
        ({"num_heads": 3}, "none", {}, "num_heads must divide ModelConfig.embed_dim=8, got 3"),
        ({}, "rotary", {"encoded_BSD": 0}, "Cross-attention compares no positions .* got kind='rotary'"),
        ({}, "none", {"encoded_BSD": 0, "cache": 0}, "Cross-attention needs a CrossAttentionCache, got a KVCache"),
        (
            {},
            "none",
            {"positions_BT": 0, "cache": 0},
            "With a cache, positions are its next slots; leave positions_BT out",
        ),
        ({}, "none", {"mask": 0, "cache": 0}, "With a cache, mask.key_lengths follows from it; leave it out"),
        (
            {"implementation": "blockwise", "dropout": 0.1},
            "none",
            {"train": True},
            "'blockwise' cannot honour dropout_rate=0.1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_refusals(small, config, positions, arguments, message):
    layer = Attention(AttentionConfig(**config), positions=POSITIONS.find(positions)())
    values = {
        "encoded_BSD": small.normal(1, 3, 8),
        "cache": init_cache(1, 4, 4, 2),
        "positions_BT": jnp.zeros((1, 2), jnp.int32),
        "mask": AttentionMask(key_lengths=jnp.array([1])),
        "train": True,
    }
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: layer.init(keys, small.normal(1, 2, 8), **{name: values[name] for name in arguments}))


@pytest.mark.devices(4)
@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_attention_dropout_over_a_mesh(small, sizes):
    """What is dropped does not depend on the devices, and something is."""
    layer, inputs = Attention(AttentionConfig(num_heads=2, dropout=0.5)), small.normal(2, 5, 8)
    params = small.random_params(layer, inputs)

    def run(train):
        return small.apply(layer, params, inputs, train=train, rngs={"dropout": jax.random.key(0)})

    dropped, plain = run(True), run(False)
    with jax.set_mesh(make_mesh(sizes)):
        np.testing.assert_allclose(run(True), dropped, atol=1e-5)
        np.testing.assert_allclose(run(False), plain, atol=1e-5)
    assert np.abs(dropped - plain).max() > 1e-2
