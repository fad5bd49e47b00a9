"""Splash attention: its kernel, interpreted, equals the reference; what `auto` lowers for a platform; what it refuses."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, PartitionSpec

from transformer.model_kinds import AttentionCall
from transformer.ops.attention import dot_product_attention
from transformer.ops.backends.auto import AutoBackend
from transformer.ops.backends.splash import block_size
from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.patterns.strided import StridedPattern
from transformer.ops.positions.alibi import AlibiBias

CAUSAL = AttentionMask(causal=True)
REFERENCE = functools.partial(dot_product_attention, implementation="xla")
SPLASH = functools.partial(dot_product_attention, implementation="splash")
KERNEL = "tpu_custom_call"


def select(platform, *arrays, **settings):
    """The backend that `auto` takes on a platform."""
    return AutoBackend().on(platform, AttentionCall(*arrays, **settings)).kind


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def qkv(T, S, H, G, K, W, batch=2):
    return normal(0, batch, T, H, K), normal(1, batch, S, G, K), normal(2, batch, S, G, W)


def segments(length, *rows):
    """Rows of segment ids; `(3, 100)` stands for a hundred tokens of segment 3, and what is left is padding."""
    ids = np.zeros((len(rows), length), np.int32)
    for row, parts in zip(ids, rows, strict=True):
        filled = np.concatenate([np.full(size, segment) for segment, size in parts])
        row[: len(filled)] = filled
    return jnp.asarray(ids)


PACKED = segments(600, [(1, 130), (2, 300), (3, 40)], [(0, 5), (7, 595)])
# Of more than one block each, of 384 tokens, the last filled in part. Together, every pair of features meets.
CASES = {
    "packed, grouped, window, cap": (
        (600, 600, 4, 2, 64, 64),
        {"mask": AttentionMask.packed(PACKED, causal=True, window=200), "logits_soft_cap": 3.0},
    ),
    "memory of other segments, wide and narrow": (
        (300, 700, 2, 1, 128, 64),
        {
            "mask": AttentionMask(
                query_segment_ids=PACKED[:, :300],
                key_segment_ids=segments(700, [(2, 650)], [(7, 300), (1, 400)]),
            ),
            "scale": 0.2,
        },
    ),
    "pattern, lengths, two heads": (
        (600, 600, 2, 2, 64, 128),
        {
            "mask": AttentionMask(
                causal=True,
                pattern=StridedPattern(block_size=64, stride=3),
                key_lengths=jnp.asarray([0, 450], jnp.int32),
            )
        },
    ),
    "window both ways, and queries beyond it": (
        (700, 300, 2, 1, 64, 64),
        {"mask": AttentionMask(window=50, query_segment_ids=segments(700, [(1, 690)])), "logits_soft_cap": 5.0},
    ),
}


def values_and_gradients(attend, arrays, **settings):
    def loss(query, key, value):
        out = attend(query, key, value, **settings).astype(jnp.float32)
        return jnp.sum(out * normal(3, *out.shape)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, gradients


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference_in_values_and_gradients(case):
    shapes, settings = CASES[case]
    (out, gradients), (expected_out, expected) = (
        values_and_gradients(attend, qkv(*shapes), **settings) for attend in (SPLASH, REFERENCE)
    )
    empty = ~np.asarray(settings["mask"].to_bool(*shapes[:2]).any(axis=(1, 3)))
    assert empty.any()
    assert (np.asarray(out)[np.broadcast_to(empty, out.shape[:2])] == 0).all()
    np.testing.assert_allclose(out, expected_out, atol=1e-5)
    for gradient, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, other, atol=1e-4)


def test_half_precision_follows_float32():
    arrays = qkv(128, 128, 2, 1, 64, 64)
    out, gradients = values_and_gradients(SPLASH, [x.astype(jnp.bfloat16) for x in arrays], mask=CAUSAL)
    expected_out, expected = values_and_gradients(REFERENCE, arrays, mask=CAUSAL)
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype(jnp.bfloat16)}
    for got, other in zip((out, *gradients), (expected_out, *expected), strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), other, atol=0.15)


def test_mapped_scanned_and_rematerialised_gradients_are_the_same():
    arrays = qkv(128, 128, 2, 1, 8, 8)
    mask = AttentionMask(causal=True, key_lengths=jnp.asarray([90, 128], jnp.int32))

    def row_gradient(row, wrap=lambda f: f):
        arrays, mask = jax.tree.map(lambda leaf: leaf[None], row)
        loss = wrap(lambda arrays: jnp.sum(SPLASH(*arrays, mask=mask) ** 2))
        return jax.tree.map(lambda leaf: leaf[0], jax.grad(loss)(arrays))

    @jax.jit
    def each_way(arrays, mask):
        return (
            jax.grad(lambda arrays: jnp.sum(REFERENCE(*arrays, mask=mask) ** 2))(arrays),
            jax.vmap(functools.partial(row_gradient, wrap=jax.checkpoint))((arrays, mask)),
            jax.lax.map(row_gradient, (arrays, mask)),
        )

    expected, *others = each_way(arrays, mask)
    for got, other in zip(jax.tree.leaves(others), jax.tree.leaves([expected, expected]), strict=True):
        np.testing.assert_allclose(got, other, atol=1e-5)


@pytest.mark.parametrize(("implementation", "length"), [("splash", 128), ("auto", 512)])
def test_runs_inside_shard_map(implementation, length):
    """Rows over one axis of a mesh, heads over the other, as in one piece."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec, rows = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
    arrays = qkv(length, length, 4, 2, 8, 8, batch=4)
    ids = segments(length, *([[(1, 50), (2, 60)]] * 4))

    def attend(query, key, value, ids):
        mask = AttentionMask.packed(ids, causal=True)
        return dot_product_attention(query, key, value, mask=mask, implementation=implementation)

    def sharded(query, key, value, ids):
        specs = {"in_specs": (spec, spec, spec, rows), "out_specs": spec}
        return jax.shard_map(attend, mesh=mesh, check_vma=False, **specs)(query, key, value, ids)

    def whole(query, key, value, ids):
        return REFERENCE(query, key, value, mask=AttentionMask.packed(ids, causal=True))

    gradients, expected = (
        jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x, ids) ** 2), argnums=(0, 1, 2)))(*arrays)
        for f in (sharded, whole)
    )
    for got, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, other, atol=1e-5)


