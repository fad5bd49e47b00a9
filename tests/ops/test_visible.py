"""The count of a mask's visible pairs equals the count of its booleans."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.patterns.strided import StridedPattern
from transformer.ops.visible import visible_pairs

PATTERNS = (None, StridedPattern(block_size=4, stride=2), FixedPattern(block_size=3, stride=3, summary=2))


@pytest.mark.parametrize("pattern", PATTERNS, ids=["dense", "strided", "fixed"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_pairs_agree_with_the_booleans(causal, window, pattern):
    for queries, keys in itertools.product((1, 7, 23), (1, 7, 23)):
        mask = AttentionMask(causal=causal, window=window, pattern=pattern)
        assert visible_pairs(mask, queries, keys) == np.sum(mask.to_bool(queries, keys)), (queries, keys)


@pytest.mark.parametrize("pattern", PATTERNS, ids=["dense", "strided", "fixed"])
@pytest.mark.parametrize("window", [0, 5])
def test_queries_behind_a_memory_are_the_last_of_the_keys(window, pattern):
    mask = AttentionMask(causal=True, window=window, pattern=pattern, query_offset=jnp.array([16]))
    assert visible_pairs(mask, 7, 23) == np.sum(mask.to_bool(7, 23))


@pytest.mark.parametrize("pattern", PATTERNS, ids=["dense", "strided", "fixed"])
@pytest.mark.parametrize("window", [0, 5])
def test_a_prefix_is_the_mean_of_all_lengths(window, pattern):
    def mask(length):
        prefix = jnp.arange(23)[None] < length
        return AttentionMask(causal=True, window=window, pattern=pattern, key_prefix=prefix)

    mean = np.mean([np.sum(mask(length).to_bool(23, 23)) for length in range(23)])
    assert visible_pairs(mask(0), 23, 23) == pytest.approx(mean, rel=1e-12)


def test_what_data_say_hides_nothing():
    ids = jnp.array([[1, 1, 2, 0]])
    packed = AttentionMask(causal=True, query_segment_ids=ids, key_segment_ids=ids, key_lengths=jnp.array([2]))
    assert visible_pairs(packed, 4, 4) == 10
