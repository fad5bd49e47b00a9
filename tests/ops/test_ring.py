"""Ring attention over eight devices is attention: values, and gradients of all that has one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from transformer.ops.attention import dot_product_attention
from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.positions.alibi import AlibiBias
from transformer.ops.positions.t5 import T5Bias
from transformer.ops.ring import ring_attention
from transformer.ops.zigzag import balanced_order

B, T, H, G, K, DEVICES = 2, 64, 4, 2, 8, 8
ORDER = balanced_order(T, DEVICES)


def segments():
    rng = np.random.default_rng(5)
    first, both = rng.integers(5, 40, (B, 1)), rng.integers(45, T, (B, 1))
    places = np.arange(T)[None]
    return jnp.asarray(np.where(places < first, 1, 2) * (places < both), jnp.int32)


def positions():
    ids = np.asarray(segments())
    starts = np.diff(ids, axis=1, prepend=-1) != 0
    return jnp.asarray(np.arange(T)[None] - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1), jnp.int32)


CASES = {
    "causal": (AttentionMask(causal=True), None, 0.0),
    "both directions": (AttentionMask(), None, 0.0),
    "segments and a soft cap": (AttentionMask.packed(segments(), causal=True), None, 2.0),
    "window": (AttentionMask(causal=True, window=11), None, 0.0),
    "window, segments, alibi": (
        AttentionMask(
            causal=True,
            window=20,
            query_segment_ids=segments(),
            key_segment_ids=segments(),
            query_positions=positions(),
            key_positions=positions(),
        ),
        AlibiBias.for_heads(H),
        0.0,
    ),
    "t5": (
        AttentionMask(causal=True),
        T5Bias(jnp.asarray(np.random.default_rng(6).normal(size=(8, H)), jnp.float32), False, 16),
        0.0,
    ),
    "hidden by a finite bias": (AttentionMask(causal=True), T5Bias(jnp.full((8, H), -1e9), False, 16), 0.0),
}


def arrays(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, T, heads, K)), dtype) for heads in (H, G, G, H)]


def in_ring_order(mask):
    return jax.tree.map(lambda x: x[:, ORDER], mask)


def ring(query, key, value, bias, mask, soft_cap):
    mesh = jax.make_mesh((DEVICES,), ("context",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec(None, "context")
    attend = jax.shard_map(
        lambda q, k, v, b, m: ring_attention(
            q, k, v, mask=m, bias=b, scale=0.3, logits_soft_cap=soft_cap, axis_name="context"
        ),
        mesh=mesh,
        in_specs=(rows, rows, rows, PartitionSpec(), rows),
        out_specs=rows,
        check_vma=False,
    )
    out = attend(query[:, ORDER], key[:, ORDER], value[:, ORDER], bias, in_ring_order(mask))
    return jnp.zeros_like(out).at[:, ORDER].set(out)


def reference(query, key, value, bias, mask, soft_cap):
    return dot_product_attention(
        query, key, value, mask=mask, bias=bias, scale=0.3, logits_soft_cap=soft_cap, implementation="xla"
    )


def graded(attend, mask, bias, soft_cap):
    *inputs, cotangent = arrays()

    @jax.jit
    def run(query, key, value, bias):
        out, pull_back = jax.vjp(functools.partial(attend, mask=mask, soft_cap=soft_cap), query, key, value, bias)
        return out, pull_back(cotangent)

    return run(*inputs, bias)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case):
    mask, bias, soft_cap = CASES[case]
    out, gradients = graded(ring, mask, bias, soft_cap)
    expected, expected_gradients = graded(reference, mask, bias, soft_cap)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients, expected_gradients)


def test_keeps_the_dtype():
    query, key, value, _ = arrays(jnp.bfloat16)
    mask = AttentionMask(causal=True)
    out = jax.jit(lambda q, k, v: ring(q, k, v, None, mask, 0.0))(query, key, value)
    assert out.dtype == jnp.bfloat16
    expected = reference(query, key, value, None, mask, 0.0)
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=0.03)


def test_padding_gives_zeros():
    mask, _, _ = CASES["segments and a soft cap"]
    out = jax.jit(lambda *x: ring(*x, None, mask, 0.0))(*arrays()[:3])
    assert np.all(np.asarray(out)[np.asarray(segments()) == 0] == 0)


@pytest.mark.parametrize(
    ("changes", "bias", "message"),
    [
        ({"pattern": FixedPattern(block_size=8, stride=2)}, None, "cannot honour mask.pattern"),
        ({"key_lengths": jnp.ones((B,), jnp.int32)}, None, "cannot honour mask.key_lengths"),
        ({"query_offset": jnp.ones((B,), jnp.int32)}, None, "cannot honour mask.query_offset"),
        ({"key_prefix": jnp.ones((B, T), bool)}, None, "cannot honour mask.key_prefix"),
        ({}, jnp.ones((1, 1, T, T)), "cannot honour a dense bias"),
        ({"query_positions": jnp.ones((B, T), jnp.int32)}, None, "got one of them"),
    ],
)
def test_refuses_what_it_cannot_honour(changes, bias, message):
    query, key, value, _ = arrays()
    mask = dataclasses.replace(AttentionMask(causal=True), **changes)
    with pytest.raises(ValueError, match=message):
        ring_attention(query, key, value, mask=mask, bias=bias, scale=1.0, axis_name="context")


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_device_has_early_and_late_positions(devices):
    order = balanced_order(32, devices)
    assert sorted(order.tolist()) == list(range(32))
    work = (order.reshape(devices, -1) + 1).sum(axis=1)  # keys that its queries see
    assert len(set(work.tolist())) == 1
    assert all(np.all(np.diff(places) > 0) for places in order.reshape(devices, -1))
