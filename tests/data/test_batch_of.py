"""What `Batch.of` and `PairBatch.of` fill in: nothing that contradicts what is given."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.types import Batch, PairBatch

IDS = [[1, 1, 2, 2, 2, 0], [0, 0, 3, 3, 1, 1]]
POSITIONS = [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1]]


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_padding_has_no_weight_and_positions_restart(array):
    tokens = array(np.ones((2, 6), np.int32))
    batch = Batch.of(tokens, tokens, segment_ids=array(IDS))
    np.testing.assert_array_equal(batch.positions, POSITIONS)
    np.testing.assert_array_equal(batch.weights, np.array(IDS) != 0)
    assert batch.positions.dtype == np.int32 and batch.weights.dtype == np.float32
    pairs = PairBatch.of(tokens, tokens, tokens, segment_ids=array(IDS))
    np.testing.assert_array_equal(pairs.weights, np.array(IDS) != 0)
    assert pairs.source_segment_ids is None


def test_what_is_given_stays():
    tokens = np.ones((2, 6), np.int32)
    batch = Batch.of(tokens, tokens, segment_ids=np.array(IDS), weights=tokens * 2.0, positions=tokens)
    np.testing.assert_array_equal(batch.weights, tokens * 2)
    np.testing.assert_array_equal(batch.positions, tokens)
    whole = Batch.of(tokens, tokens)
    assert whole.segment_ids is None
    np.testing.assert_array_equal(whole.positions, [np.arange(6)] * 2)
    np.testing.assert_array_equal(whole.weights, tokens)