# ---- What auto picks -------------------------------------------------------------------------------------------------


def gradient_of(implementation, mask=CAUSAL):
    def loss(query, key, value):
        out = dot_product_attention(query, key, value, mask=mask, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def lowered(function, platform, length=512):
    return function.trace(*qkv(length, length, 2, 1, 64, 64)).lower(lowering_platforms=(platform,)).as_text()


def test_auto_leaves_only_the_branch_of_its_platform_in_a_program():
    auto, blockwise = gradient_of("auto"), gradient_of("blockwise")
    assert lowered(auto, "tpu").count(KERNEL) == 3  # forward, and a kernel each for the gradients of queries and keys
    for platform in ("cpu", "cuda"):
        text, plain = lowered(auto, platform), lowered(blockwise, platform)
        assert KERNEL not in text
        assert text.count("dot_general") == plain.count("dot_general")
    assert KERNEL not in lowered(auto, "tpu", length=256)


def test_auto_is_a_plain_program_where_nothing_is_to_be_chosen():
    """A bias, or a short sequence: no switch, so that nothing is traced in vain."""
    arrays = qkv(512, 512, 2, 1, 8, 8)
    shape = jax.eval_shape(dot_product_attention, *arrays)
    assert shape.shape == (2, 512, 2, 8)
    plain = functools.partial(dot_product_attention, bias=AlibiBias.for_heads(2))
    assert "platform_index" in str(jax.make_jaxpr(dot_product_attention)(*arrays))
    assert "platform_index" not in str(jax.make_jaxpr(plain)(*arrays))
    assert "platform_index" not in str(jax.make_jaxpr(dot_product_attention)(*(x[:, :256] for x in arrays)))


@pytest.mark.parametrize(
    ("length", "mask", "settings", "expected"),
    [
        (512, CAUSAL, {}, "splash"),
        (511, CAUSAL, {}, "blockwise"),
        (100, CAUSAL, {}, "xla"),
        (2048, AttentionMask.packed(jnp.ones((2, 2048), jnp.int32)), {"logits_soft_cap": 3.0}, "splash"),
        (512, AttentionMask(query_offset=jnp.zeros(2, jnp.int32)), {}, "blockwise"),
        (512, CAUSAL, {"dropout_rate": 0.1}, "xla"),
        (512, CAUSAL, {"bias": AlibiBias.for_heads(2)}, "blockwise"),
    ],
)
def test_auto_says_what_it_picks(length, mask, settings, expected):
    arrays = qkv(length, length, 2, 1, 64, 64)
    assert select("tpu", *arrays, mask=mask, **settings) == expected


def test_axes_that_xla_partitions_are_left_to_xla():
    """It does not partition the kernel: JAX refuses such programs when it lowers them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    inside = jax.shard_map(dot_product_attention, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    arrays = [x.repeat(4, axis=0) for x in qkv(512, 512, 2, 1, 64, 64)]
    with jax.set_mesh(mesh):
        for function, found in ((dot_product_attention, False), (inside, True)):
            text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
            assert (KERNEL in text) == found
        with pytest.raises(ValueError, match=r"mesh axes that XLA partitions, data \(call it inside jax.shard_map"):
            SPLASH(*arrays)


def test_where_shard_map_follows_arrays_auto_is_what_it_is_elsewhere():
    """A kernel does not say how its output varies over the mesh."""
    mesh, spec = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")
    arrays = [x.repeat(4, axis=0) for x in qkv(512, 512, 2, 1, 8, 8)]
    inside = functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
    assert jax.eval_shape(inside(dot_product_attention), *arrays).shape == (8, 512, 2, 8)
    with pytest.raises(
        ValueError, match=r"arrays that jax.shard_map follows over the mesh \(give it check_vma=False\)"
    ):
        jax.eval_shape(inside(SPLASH), *arrays)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[plan]'"
)
@pytest.mark.parametrize("implementation", ["splash", "auto"])
def test_compiles_for_an_absent_tpu(implementation, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    one = jax.sharding.SingleDeviceSharding(devices[0])
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=one) for x in qkv(512, 512, 2, 1, 64, 64)]
    text = gradient_of(implementation).lower(*arrays).compile().as_text()
    assert text.count(f'custom_call_target="{KERNEL}"') == 3
    assert " while(" not in text


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": AttentionMask(query_positions=jnp.zeros((2, 64), jnp.int32))}, r"mask\.query_positions; use 'auto'"),
        ({"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}, r"dropout_rate=0\.1"),
        ({"bias": jnp.zeros((1, 1, 64, 64))}, "a bias"),
        (
            {"mask": AttentionMask(pattern=FixedPattern(block_size=96, stride=2))},
            r"a pattern of blocks of 96 among its own of 128 \(one must divide the other\)",
        ),
    ],
)
def test_refusals_name_the_request(settings, message):
    with pytest.raises(ValueError, match=f"'splash' cannot honour {message}"):
        SPLASH(*qkv(64, 64, 2, 1, 8, 8), **settings)


def test_widths_and_types_are_refused():
    wide = qkv(8, 8, 2, 1, 704, 128)
    with pytest.raises(ValueError, match=r"heads of 704 and values of 128 \(together up to 512 in float32\)"):
        SPLASH(*wide)
    with pytest.raises(ValueError, match=r"values of 128 \(together up to 768 in bfloat16\)"):
        SPLASH(*(x.astype(jnp.bfloat16) for x in wide))
    with pytest.raises(ValueError, match=r"inputs of float16 \(float32 and bfloat16 only\)"):
        SPLASH(*(x[..., :8].astype(jnp.float16) for x in wide))


def test_a_platform_without_the_kernel_is_named():
    with pytest.raises(NotImplementedError, match="cuda"):
        lowered(gradient_of("splash"), "cuda")


@pytest.mark.parametrize("length", [1, 127, 128, 129, 511, 512, 513, 700, 1024, 1025, 8191])
def test_blocks_cover_a_length_and_waste_little(length):
    block = block_size(length)
    assert block % 128 == 0 and block <= 512
    blocks = -(-length // block)
    assert blocks * block - length < blocks * 128
