"""Writing to a cache: where tokens go, what is padding, what does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.block import BlockCache
from transformer.layers.cache import (
    cache_lengths,
    cache_overflow,
    check_capacity,
    init_cache,
    mark_slots,
    next_slots,
    write_cache,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def numbered(*rows):
    """Keys of one head and width 1 that hold these numbers; values hold their negatives."""
    key = jnp.array(rows, jnp.float32)[:, :, None, None]
    return key, -key


def slots(array):
    """[B, P] of a cache with one head of width 1."""
    return np.asarray(array).reshape(len(array), -1).tolist()


def test_marks_go_to_the_slots_of_their_tokens():
    marked = jnp.array([[1, 1, 0], [1, 0, 1]]) > 0
    assert mark_slots(jnp.array([0, 2]), marked, 4).astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]


def test_tokens_go_behind_those_before():
    cache = write_cache(init_cache(2, 4, 1, 1), *numbered([1, 2, 3], [4, 5, 6]), jnp.array([[1, 1, 1], [1, 0, 0]]) > 0)
    assert slots(cache.key_BGPK) == [[1, 2, 3, 0], [4, 0, 0, 0]]
    assert cache.lengths_B.tolist() == [3, 1]
    cache = write_cache(cache, *numbered([7], [8]))
    assert slots(cache.key_BGPK) == [[1, 2, 3, 7], [4, 8, 0, 0]]
    assert slots(cache.value_BGPK) == [[-1, -2, -3, -7], [-4, -8, 0, 0]]
    assert cache.lengths_B.tolist() == [4, 2]
    assert not cache.overflow


def test_what_does_not_fit_is_dropped_and_flagged():
    cache = write_cache(init_cache(2, 2, 1, 1), *numbered([1], [2]))
    full = write_cache(cache, *numbered([3, 4], [5, 6]), jnp.array([[1, 1], [1, 0]]) > 0)
    assert slots(full.key_BGPK) == [[1, 3], [2, 5]]
    assert full.lengths_B.tolist() == [2, 2]
    assert full.overflow
    later = write_cache(full, *numbered([8], [9]), jnp.zeros((2, 1), bool))
    assert slots(later.key_BGPK) == slots(full.key_BGPK)
    assert later.overflow, "the flag stays"


def test_cache_keeps_its_dtype():
    cache = write_cache(init_cache(1, 2, 1, 1, jnp.bfloat16), *numbered([1]))
    assert cache.key_BGPK.dtype == jnp.bfloat16


def test_next_slots():
    lengths = jnp.array([0, 3])
    assert next_slots(lengths, 2).tolist() == [[0, 1], [3, 4]]
    assert next_slots(lengths, 2, jnp.array([[True, False], [True, True]])).tolist() == [[0, 0], [3, 4]]


@pytest.mark.parametrize("stacked", [False, True])
def test_lengths_and_overflow_of_a_model(stacked):
    full = dataclasses.replace(init_cache(2, 4, 1, 1), overflow=jnp.array(True))
    caches = (BlockCache(init_cache(2, 4, 1, 1)), BlockCache(full))
    clean = (caches[0], caches[0])
    if stacked:
        caches, clean = ((jax.tree.map(lambda *x: jnp.stack(x), *each),) for each in (caches, clean))
    assert cache_overflow(caches)
    assert not cache_overflow(clean)
    assert cache_lengths(caches).tolist() == [0, 0]


def test_capacity_is_checked_on_the_host():
    check_capacity(8, 5, 3)
    with pytest.raises(
        ValueError, match=r"prompt and new tokens, 5 \+ 4, but its capacity is 8; raise the capacity to 9"
    ):
        check_capacity(8, 5, 4)


@pytest.mark.parametrize("length", [2, 3])
def test_one_row_drops_what_does_not_fit_and_has_gradients(length):
    """A single token is written another way on a CPU."""
    cache = dataclasses.replace(init_cache(1, 3, 1, 2), lengths_B=jnp.array([length]))

    def written(key):
        return write_cache(cache, key, -key).key_BGPK

    key = jnp.array([[[[5.0, 7.0]]]])
    expected = np.zeros((1, 1, 3, 2))
    expected[0, 0, 2] = [5, 7] if length == 2 else 0
    np.testing.assert_array_equal(jax.jit(written)(key), expected)
    assert bool(write_cache(cache, key, key).overflow) == (length == 3)
    gradient = jax.grad(lambda key: jnp.sum(written(key)))(key)
    np.testing.assert_array_equal(gradient, jnp.full_like(key, float(length == 2)))
