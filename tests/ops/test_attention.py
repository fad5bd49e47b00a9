"""The contract of attention: every backend equals a loop over heads, queries and keys, in values and gradients."""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from transformer.layers import sharded_attention
from transformer.model_kinds import AttentionCall
from transformer.ops import attention, ring
from transformer.ops.attention import dot_product_attention
from transformer.ops.backends import blockwise, xla
from transformer.ops.backends.auto import AutoBackend
from transformer.ops.backends.xla import attention_weights
from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.patterns.strided import StridedPattern
from transformer.ops.positions.alibi import AlibiBias
from transformer.ops.positions.t5 import T5Bias
from transformer.types import UserError

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Block-wise with blocks that do not divide the lengths, so that a short test meets whole, cut and skipped blocks.
BLOCKS = {
    "unrolled": blockwise.Blocks(6, 0, unrolled=True),
    "looped": blockwise.Blocks(4, 5, unrolled=False),
}
BACKENDS = ("xla", *BLOCKS)  # and splash, interpreted, where a test says so: it takes seconds to compile

B, T, S, H, G, K = 2, 11, 13, 4, 2, 8


@pytest.fixture(params=BACKENDS)
def attend(request, monkeypatch):
    if request.param in BLOCKS:
        monkeypatch.setattr(blockwise, "choose_blocks", lambda *_: BLOCKS[request.param])
    implementation = "blockwise" if request.param in BLOCKS else "xla"
    return functools.partial(dot_product_attention, implementation=implementation)


def normal(seed, *shape, dtype=jnp.float32):
    # NumPy's generator: JAX's would be compiled for every shape.
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(queries=T, keys=S, heads=H, groups=G, dtype=jnp.float32):
    return (
        normal(0, B, queries, heads, K, dtype=dtype),
        normal(1, B, keys, groups, K, dtype=dtype),
        normal(2, B, keys, groups, K, dtype=dtype),
    )


def integers(rows):
    return jnp.asarray(rows, jnp.int32)


SEGMENTS_T = integers([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [0, 0, 3, 3, 3, 3, 3, 4, 5, 5, 5]])
SEGMENTS_S = integers([[1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0], [3, 3, 3, 3, 3, 3, 3, 5, 5, 5, 5, 5, 5]])
PREFIX_S = integers([[1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]]) > 0
POSITIONS_S = integers([np.arange(13)[::-1], np.arange(13) * 2])

CASES = {
    "causal": {"mask": AttentionMask(causal=True)},
    "window": {"mask": AttentionMask(window=3)},
    "packed": {
        "mask": AttentionMask(causal=True, window=4, query_segment_ids=SEGMENTS_T, key_segment_ids=SEGMENTS_S),
        "logits_soft_cap": 2.0,
    },
    "key padding": {"mask": AttentionMask(key_segment_ids=SEGMENTS_S), "scale": 0.5},
    "query padding": {"mask": AttentionMask(query_segment_ids=SEGMENTS_T)},
    "lengths": {"mask": AttentionMask(key_lengths=integers([0, 7]))},
    "offset": {"mask": AttentionMask(causal=True, window=6, query_offset=integers([-2, 2]))},
    "positions": {
        "mask": AttentionMask(causal=True, query_positions=integers([np.arange(11) * 2]), key_positions=POSITIONS_S),
    },
    "prefix": {"mask": AttentionMask(causal=True, key_prefix=integers([[1] * 9 + [0] * 4, [1] * 2 + [0] * 11]) > 0)},
    "packed prefixes": {
        "mask": AttentionMask(
            causal=True, query_segment_ids=SEGMENTS_T, key_segment_ids=SEGMENTS_S, key_prefix=PREFIX_S, window=6
        ),
        "bias": AlibiBias.for_heads(H),
    },
    "alibi": {"mask": AttentionMask(causal=True), "bias": AlibiBias.for_heads(H)},
    "alibi at positions": {
        "mask": AttentionMask(window=7, key_positions=POSITIONS_S, query_offset=integers([1, 2])),
        "bias": AlibiBias.for_heads(H),
        "logits_soft_cap": 3.0,
    },
    "strided": {"mask": AttentionMask(causal=True, pattern=StridedPattern(block_size=2, stride=2))},
    "strided, both ways": {"mask": AttentionMask(pattern=StridedPattern(block_size=1, stride=4))},
    "fixed": {"mask": AttentionMask(causal=True, pattern=FixedPattern(block_size=1, stride=4, summary=2))},
    "fixed at positions": {
        "mask": AttentionMask(
            pattern=FixedPattern(block_size=2, stride=3),
            window=9,
            key_positions=POSITIONS_S,
            query_offset=integers([1, 2]),
        ),
    },
    "t5": {"mask": AttentionMask(causal=True), "bias": T5Bias(normal(4, 8, H), bidirectional=False, max_distance=9)},
    "t5 at positions": {
        "mask": AttentionMask(window=9, key_positions=POSITIONS_S, query_offset=integers([1, 2])),
        "bias": T5Bias(normal(5, 16, H), bidirectional=True, max_distance=12),
    },
    "dense bias": {"bias": normal(3, B, H, T, S), "logits_soft_cap": 1.5},
    "broadcast bias": {"mask": AttentionMask(window=5), "bias": normal(3, 1, 1, T, S)},
}


