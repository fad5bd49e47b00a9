"""Packed rows in cuDNN's attention: what is asked of JAX's private function, against what it documents, in plain JAX."""

import enum
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as private

from transformer.ops.attention import dot_product_attention
from transformer.ops.backends import cudnn, cudnn_packed
from transformer.ops.backends.cudnn_packed import Target, find_runs, find_target, traced_for
from transformer.ops.masks import AttentionMask

T = 12
PACKINGS = {
    "one document": [1] * 12,
    "as many as promised": [1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4],
    "as many, and padding": [1, 1, 2, 3, 3, 3, 3, 4, 4, 0, 0, 0],
    "fewer": [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2],
    "fewer, and padding": [1, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0, 0],
    "padding": [0] * 12,
}
BROKEN = {
    "a gap": [1, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3],
    "another order": [2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "padding first": [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "padding within": [1, 1, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2],
    "not from 1": [2] * 12,
    "too many": [1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5, 5],
    "too many, and padding": [1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0],
    "negative": [1, 1, -1, -1, 2, 2, 2, 2, 2, 2, 2, 2],
}


class MaskType(enum.Enum):
    PADDING = 1
    PADDING_CAUSAL = 3


def documented(query, key, value, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """What JAX documents: [B, M] lengths and [B, M + 1] starts, -1 where a row has fewer; what no sequence writes, in the output
    and in gradients, is whatever was there (here NaN)."""
    place_1T = jnp.arange(query.shape[1])[None]

    def sequence_of(lengths, offsets):
        starts = offsets[:, :-1, None]
        inside = (starts >= 0) & (place_1T[None] >= starts) & (place_1T[None] < starts + lengths[:, :, None])
        return jnp.where(inside.any(axis=1), inside.argmax(axis=1), -1)

    queries, keys = sequence_of(q_seqlen, q_offsets), sequence_of(kv_seqlen, kv_offsets)
    query = _written(query, queries >= 0)
    key, value = _written(key, keys >= 0), _written(value, keys >= 0)
    visible = (queries[:, :, None] == keys[:, None, :]) & (queries[:, :, None] >= 0)
    if mask_type is MaskType.PADDING_CAUSAL:
        visible &= place_1T[:, :, None] >= place_1T[:, None, :]
    out = jax.nn.dot_product_attention(query, key, value, mask=visible[:, None], scale=scale)
    return jnp.where((queries >= 0)[:, :, None, None], out, jnp.nan)


@jax.custom_vjp
def _written(x, where):
    """Itself; its gradient is NaN elsewhere."""
    del where
    return x


_written.defvjp(lambda x, where: (x, where), lambda where, g: (jnp.where(where[:, :, None, None], g, jnp.nan), None))


class Private:
    MaskType = MaskType
    dot_product_attention = staticmethod(documented)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(cudnn_packed, "private", Private)


def arrays(rows, heads=4, groups=2, width=8):
    shapes = ((rows, T, heads, width), (rows, T, groups, width), (rows, T, groups, width), (rows, T, heads, width))
    return tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("groups_known", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_agree_with_the_reference(emulated, monkeypatch, causal, groups, groups_known):
    monkeypatch.setattr(cudnn_packed, "_GROUPS", groups_known)
    ids = jnp.asarray(list(PACKINGS.values()), jnp.int32)
    query, key, value, weights = arrays(len(ids), groups=groups)
    mask = AttentionMask.packed(ids, causal=causal, max_segments=4)
    asked = []

    def noted(query, key, value, **settings):
        asked.append((key.shape[2], value.shape[2]))
        return documented(query, key, value, **settings)

    monkeypatch.setattr(Private, "dot_product_attention", staticmethod(noted))

    def loss(attend, *operands):
        out = attend(*operands, mask=mask, scale=0.3)
        return jnp.sum(out * weights), out

    grad = functools.partial(jax.value_and_grad, argnums=(1, 2, 3), has_aux=True)
    (_, out), gradients = jax.jit(functools.partial(grad(loss), cudnn.cudnn_attention))(query, key, value)
    reference = functools.partial(dot_product_attention, implementation="xla")
    (_, expected), wanted = grad(loss)(reference, query, key, value)
    assert set(asked) == {(groups, groups) if groups_known else (4, 4)}
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, atol=1e-5)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_nan_in_its_row_alone(emulated, name):
    ids = jnp.asarray([PACKINGS["fewer"], BROKEN[name], PACKINGS["as many, and padding"]], jnp.int32)
    query, key, value, _ = arrays(3)
    mask = AttentionMask.packed(ids, causal=True, max_segments=4)
    out = jax.jit(functools.partial(cudnn.cudnn_attention, mask=mask, scale=0.3))(query, key, value)
    assert np.isnan(out).all(axis=(1, 2, 3)).tolist() == [False, True, False]
    assert np.isfinite(out[jnp.array([0, 2])]).all()


def test_a_row_alone_may_break_it_too(emulated):
    query, key, value, _ = arrays(1)
    mask = AttentionMask.packed(jnp.asarray([BROKEN["a gap"]]), causal=True, max_segments=4)
    assert np.isnan(cudnn.cudnn_attention(query, key, value, mask=mask, scale=0.3)).all()


def test_ids_of_keys_that_differ_from_queries_give_nan(emulated):
    queries, keys = jnp.asarray([PACKINGS["fewer"]]), jnp.asarray([PACKINGS["one document"]])
    mask = AttentionMask(query_segment_ids=queries, key_segment_ids=keys, max_segments=4)
    assert np.isnan(cudnn.cudnn_attention(*arrays(1)[:3], mask=mask, scale=0.3)).all()


@pytest.mark.parametrize("row", [*PACKINGS.values(), *BROKEN.values()])
def test_every_position_is_of_a_sequence(row):
    runs = find_runs(jnp.asarray([row], jnp.int32), 4)
    lengths, starts = np.asarray(runs.lengths_BM)[0], np.asarray(runs.starts_BM)[0]
    assert lengths.shape == starts.shape == (5,)
    there = lengths >= 0
    assert (there == (starts >= 0)).all()
    # No sequence reaches beyond its row, whatever the ids.
    assert (starts[there] + lengths[there] <= T).all()
    assert bool(runs.kept_B[0]) == (row in PACKINGS.values())
    if runs.kept_B[0]:
        assert starts[there].tolist() == [0, *np.cumsum(lengths[there])[:-1]]
        assert lengths[there].sum() == T


@pytest.mark.parametrize("causal", [True, False])
def test_one_document_is_lengths(monkeypatch, causal):
    """Of either side, cross-attention too; by JAX's own definition, which runs anywhere."""
    define = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, **s: define(*x, **{**s, "implementation": "xla"}))
    targets = jnp.asarray([[1] * 7 + [0] * 5, [1] * 12, [0] * 12, [1] * 12, [1] * 3 + [0] * 9])
    sources = jnp.asarray([[1] * 3 + [0] * 9, [1] * 12, [1] * 12, [0] * 12, [1] * 3 + [0] * 9])
    sources = targets if causal else sources[:, :10]
    query, key, value, weights = arrays(5)
    key, value = key[:, : sources.shape[1]], value[:, : sources.shape[1]]
    attend = functools.partial(cudnn.cudnn_attention, scale=0.3)
    reference = functools.partial(dot_product_attention, implementation="xla", scale=0.3)
    for ids in ((targets, sources), (targets, None), (None, sources)):
        mask = AttentionMask(causal=causal, query_segment_ids=ids[0], key_segment_ids=ids[1], max_segments=1)

        def graded(attend, query, key, value, mask=mask):
            return jax.vjp(lambda *x: attend(*x, mask=mask), query, key, value)

        for (out, back), (want, want_back) in [
            (graded(attend, query, key, value), graded(reference, query, key, value))
        ]:
            np.testing.assert_allclose(out, want, atol=1e-5)
            for gradient, wanted in zip(back(weights), want_back(weights), strict=True):
                np.testing.assert_allclose(gradient, wanted, atol=1e-5)
    for wrong in (jnp.where(targets == 1, 2, 0), targets[:, ::-1]):
        mask = AttentionMask(causal=causal, query_segment_ids=wrong, key_segment_ids=sources, max_segments=1)
        out = np.asarray(jax.jit(functools.partial(attend, mask=mask))(query, key, value))
        broken = np.asarray((wrong > 1).any(1) | (jnp.diff(wrong) > 0).any(1))
        assert np.isnan(out).all(axis=(1, 2, 3)).tolist() == broken.tolist()
        assert broken.any() and np.isfinite(out[~broken]).all()


def test_what_is_relied_on_of_jax():
    """Its private function: parameters, kinds of masks, how offsets of rows are joined, and who says what a GPU can do."""
    assert cudnn_packed.unavailable() == ""
    assert inspect.signature(private.dot_product_attention).parameters["qkv_layout"].default == "BTNH"
    assert "q_offsets" in private.dot_product_attention.__doc__ and "-1" in private.dot_product_attention.__doc__
    runs = find_runs(jnp.asarray([PACKINGS["fewer, and padding"], PACKINGS["one document"]]), 4)
    offsets = jnp.pad(runs.starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    query, key = jnp.zeros((2, T, 4, 8)), jnp.zeros((2, T, 4, 8))
    lengths, _, starts, of_keys = private._fix_seqlen_offsets(
        runs.lengths_BM, runs.lengths_BM, offsets, offsets, query, key
    )
    assert lengths.ravel().tolist() == [3, 2, 7, 12] + [0] * 6
    assert starts.ravel().tolist() == of_keys.ravel().tolist() == [x * 32 for x in [0, 3, 5, 12] + [24] * 8]
    assert private.check_compute_capability("9.0") is False  # here


def test_offsets_of_fewer_key_heads_are_repeated_only_where_jax_errs():
    ids = jnp.asarray([PACKINGS["fewer"]])
    runs = find_runs(ids, 4)
    offsets = jnp.pad(runs.starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    query, key = jnp.zeros((1, T, 4, 8)), jnp.zeros((1, T, 2, 8))
    of_keys = private._fix_seqlen_offsets(runs.lengths_BM, runs.lengths_BM, offsets, offsets, query, key)[3]
    assert (of_keys.ravel()[:2].tolist() == [0, 5 * 16]) == cudnn_packed._GROUPS


def test_another_jax_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(cudnn_packed, "private", None)
    assert "its private function has changed" in cudnn_packed.unavailable.__wrapped__()


def test_only_an_absent_gpu_is_answered_for(monkeypatch):
    before = private.check_compute_capability
    assert find_target() == Target((), present=False)
    with traced_for(Target((9, 0), present=True)):
        assert private.check_compute_capability is before
    with traced_for(Target((9, 0), present=False)):
        assert private.check_compute_capability("9.0")
        assert not private.check_compute_capability("10.0")
    assert private.check_compute_capability is before


def test_the_mesh_that_is_set_says_which_gpu(monkeypatch):
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"
        platform = "gpu"
        compute_capability = "8.6"

    class Mesh:
        abstract_device = Device

    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: Mesh)
    assert find_target() == Target((9, 0), present=False)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    assert find_target() == Target((8, 6), present=True)
    Mesh.abstract_device = None
    assert find_target() == Target((8, 6), present=True)
    Mesh.abstract_device = type("Other", (), {"device_kind": "TPU v5 lite"})
    assert find_target() == Target((), present=False)
