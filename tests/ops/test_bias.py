"""ALiBi's slopes are the published ones and its bias falls with distance."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.ops.bias import BiasDescription
from transformer.ops.positions.alibi import AlibiBias, alibi_slopes
from transformer.ops.positions.t5 import T5Bias, t5_buckets

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_slopes_of_eight_heads_agree_with_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])


def test_slopes_of_six_heads_take_every_second_of_eight():
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 7, 12, 16, 20])
def test_slopes_are_distinct_and_between_zero_and_one(num_heads):
    slopes = alibi_slopes(num_heads)
    assert len(set(slopes.tolist())) == num_heads
    assert ((slopes > 0) & (slopes < 1)).all()


def test_no_heads_is_an_error():
    with pytest.raises(ValueError, match="at least one head, got num_heads=0"):
        alibi_slopes(0)


def test_block_is_slope_times_distance():
    bias = AlibiBias.for_heads(2)
    queries, keys = jnp.asarray([[3, 4]], jnp.int32), jnp.asarray([[0, 3, 5], [4, 4, 4]], jnp.int32)
    assert isinstance(bias, BiasDescription)
    block = bias.block(queries, keys)
    assert block.shape == (2, 2, 2, 3)
    distances = [[[3, 0, 2], [4, 1, 1]], [[1, 1, 1], [0, 0, 0]]]
    np.testing.assert_allclose(block[:, 0], -(2.0**-4) * np.asarray(distances))
    np.testing.assert_allclose(block[:, 1], -(2.0**-8) * np.asarray(distances))


def test_buckets_of_t5_by_hand():
    """32 buckets up to 128, as published: exact below 8 (16 in one direction), then geometric."""
    distances = jnp.array(
        [0, -1, -7, -8, -11, -12, -16, -23, -32, -64, -91, -127, -128, -5000, 1, 7, 8, 128], jnp.int32
    )
    both = t5_buckets(distances, bidirectional=True, num_buckets=32, max_distance=128)
    assert both.tolist() == [0, 1, 7, 8, 8, 9, 10, 11, 12, 14, 15, 15, 15, 15, 17, 23, 24, 31]
    one = t5_buckets(distances, bidirectional=False, num_buckets=32, max_distance=128)
    assert one.tolist() == [0, 1, 7, 8, 11, 12, 16, 18, 21, 26, 29, 31, 31, 31, 0, 0, 0, 0]


def test_t5_bias_is_a_row_of_its_table():
    table = jnp.arange(16.0).reshape(8, 2)
    bias = T5Bias(table, bidirectional=True, max_distance=5)
    assert isinstance(bias, BiasDescription)
    block = bias.block(jnp.array([[3]], jnp.int32), jnp.array([[3, 2, 4, 0]], jnp.int32))
    np.testing.assert_array_equal(block[0, :, 0], table[jnp.array([0, 1, 5, 2])].T)
