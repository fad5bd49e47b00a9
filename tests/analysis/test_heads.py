"""Statistics of heads, on weights made by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.analysis.heads import divergence, entropy, head_statistics, most_concentrated_head, share_by_distance


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([0.5, 0.5, 0], [0.5, 0.5, 0], 0), ([1, 0, 0], [0, 0.5, 0.5], 1), ([1, 0, 0], [0.5, 0.5, 0], 0.31128)],
    ids=["equal", "disjoint", "overlapping"],
)
def test_divergence_by_hand(first, second, expected):
    weights = jnp.array([first, second, first])[None, :, None]
    np.testing.assert_allclose(divergence(weights), [expected, 0, expected], atol=1e-5)


def test_entropy_by_hand():
    np.testing.assert_allclose(entropy(jnp.array([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])), [0, 2, 1])


def test_share_by_distance_by_hand():
    itself, before = np.eye(4)[2:], np.eye(4)[1:3]  # of the last two of four tokens
    shares = share_by_distance(np.stack([itself, before, (itself + before) / 2]))
    np.testing.assert_allclose(shares, [[1, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0]])


ITSELF, BEFORE, FIRST = np.eye(4), np.eye(4)[[0, 0, 1, 2]], np.eye(4)[[0, 0, 0, 0]]


def test_statistics_by_hand():
    found = head_statistics(np.stack([ITSELF, BEFORE, FIRST, (ITSELF + BEFORE) / 2]))
    np.testing.assert_allclose(found.entropy, [0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(found.first, [0, 1 / 3, 1, 1 / 6], atol=1e-6)
    np.testing.assert_allclose(found.distance, [0, 1, 2, 0.5], atol=1e-6)
    np.testing.assert_allclose(found.previous, [0, 1, 1 / 3, 0.5], atol=1e-6)
    # Of heads that share no key 1, of one key in two 0.31128; the second query of BEFORE and FIRST is the same.
    np.testing.assert_allclose(found.divergence[0], (1 + 1 + 0.31128) / 3, atol=1e-4)
    np.testing.assert_allclose(found.divergence[1], (1 + 2 / 3 + 0.31128) / 3, atol=1e-4)


def test_of_two_texts_there_is_no_distance():
    found = head_statistics(np.full((1, 3, 5), 0.2), one_text=False)
    assert found.distance is None and found.previous is None
    np.testing.assert_allclose(found.entropy, np.log2(5), atol=1e-5)
    np.testing.assert_allclose(found.divergence, [0])


def test_keys_of_a_memory_come_before_the_queries():
    """Two queries over two remembered keys and themselves, each looking at the token before it."""
    found = head_statistics(np.eye(4)[None, [1, 2]])
    np.testing.assert_allclose([found.distance[0], found.previous[0]], [1, 1])


def test_a_single_token():
    found = head_statistics(np.ones((2, 1, 1)))
    np.testing.assert_allclose([*found.entropy, *found.first, *found.divergence], [0, 0, 1, 1, 0, 0], atol=1e-6)


def test_the_most_concentrated_head_has_no_fixed_target():
    far = np.zeros((6, 6))
    far[[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]] = 1  # two back
    six = [
        np.eye(6),
        np.eye(6)[[0, 0, 1, 2, 3, 4]],
        np.eye(6)[[0] * 6],
        np.tri(6) / np.tri(6).sum(axis=-1, keepdims=True),
    ]
    assert most_concentrated_head([np.stack(six[:2]), np.stack([*six[2:], far])]) == (1, 2)
    assert most_concentrated_head([np.stack(six[:1])]) == (0, 0)  # where all have one
