"""Masks are what their pictures say, and a block of a mask is that part of the picture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.patterns.strided import StridedPattern

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def ids(*rows):
    return jnp.asarray(rows, jnp.int32)


PICTURES = {
    "everything": (AttentionMask(), "1111 1111 1111"),
    "causal": (AttentionMask(causal=True), "1000 1100 1110"),
    "window": (AttentionMask(window=2), "1100 1110 0111"),
    "window of one": (AttentionMask(window=1), "1000 0100 0010"),
    "causal window": (AttentionMask(causal=True, window=2), "1000 1100 0110"),
    "segments": (
        AttentionMask(query_segment_ids=ids([1, 2, 0]), key_segment_ids=ids([1, 1, 2, 0])),
        "1100 0010 0000",
    ),
    "query segments alone": (AttentionMask(query_segment_ids=ids([1, 0, 2])), "1111 0000 1111"),
    "key segments alone": (AttentionMask(key_segment_ids=ids([0, 1, 2, 0])), "0110 0110 0110"),
    "prefix": (AttentionMask(causal=True, key_prefix=ids([1, 1, 0, 0]) > 0), "1100 1100 1110"),
    "prefixes of two segments": (
        AttentionMask(
            causal=True,
            query_segment_ids=ids([1, 1, 2]),
            key_segment_ids=ids([1, 1, 2, 2]),
            key_prefix=ids([1, 0, 1, 1]) > 0,
        ),
        "1000 1100 0011",
    ),
    "prefix within a window": (
        AttentionMask(causal=True, window=2, key_prefix=ids([1, 1, 1, 0]) > 0),
        "1100 1110 0110",
    ),
    "prefix of what is not causal": (AttentionMask(window=2, key_prefix=ids([1, 0, 0, 0]) > 0), "1100 1110 0111"),
    "cached prefix": (
        AttentionMask(causal=True, key_prefix=ids([1, 0, 1, 0]) > 0, query_offset=jnp.asarray([0], jnp.int32)),
        "1010 1110 1110",
    ),
    "lengths": (AttentionMask(key_lengths=jnp.asarray([2], jnp.int32)), "1100 1100 1100"),
    "length zero": (AttentionMask(key_lengths=jnp.asarray([0], jnp.int32)), "0000 0000 0000"),
    "cached": (AttentionMask(causal=True, query_offset=jnp.asarray([1], jnp.int32)), "1100 1110 1111"),
    "cached window": (AttentionMask(causal=True, window=2, query_offset=jnp.asarray([1], jnp.int32)), "1100 0110 0011"),
    "positions": (
        AttentionMask(causal=True, query_positions=ids([2, 0, 1]), key_positions=ids([3, 2, 1, 0])),
        "0111 0001 0011",
    ),
    "query positions alone": (AttentionMask(causal=True, query_positions=ids([2, 0, 1])), "1110 1000 1100"),
    "key positions alone": (AttentionMask(window=1, key_positions=ids([2, 1, 0, 0])), "0011 0100 1000"),
    "positions outrank the offset": (
        AttentionMask(causal=True, query_positions=ids([2, 0, 1]), query_offset=jnp.asarray([9], jnp.int32)),
        "1110 1000 1100",
    ),
}


def draw(mask_BTS):
    return [" ".join("".join(str(int(cell)) for cell in row) for row in rows) for rows in np.asarray(mask_BTS)]


@pytest.mark.parametrize("name", PICTURES)
def test_mask_is_its_picture(name):
    mask, picture = PICTURES[name]
    assert draw(mask.to_bool(3, 4)[:, 0]) == [picture]


@pytest.mark.parametrize(
    ("pattern", "picture"),
    [
        (StridedPattern(block_size=1, stride=3), "1000000 1100000 1110000 1111000 0111100 0011110 1001111"),
        (StridedPattern(block_size=2, stride=2), "1000000 1100000 1110000 1111000 1111100 1111110 0011111"),
        (FixedPattern(block_size=1, stride=3), "1000000 1100000 1110000 0011000 0011100 0011110 0010011"),
        (FixedPattern(block_size=1, stride=3, summary=2), "1000000 1100000 1110000 0111000 0111100 0111110 0110111"),
    ],
    ids=repr,
)
def test_a_pattern_is_its_picture(pattern, picture):
    mask = AttentionMask(causal=True, pattern=pattern)
    assert draw(mask.to_bool(7, 7)[:, 0]) == [picture]


def test_rows_of_a_batch_have_their_own_mask():
    mask = AttentionMask(
        causal=True, query_offset=jnp.asarray([0, 1], jnp.int32), key_lengths=jnp.asarray([4, 2], jnp.int32)
    )
    assert draw(mask.to_bool(3, 4)[:, 0]) == ["1000 1100 1110", "1100 1100 1100"]


def test_packed_is_segments_and_positions_without_the_positions():
    segments = ids([1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 3])
    positions = ids([0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0])
    packed = AttentionMask.packed(segments, causal=True, window=2)
    spelled_out = dataclasses.replace(packed, query_positions=positions, key_positions=positions)
    assert draw(packed.to_bool(6, 6)[:, 0])[0] == "100000 110000 011000 000100 000110 000000"
    np.testing.assert_array_equal(packed.to_bool(6, 6), spelled_out.to_bool(6, 6))
    assert packed.compares_indices
    assert not spelled_out.compares_indices


def test_static_fields_are_structure_and_arrays_are_leaves():
    mask = AttentionMask(causal=True, window=3, key_lengths=jnp.asarray([2], jnp.int32))
    assert len(jax.tree.leaves(mask)) == 1
    lengths_out = jax.jit(lambda mask: mask)(mask)
    assert (lengths_out.causal, lengths_out.window) == (True, 3)
    assert jax.tree.structure(mask) != jax.tree.structure(dataclasses.replace(mask, causal=False))


@st.composite
def masks(draw_from, batch=2, queries=7, keys=9):
    def integers(low, high, *shape):
        count = int(np.prod(shape))
        drawn = draw_from(st.lists(st.integers(low, high), min_size=count, max_size=count))
        return jnp.asarray(np.reshape(drawn, shape), jnp.int32)

    def maybe(*args):
        return integers(*args) if draw_from(st.booleans()) else None

    prefix = maybe(0, 1, batch, keys)
    return AttentionMask(
        causal=draw_from(st.booleans()),
        window=draw_from(st.integers(0, 5)),
        query_segment_ids=maybe(0, 2, batch, queries),
        key_segment_ids=maybe(0, 2, batch, keys),
        query_positions=maybe(0, 9, batch, queries),
        key_positions=maybe(0, 9, batch, keys),
        key_prefix=None if prefix is None else prefix > 0,
        key_lengths=maybe(0, keys, batch),
        query_offset=maybe(-2, 5, batch),
    )


PROPERTY = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PROPERTY
@given(mask=masks(), start=st.tuples(st.integers(0, 4), st.integers(0, 4)), traced=st.booleans())
def test_a_block_is_that_part_of_the_whole(mask, start, traced):
    whole = mask.to_bool(7, 9)
    at = tuple(jnp.int32(index) for index in start) if traced else start
    block = mask.block(at[0], 3, at[1], 5)
    expected = whole[:, :, start[0] : start[0] + 3, start[1] : start[1] + 5]
    np.testing.assert_array_equal(block, expected)


@PROPERTY
@given(mask=masks(), start=st.integers(0, 4), size=st.integers(1, 3))
def test_key_range_leaves_out_no_visible_key(mask, start, size):
    low, high = mask.key_range(start, size, 9)
    columns = np.flatnonzero(np.asarray(mask.to_bool(7, 9))[:, 0, start : start + size].any(axis=(0, 1)))
    assert 0 <= low <= high <= 9
    assert all(low <= column < high for column in columns)


def test_key_range_is_tight_when_indices_are_compared():
    assert AttentionMask().key_range(4, 2, 20) == (0, 20)
    assert AttentionMask(causal=True).key_range(4, 2, 20) == (0, 6)
    assert AttentionMask(window=3).key_range(4, 2, 20) == (2, 8)
    assert AttentionMask(causal=True, window=3).key_range(4, 2, 20) == (2, 6)
    assert AttentionMask(causal=True, window=3).key_range(30, 2, 20) == (28, 28)
    prefix = jnp.zeros((1, 20), bool)
    assert AttentionMask(causal=True, key_prefix=prefix).key_range(4, 2, 20) == (0, 20)
    assert AttentionMask(causal=True, window=3, key_prefix=prefix).key_range(4, 2, 20) == (2, 8)
    cached = AttentionMask(causal=True, window=3, query_offset=jnp.asarray([3], jnp.int32))
    assert cached.key_range(4, 2, 20) == (0, 20)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (AttentionMask(window=-1), r"AttentionMask.window must be 0 \(any distance\) or positive, got -1"),
        (
            AttentionMask(query_segment_ids=jnp.ones((2, 4), int)),
            r"query_segment_ids must have shape \(2, 3\).*got \(2, 4\)",
        ),
        (AttentionMask(key_positions=jnp.ones((4,), int)), r"key_positions must have shape \(2, 4\).*got \(4,\)"),
        (AttentionMask(key_prefix=jnp.ones((2, 3), bool)), r"key_prefix must have shape \(2, 4\).*got \(2, 3\)"),
        (AttentionMask(key_lengths=jnp.ones((3,), int)), r"key_lengths must have shape \(2,\).*got \(3,\)"),
        (AttentionMask(query_offset=jnp.int32(1)), r"query_offset must have shape \(2,\).*got \(\)"),
    ],
)
def test_check_names_the_field_and_its_shape(mask, message):
    with pytest.raises(ValueError, match=message):
        mask.check(2, 3, 4)


def test_check_accepts_a_batch_of_one():
    AttentionMask(key_positions=jnp.ones((1, 4), int), query_offset=jnp.ones((1,), int)).check(2, 3, 4)
