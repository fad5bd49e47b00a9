"""ALiBi's slopes are the published ones and its bias falls with distance."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.ops.bias import AlibiBias, BiasDescription, alibi_slopes

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_slopes_of_eight_heads_are_those_of_the_paper():
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