def places(mask, row):
    """What is compared for each query and each key of a row, as lists of Python integers."""
    offset = 0 if mask.query_offset is None else mask.query_offset[row]
    queries, keys = mask.query_positions, mask.key_positions
    queries = np.arange(T) + offset if queries is None else queries[row % len(queries)]
    keys = np.arange(S) if keys is None else keys[row % len(keys)]
    return queries.tolist(), keys.tolist()


def sees(mask, row, query, key, query_place, key_place):
    """The mask's documentation, one pair at a time."""
    distance = query_place - key_place
    query_segment = None if mask.query_segment_ids is None else mask.query_segment_ids[row, query]
    key_segment = None if mask.key_segment_ids is None else mask.key_segment_ids[row, key]
    if query_segment == 0 or key_segment == 0:
        return False
    if None not in (query_segment, key_segment) and query_segment != key_segment:
        return False
    in_prefix = mask.key_prefix is not None and mask.key_prefix[row, key]
    if (mask.causal and distance < 0 and not in_prefix) or (mask.window and abs(distance) >= mask.window):
        return False
    if mask.pattern is not None:
        size, stride, summary = mask.pattern.block_size, mask.pattern.stride, getattr(mask.pattern, "summary", 1)
        i, j = query_place // size, key_place // size
        if mask.pattern.kind == "strided" and not (abs(i - j) < stride or (i - j) % stride == 0):
            return False
        if mask.pattern.kind == "fixed" and not (i // stride == j // stride or j % stride in range(stride)[-summary:]):
            return False
    return mask.key_lengths is None or key < mask.key_lengths[row]


def bias_at(bias, row, head, query, key, distance):
    if bias is None:
        return 0.0
    if isinstance(bias, AlibiBias):
        return -bias.slopes[head] * abs(distance)
    if isinstance(bias, T5Bias):
        buckets, ahead = len(bias.table), distance < 0
        if bias.bidirectional:
            buckets //= 2
        away = abs(distance) if bias.bidirectional else max(distance, 0)
        exact = buckets // 2
        if away >= exact:
            growth = math.log(away / exact) / math.log(bias.max_distance / exact)
            away = min(exact + int(growth * (buckets - exact)), buckets - 1)
        return bias.table[away + (buckets if bias.bidirectional and ahead else 0), head]
    return bias[row % bias.shape[0], head % bias.shape[1], query, key]


def one_head_at_a_time(query, key, value, mask=None, bias=None, scale=None, logits_soft_cap=0.0):
    """Softmax attention in Python floats."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    mask, bias = jax.tree.map(np.asarray, (AttentionMask() if mask is None else mask, bias))
    out = np.zeros(query.shape)
    heads_per_group = query.shape[2] // key.shape[2]
    for row in range(query.shape[0]):
        query_positions, key_positions = places(mask, row)
        for head in range(query.shape[2]):
            group = head // heads_per_group
            for t in range(query.shape[1]):
                terms = []
                for s in range(key.shape[1]):
                    distance = query_positions[t] - key_positions[s]
                    if sees(mask, row, t, s, query_positions[t], key_positions[s]):
                        logit = query[row, t, head] @ key[row, s, group] * (scale or 1 / math.sqrt(K))
                        if logits_soft_cap:
                            logit = logits_soft_cap * math.tanh(logit / logits_soft_cap)
                        terms.append((math.exp(logit + bias_at(bias, row, head, t, s, distance)), value[row, s, group]))
                total = sum(weight for weight, _ in terms)
                for weight, value_row in terms:
                    out[row, t, head] += weight / total * value_row
    return out


def values_and_gradients(attend, query, key, value, *, bias=None, **settings):
    out_gradient = normal(9, *query.shape)

    def loss(query, key, value, bias):
        out = attend(query, key, value, bias=bias, **settings)
        return jnp.sum(out * out_gradient), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(query, key, value, bias)
    return out, gradients


REFERENCE = functools.partial(dot_product_attention, implementation="xla")


@functools.cache
def reference_gradients(case):
    return values_and_gradients(REFERENCE, *qkv(), **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_reference_is_a_loop_over_heads(case):
    out, _ = reference_gradients(case)
    np.testing.assert_allclose(out, one_head_at_a_time(*qkv(), **CASES[case]), atol=2e-6)


# What splash attention refuses, by the name it gives.
REFUSED = {
    "offset": "mask.query_offset",
    "positions": "mask.query_positions",
    "prefix": "mask.key_prefix",
    "packed prefixes": "a bias",
    "alibi": "a bias",
    "alibi at positions": "a bias",
    "fixed at positions": "mask.key_positions",
    "t5": "a bias",
    "t5 at positions": "a bias",
    "dense bias": "a bias",
    "broadcast bias": "a bias",
}


@pytest.mark.parametrize("backend", [*BLOCKS, "splash"])
@pytest.mark.parametrize("case", CASES)
def test_backends_equal_the_reference_in_values_and_gradients(backend, case, monkeypatch):
    monkeypatch.setattr(blockwise, "choose_blocks", lambda *_: BLOCKS[backend])
    implementation = "splash" if backend == "splash" else "blockwise"
    attend = functools.partial(dot_product_attention, implementation=implementation)
    if backend == "splash" and case in REFUSED:
        with pytest.raises(ValueError, match=f"'splash' cannot honour {REFUSED[case]}; use 'auto'"):
            values_and_gradients(attend, *qkv(), **CASES[case])
        return
    out, gradients = values_and_gradients(attend, *qkv(), **CASES[case])
    expected_out, expected_gradients = reference_gradients(case)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    for gradient, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert gradient.shape == expected.shape
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=5e-6)


def test_values_may_be_narrower_than_keys(attend):
    query, key, value = qkv()

    def narrow(query, key, value, **settings):
        out = attend(query, key, value[..., :5], **settings)
        assert out.shape == (B, T, H, 5)
        return jnp.pad(out, [(0, 0)] * 3 + [(0, K - 5)])

    def cut(query, key, value, **settings):
        return REFERENCE(query, key, value, **settings) * (jnp.arange(K) < 5).astype(jnp.float32)[None, None, None]

    found, expected = (values_and_gradients(f, query, key, value, **CASES["packed"]) for f in (narrow, cut))
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=5e-6)


def test_gradients_of_the_reference_are_finite_differences():
    query, key, value = qkv(queries=3, keys=3, heads=2, groups=1)
    mask = AttentionMask(causal=True, key_lengths=integers([3, 0]))

    def out(query, key, value, slopes):
        bias = AlibiBias(slopes)
        return dot_product_attention(query, key, value, mask=mask, bias=bias, logits_soft_cap=2.0, implementation="xla")

    slopes = jnp.asarray([0.5, 0.25])
    check_grads(jax.jit(out), (query, key, value, slopes), order=1, modes=("rev",), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("bias", [None, "minus infinity"])
def test_rows_without_keys_are_zeros_with_zero_gradients(attend, bias):
    query, key, value = qkv(queries=11, keys=11)
    if bias is None:
        arguments = {"mask": AttentionMask.packed(SEGMENTS_T, causal=True)}
        empty = np.asarray(SEGMENTS_T) == 0
    else:
        arguments = {"bias": jnp.zeros((1, 1, 11, 11)).at[:, :, 4].set(-jnp.inf)}
        empty = np.arange(11)[None].repeat(2, axis=0) == 4
    with jax.debug_nans(True):
        out, (query_gradient, key_gradient, value_gradient, _) = values_and_gradients(
            attend, query, key, value, **arguments
        )
    assert empty.any()
    assert (np.asarray(out)[empty] == 0).all()
    assert (np.asarray(query_gradient)[empty] == 0).all()
    assert (np.asarray(out)[~empty] != 0).all()
    if bias is None:
        assert (np.asarray(key_gradient)[empty] == 0).all()
        assert (np.asarray(value_gradient)[empty] == 0).all()


@dataclasses.dataclass(frozen=True)
class Hidden:
    """A described bias that hides every key from every third query, as other libraries do: by a finite number."""

    amount: float

    def block(self, query_positions, key_positions):
        hidden = (query_positions % 3 == 0)[:, None, :, None] & (key_positions >= 0)[:, None, None, :]
        return jnp.where(hidden, jnp.float32(self.amount), 0)


jax.tree_util.register_static(Hidden)
LOWEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize("amount", [-1e9, LOWEST])
@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("backend", BLOCKS)
def test_rows_hidden_by_a_finite_bias_agree_with_the_reference(backend, described, amount, monkeypatch):
    """Such a row is the mean of its values; the normaliser of its softmax has no digits left beside -1e9."""
    monkeypatch.setattr(blockwise, "choose_blocks", lambda *_: BLOCKS[backend])
    bias = Hidden(amount) if described else Hidden(amount).block(jnp.arange(T)[None], jnp.arange(S)[None])
    blocks = functools.partial(dot_product_attention, implementation="blockwise")
    found, expected = (values_and_gradients(f, *qkv(), bias=bias) for f in (blocks, REFERENCE))
    np.testing.assert_allclose(expected[0][:, 0, 0], qkv()[2].mean(axis=1)[:, 0], atol=1e-6)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=5e-6)


def entries_that_take_a_bias():
    """Every function of the modules of attention with queries and an argument of that name."""
    for module in (attention, blockwise, xla, ring, sharded_attention):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            takes = inspect.signature(function).parameters
            if function.__module__ == module.__name__ and {"query_BTHK", "bias"} <= set(takes) and name[0] != "_":
                yield pytest.param(function, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("dtype", [bool, np.int32])
@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("entry", list(entries_that_take_a_bias()))
def test_a_bias_that_is_a_mask_is_refused_by_name(entry, described, dtype):
    query, key, value = qkv(queries=S, heads=G)
    bias = AlibiBias(jnp.ones(G, dtype)) if described else jnp.ones((1, 1, S, S), dtype)
    settings = {"mask": AttentionMask(), "bias": bias, "scale": 1.0, "axis_name": "context", "soft_cap": 0.0}
    wanted = inspect.signature(entry).parameters
    operands = (query, key, value) if "value_BSGK" in wanted else (query, key)
    with pytest.raises(UserError, match=rf"bias .* must be floating-point, got {np.dtype(dtype).name}; .* use `mask`"):
        entry(*operands, **{name: value for name, value in settings.items() if name in wanted})


def test_a_described_bias_gives_floating_point_numbers():
    class Sees:
        def block(self, query_positions, key_positions):
            return query_positions[:, None, :, None] >= key_positions[:, None, None, :]

    jax.tree_util.register_static(Sees)
    for implementation in ("xla", "blockwise"):
        with pytest.raises(UserError, match="must be floating-point, got bool"):
            dot_product_attention(*qkv(), bias=Sees(), implementation=implementation)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_large_logits_do_not_overflow(attend, dtype):
    """They reach some millions, and float16 ends at 65,504."""

    def in_float32(*arrays, **settings):
        return attend(*arrays, **settings).astype(jnp.float32)

    query, key, value = qkv(dtype=dtype)
    out, gradients = values_and_gradients(in_float32, query * 1e3, key * 1e3, value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype_and_follows_float32(attend, dtype):
    def in_float32(*arrays, **settings):
        out = attend(*arrays, **settings)
        assert out.dtype == dtype
        return out.astype(jnp.float32)

    out, gradients = values_and_gradients(in_float32, *qkv(dtype=dtype), **CASES["packed"])
    expected_out, expected_gradients = reference_gradients("packed")
    np.testing.assert_allclose(out, expected_out, atol=0.05)
    for gradient, expected in zip(gradients[:3], expected_gradients[:3], strict=True):
        assert gradient.dtype == dtype
        np.testing.assert_allclose(np.asarray(gradient, np.float32), expected, atol=0.1)


def test_compiled_is_what_runs_uncompiled(attend):
    run = functools.partial(attend, *qkv(), mask=AttentionMask(causal=True, window=4))
    with jax.disable_jit():
        expected = run()
    np.testing.assert_allclose(jax.jit(run)(), expected, atol=2e-6)


def test_mapped_scanned_and_rematerialised_gradients_are_the_same(attend):
    mask = AttentionMask(causal=True, window=4, key_lengths=integers([9, 13]))

    def loss(arrays, mask):
        return jnp.sum(attend(*arrays, mask=mask) ** 2)

    def row_gradient(row, loss=loss):
        gradients = jax.grad(loss)(*jax.tree.map(lambda leaf: leaf[None], row))
        return jax.tree.map(lambda leaf: leaf[0], gradients)

    @jax.jit
    def each_way(arrays, mask):
        rematerialised = functools.partial(row_gradient, loss=jax.checkpoint(loss))
        return {
            "plain": jax.grad(loss)(arrays, mask),
            "mapped and rematerialised": jax.vmap(rematerialised)((arrays, mask)),
            "scanned": jax.lax.map(row_gradient, (arrays, mask)),
        }

    gradients = each_way(qkv(), mask)
    for name, got in gradients.items():
        for leaf, expected in zip(got, gradients["plain"], strict=True):
            np.testing.assert_allclose(leaf, expected, atol=1e-5, err_msg=name)


def test_new_masks_of_the_same_structure_do_not_compile_again(attend):
    compiled = jax.jit(lambda arrays, mask: attend(*arrays, mask=mask))
    for length in (3, 9):
        compiled(qkv(), AttentionMask(causal=True, key_lengths=integers([length, 13]), query_offset=integers([0, 1])))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_chunk_behind_cached_keys_is_those_rows_of_the_whole(attend, chunk):
    query, key, value = qkv(queries=10, keys=10)
    mask = AttentionMask(causal=True, window=4)
    whole = np.asarray(jax.jit(REFERENCE)(query, key, value, mask=mask))

    @jax.jit
    def rows_from(offset):
        cached = dataclasses.replace(mask, query_offset=offset)
        rows = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, chunk))(query, offset)
        return attend(rows, key, value, mask=cached)

    for offset in ([0, 1], [2, 7], [6, 4]):
        expected = [row[start : start + chunk] for row, start in zip(whole, offset, strict=True)]
        np.testing.assert_allclose(rows_from(integers(offset)), expected, atol=2e-6)


@pytest.mark.parametrize("width", [4, 16, 64])
def test_scale_keeps_logits_at_unit_variance_for_any_width(attend, width):
    """Vaswani et al. 2017, section 3.2.1, note 4: a sum of `width` products of unit variance has variance `width`."""
    query, key = normal(0, 200, 16, 1, width), normal(1, 200, width, 1, width)
    identity = jnp.broadcast_to(jnp.eye(width)[None, :, None], key.shape)  # as values, it gives the weights
    logits = np.log(attend(query, key, identity))[:, :, 0]
    np.testing.assert_allclose(logits.var(axis=-1, ddof=1).mean(), 1, rtol=0.1)


def test_weights_sum_to_one_or_to_zero():
    query, key, _ = qkv()
    mask = AttentionMask(key_lengths=integers([0, 7]))
    weights = jax.jit(functools.partial(attention_weights, mask=mask, scale=1.0))(query, key)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(axis=-1)[0], np.zeros((H, T)))
    np.testing.assert_allclose(weights.sum(axis=-1)[1], np.ones((H, T)), rtol=1e-6)
    assert (weights[1, :, :, 7:] == 0).all()


def test_weights_of_half_precision_inputs_are_computed_in_float32():
    query, key, _ = qkv(dtype=jnp.bfloat16)
    weigh = jax.jit(functools.partial(attention_weights, scale=1.0))
    weights = weigh(query, key)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, weigh(query.astype(jnp.float32), key.astype(jnp.float32)), atol=1e-5)


def test_dropout_drops_weights_at_its_rate_and_keeps_their_mean():
    query, key = jnp.zeros((1, 64, 8, 1)), jnp.zeros((1, 64, 8, 1))
    attend = jax.jit(functools.partial(dot_product_attention, dropout_rate=0.25))
    kept = attend(query, key, jnp.ones_like(key), dropout_key=jax.random.key(0))
    # With equal weights and values of one, a row is its share of kept weights, divided by 0.75.
    counts = np.asarray(kept) * 0.75 * 64
    np.testing.assert_allclose(counts, counts.round(), atol=1e-3)
    assert abs(counts.mean() / 64 - 0.75) < 0.01
    assert 2 < counts.std() < 5


def test_dropout_follows_its_key():
    attend = jax.jit(functools.partial(dot_product_attention, dropout_rate=0.5))
    first, again, other = (np.asarray(attend(*qkv(), dropout_key=jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_auto_takes_blocks_when_the_square_is_large_and_nothing_needs_it():
    def select(queries, keys, **settings):
        query, key = (jax.ShapeDtypeStruct((1, length, 2, K), jnp.float32) for length in (queries, keys))
        call = AttentionCall(query, key, key, AttentionMask(causal=True), **settings)
        return AutoBackend().on("cpu", call).kind

    assert select(4096, 4096) == "blockwise"
    assert select(64, 64) == "xla"
    assert select(1, 4096) == "xla"
    assert select(4096, 4096, bias=AlibiBias.for_heads(2)) == "blockwise"
    assert select(4096, 4096, dropout_rate=0.1) == "xla"
    assert select(512, 512, bias=jnp.zeros((1, 1, 512, 512))) == "xla"


def test_auto_equals_the_reference_where_it_takes_blocks():
    query, key, value = normal(0, 1, 700, 1, 4), normal(1, 1, 700, 1, 4), normal(2, 1, 700, 1, 4)
    mask = AttentionMask(causal=True)
    auto = functools.partial(dot_product_attention, mask=mask)
    assert "custom_vjp" in str(jax.make_jaxpr(auto)(query, key, value))
    expected = jax.jit(functools.partial(REFERENCE, mask=mask))(query, key, value)
    np.testing.assert_allclose(jax.jit(auto)(query, key, value), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"implementation": "flash"}, "must be one of auto, xla, blockwise, splash, cudnn.*, got 'flash'"),
        (
            {"implementation": "blockwise", "dropout_rate": 0.1, "dropout_key": 0},
            r"'blockwise' cannot honour dropout_rate=0\.1; use 'auto'",
        ),
        ({"dropout_rate": 0.1}, r"dropout_rate=0\.1 needs a dropout_key"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1\.0"),
        ({"mask": AttentionMask(key_lengths=jnp.ones((3,), int))}, r"key_lengths must have shape \(2,\)"),
        (
            {"bias": jnp.ones((1, 3, T, S))},
            rf"bias must have shape \[2 or 1, 4 or 1, {T}, {S}\], got \(1, 3, {T}, {S}\)",
        ),
    ],
)
def test_refusals_name_the_value_and_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        # Past the annotations, as in a run without the tests' type checks.
        inspect.unwrap(dot_product_attention)(*qkv(), **arguments)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="multiple of key/value heads, got 3 and 2"):
        dot_product_attention(*qkv(heads=3))


def test_dtypes_must_agree():
    query, key, value = qkv()
    with pytest.raises(ValueError, match="one dtype, got bfloat16, float32 and float32; cast them first"):
        dot_product_attention(query.astype(jnp.bfloat16), key, value)
