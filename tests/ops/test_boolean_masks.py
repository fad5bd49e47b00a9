"""Masks that people have: booleans as Flax makes them stand for a description."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.attention import Attention
from transformer.layers.cache import init_cache
from transformer.model_config import AttentionConfig
from transformer.model_kinds import AttentionCall
from transformer.ops.attention import dot_product_attention
from transformer.ops.backends.auto import AutoBackend
from transformer.ops.masks import AttentionMask

B, T, H, K = 2, 6, 2, 4
SEGMENTS = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0]])
VALID = SEGMENTS != 0
CAUSAL = nn.make_causal_mask(jnp.ones((B, T)), dtype=bool)
# The array, and the description of the same.
CASES = {
    "causal": (CAUSAL, AttentionMask(causal=True)),
    "one row for all": (CAUSAL[:1], AttentionMask(causal=True)),
    "segments": (
        nn.make_attention_mask(SEGMENTS, SEGMENTS, jnp.equal, dtype=bool)
        & nn.make_attention_mask(VALID, VALID, dtype=bool),
        AttentionMask.packed(SEGMENTS),
    ),
    "combined": (
        nn.combine_masks(CAUSAL, nn.make_attention_mask(VALID, VALID, dtype=bool), dtype=bool),
        AttentionMask(causal=True, query_segment_ids=VALID.astype(int), key_segment_ids=VALID.astype(int)),
    ),
    "keys of each row": (VALID[:, None, None, :], AttentionMask(key_segment_ids=VALID.astype(int))),
    "nothing": (jnp.zeros((1, 1, 1, 1), bool), AttentionMask(key_lengths=jnp.zeros((1,), int))),
}


def select(platform, *arrays, **settings):
    """The backend that `auto` takes on a platform."""
    return AutoBackend().on(platform, AttentionCall(*arrays, **settings)).kind


def operands(length=T, heads=H):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (B, length, heads, K)) for key in keys]


@pytest.mark.parametrize("implementation", ["auto", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_array_is_its_description(name, implementation):
    array, described = CASES[name]

    def loss(operands, mask):
        return (dot_product_attention(*operands, mask=mask, implementation=implementation) ** 2).sum()

    found, expected = (jax.jit(jax.value_and_grad(loss))(operands(), mask) for mask in (array, described))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_heads_may_differ():
    mask = jnp.stack([jnp.tri(T, dtype=bool), ~jnp.tri(T, k=-1, dtype=bool)])[None]
    out = dot_product_attention(*operands(), mask=mask)
    for head in range(H):
        alone = [x[:, :, head : head + 1] for x in operands()]
        expected = dot_product_attention(*alone, mask=mask[:, head : head + 1])
        np.testing.assert_allclose(out[:, :, head : head + 1], expected, atol=1e-6)


def test_long_rows_are_refused_by_kernels_and_auto_takes_what_can():
    x = jax.ShapeDtypeStruct((B, 1024, H, 64), jnp.bfloat16)
    mask = AttentionMask.of(jnp.ones((B, 1, 1024, 1024), bool))
    for platform in ("cpu", "tpu", "cuda"):
        assert select(platform, x, x, x, mask=mask) == "xla"
    for implementation in ("blockwise", "splash", "cudnn"):
        with pytest.raises(ValueError, match=f"'{implementation}' cannot honour an array as mask"):
            dot_product_attention(*operands(), mask=CAUSAL, implementation=implementation)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (jnp.ones((T, T), bool), r"must have shape \[B, 1, T, S\] .*, got \(6, 6\)"),
        (jnp.ones((B, T, T), bool), r"must have shape \[B, 1, T, S\] .*, got \(2, 6, 6\)"),
        (jnp.ones((B, 1, T, T + 1), bool), r"must have shape \[2, 1, 6, 6\] .*, got \(2, 1, 6, 7\)"),
        (jnp.ones((B + 1, 1, T, T), bool), r"must have shape \[2, 1, 6, 6\] .*, got \(3, 1, 6, 6\)"),
        (nn.make_causal_mask(jnp.ones((B, T))), "got an array of float32; make it with dtype=bool"),
    ],
)
def test_refusals_name_the_shape(mask, message):
    for call in (
        lambda: inspect.unwrap(dot_product_attention)(*operands(), mask=mask),
        lambda: Attention(AttentionConfig(num_heads=H)).apply({"params": PARAMS}, jnp.ones((B, T, 8)), mask=mask),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()


PARAMS = Attention(AttentionConfig(num_heads=H)).init(jax.random.key(0), jnp.ones((B, T, 8)))["params"]


@pytest.mark.parametrize("window", [0, 3])
def test_layer(window):
    """The window of the config is a condition beside it."""
    layer = Attention(AttentionConfig(num_heads=H, num_kv_heads=H, window=window))
    x = jax.random.normal(jax.random.key(1), (B, T, 8))
    found, expected = (layer.apply({"params": PARAMS}, x, mask=mask) for mask in (CAUSAL, AttentionMask(causal=True)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_with_a_cache_it_is_refused():
    layer = Attention(AttentionConfig(num_heads=H))
    with pytest.raises(ValueError, match=r"With a cache, mask\.visible follows from it; leave it out"):
        layer.apply({"params": PARAMS}, jnp.ones((B, T, 8)), mask=CAUSAL, cache=init_cache(B, T, H, 4))
