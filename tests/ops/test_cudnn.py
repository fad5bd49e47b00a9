"""cuDNN attention: what is asked of it for a description of a mask, and what is refused."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from transformer.model_kinds import AttentionCall
from transformer.ops.attention import dot_product_attention
from transformer.ops.backends import cudnn
from transformer.ops.backends.auto import AutoBackend
from transformer.ops.backends.cudnn_packed import Target
from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.fixed import FixedPattern
from transformer.planning.chips import find_topology

CAUSAL = AttentionMask(causal=True)
ATTEND = functools.partial(dot_product_attention, implementation="cudnn")
ONES = jnp.ones((2, 512), jnp.int32)
PLUGIN = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def select(platform, *arrays, **settings):
    """The backend that `auto` takes on a platform."""
    return AutoBackend().on(platform, AttentionCall(*arrays, **settings)).kind


def qkv(T=512, S=512, K=64, W=64, dtype=jnp.bfloat16):
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, T, 4, K), (2, S, 2, K), (2, S, 2, W)))


def gradient_of(implementation, mask):
    def loss(query, key, value):
        out = dot_product_attention(query, key, value, mask=mask, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


@pytest.fixture
def installed(monkeypatch):
    """As with JAX's CUDA plugin, whose version of cuDNN JAX asks for while tracing, for an H100; a program not compiled needs no
    more."""
    monkeypatch.setattr(cudnn, "_INSTALLED", True)
    monkeypatch.setattr(cudnn, "find_target", lambda: Target((9, 0), present=False))
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_100)


@pytest.mark.parametrize("implementation", ["cudnn", "auto"])
@pytest.mark.parametrize(
    ("mask", "mask_type", "window"),
    [
        (AttentionMask(), "NO_MASK", 0),
        (CAUSAL, "CAUSAL", 0),
        (AttentionMask(causal=True, window=7), "CAUSAL", 7),
        (AttentionMask(causal=True, key_lengths=jnp.asarray([3])), "PADDING_CAUSAL", 0),
        (AttentionMask(key_lengths=jnp.asarray([0, 600])), "PADDING", 0),
        (AttentionMask.packed(ONES, max_segments=1), "PADDING", 0),
        (AttentionMask.packed(ONES, max_segments=1, causal=True), "PADDING_CAUSAL", 0),
        (AttentionMask(query_segment_ids=ONES, max_segments=1, causal=True, window=7), "CAUSAL", 7),
        (AttentionMask.packed(ONES, max_segments=3), "PADDING", 0),
        (AttentionMask.packed(ONES, max_segments=3, causal=True), "PADDING_CAUSAL", 0),
    ],
)
def test_kernels_get_the_mask(installed, implementation, mask, mask_type, window):
    traced = gradient_of(implementation, mask).trace(*qkv())
    text = traced.lower(lowering_platforms=("cuda",)).as_text().replace(r"\22", '"')
    assert text.count("__cudnn$fmhaSoftmax(") == text.count("__cudnn$fmhaSoftmaxBackward(") == 1
    assert text.count(f'"mask_type": "{mask_type}"') == 2
    assert text.count(f'"sliding_window_length": {window}') == 2


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(),
        AttentionMask(causal=True, window=7),
        AttentionMask(causal=True, key_lengths=jnp.asarray([0, 9])),
        AttentionMask(key_lengths=jnp.asarray([70])),
    ],
)
def test_the_requested_call_equals_the_reference(monkeypatch, mask):
    """By JAX's own definition of it, which runs anywhere."""
    define = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, **s: define(*x, **{**s, "implementation": "xla"}))
    query, key, value = (jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(qkv(64, 64, 8, 8)))
    out = jax.jit(functools.partial(cudnn.cudnn_attention, scale=0.3))(query, key, value, mask=mask)
    expected = dot_product_attention(query, key, value, mask=mask, scale=0.3, implementation="xla")
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.devices(4)
def test_heads_and_rows_may_be_split_by_shard_map(installed):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    spec = PartitionSpec("data", None, "tensor")
    attend = functools.partial(dot_product_attention, mask=CAUSAL)
    inside = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(inside).trace(*qkv()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax(") == 1


def test_other_platforms_have_no_trace_of_it(installed):
    traced = gradient_of("auto", CAUSAL).trace(*qkv())
    assert "cudnn" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "cudnn" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_a_platform_without_it_is_named(installed):
    with pytest.raises(NotImplementedError, match="cpu"):
        gradient_of("cudnn", CAUSAL).trace(*qkv()).lower(lowering_platforms=("cpu",))


def test_auto_picks_it_for_whole_long_rows_in_half_precision(installed):
    assert select("cuda", *qkv(), mask=CAUSAL) == "cudnn"
    assert select("cuda", *qkv(dtype=jnp.float32), mask=CAUSAL) == "blockwise"
    assert select("cuda", *qkv(T=128, S=128), mask=CAUSAL) == "xla"
    assert select("cuda", *qkv(), mask=AttentionMask.packed(ONES, causal=True)) == "blockwise"
    assert select("cuda", *qkv(), mask=AttentionMask.packed(ONES, causal=True, max_segments=9)) == "cudnn"
    assert select("tpu", *qkv(K=128, W=128), mask=AttentionMask.packed(ONES, max_segments=9)) == "splash"
    assert select("cpu", *qkv(), mask=AttentionMask.packed(ONES, max_segments=9)) == "blockwise"


@pytest.mark.parametrize("capability", [(), (8, 9)])
def test_packed_rows_and_wide_heads_need_a_known_gpu_of_hopper_or_later(installed, monkeypatch, capability):
    one, several = (AttentionMask.packed(ONES, causal=True, max_segments=most) for most in (1, 2))
    assert [select("cuda", *qkv(), mask=mask) for mask in (one, several)] == ["cudnn", "cudnn"]
    assert select("cuda", *qkv(K=256, W=256), mask=CAUSAL) == "cudnn"
    monkeypatch.setattr(cudnn, "find_target", lambda: Target(capability, present=False))
    assert [select("cuda", *qkv(), mask=mask) for mask in (one, several)] == ["cudnn", "blockwise"]
    assert select("cuda", *qkv(K=256, W=256), mask=CAUSAL) == "blockwise"
    with pytest.raises(ValueError, match=r"mask\.max_segments=2 for a GPU that is unknown or older than an H100"):
        jax.eval_shape(functools.partial(ATTEND, mask=several), *qkv())
    with pytest.raises(ValueError, match=r"heads of 256 .* or 256 on an H100 or later"):
        jax.eval_shape(functools.partial(ATTEND, mask=CAUSAL), *qkv(K=256, W=256))


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        (
            {},
            {"mask": AttentionMask.packed(ONES)},
            r"mask\.query_segment_ids without a promise of how many there are: data\.max_segments in training, "
            r"AttentionMask\(max_segments=\) in Python",
        ),
        (
            {},
            {"mask": AttentionMask(query_segment_ids=ONES, key_lengths=jnp.ones(2, jnp.int32), max_segments=1)},
            r"mask\.key_lengths beside mask\.query_segment_ids",
        ),
        (
            {},
            {"mask": AttentionMask(key_segment_ids=ONES, max_segments=4)},
            r"mask\.key_segment_ids with max_segments=4 \(1, or self-attention with the ids of both sides\)",
        ),
        (
            {},
            {"mask": AttentionMask.packed(ONES, causal=True, window=9, max_segments=4)},
            r"mask\.window=9 \(with causal=True and without segment ids and key_lengths only\)",
        ),
        ({}, {"mask": AttentionMask(query_offset=jnp.zeros(2, jnp.int32))}, "mask.query_offset"),
        ({}, {"mask": AttentionMask(pattern=FixedPattern(block_size=64, stride=2))}, "mask.pattern"),
        ({}, {"mask": AttentionMask(window=9)}, r"mask\.window=9 \(with causal=True and without segment ids"),
        (
            {"T": 256},
            {"mask": CAUSAL},
            r"causal attention of 256 queries to 512 keys \(as many only\)",
        ),
        ({"T": 513, "S": 513}, {"mask": CAUSAL}, r"513 queries and 513 keys \(even numbers only"),
        ({"S": 601}, {}, r"512 queries and 601 keys \(even numbers only"),
        ({}, {"logits_soft_cap": 5.0}, r"logits_soft_cap=5\.0"),
        ({}, {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}, r"dropout_rate=0\.1 \(JAX fixes the seed"),
        ({}, {"bias": jnp.zeros((1, 1, 512, 512))}, "a bias"),
        ({"dtype": jnp.float32}, {}, r"inputs of float32 \(bfloat16 and float16 only\)"),
        (
            {"K": 264, "W": 264},
            {},
            r"heads of 264 and values of 264 \(one width, a multiple of 8 up to 128, or 256 on an H100",
        ),
        ({"K": 64, "W": 32}, {}, "heads of 64 and values of 32"),
    ],
)
def test_refusals_name_the_request(installed, arrays, settings, message):
    with pytest.raises(ValueError, match=f"'cudnn' cannot honour {message}"):
        jax.eval_shape(functools.partial(ATTEND, **settings), *qkv(**arrays))


@pytest.mark.skipif(PLUGIN, reason="JAX's CUDA plugin is installed")
def test_a_program_made_without_the_plugin_is_refused():
    with pytest.raises(ValueError, match=r"made without JAX's CUDA plugin \(pip install 'jax\[cuda12\]'\)"):
        jax.eval_shape(ATTEND, *qkv())


@pytest.mark.gpu
@pytest.mark.skipif(not PLUGIN, reason="needs JAX's CUDA plugin: pip install 'jax[cuda12]'")
@pytest.mark.parametrize("implementation", ["cudnn", "auto"])
def test_compiles_for_an_absent_gpu(implementation):
    one = jax.sharding.SingleDeviceSharding(find_topology("h100:1").devices[0])
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for x in qkv()]
    text = gradient_of(implementation, CAUSAL).lower(*arrays).compile().as_text()
    assert text.count("__cudnn$fmhaSoftmax") >= 2
