"""Sequences read at random behave like a list, except that indices count from the start only."""

import numpy as np
import pytest

from transformer.data.records import RandomAccess


class Squares(RandomAccess[int]):
    """The first squares."""

    def __len__(self):
        return 5

    def _read(self, index):
        return index * index


def test_records_are_read_one_by_one_and_as_a_slice():
    expected = [0, 1, 4, 9, 16]
    assert list(Squares()) == expected and list(reversed(Squares())) == expected[::-1]
    assert [Squares()[index] for index in np.arange(5)] == expected
    assert Squares()[1:4] == [1, 4, 9] and Squares()[::-2] == [16, 4, 0] and Squares()[7:] == []


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_that_does_not_exist_is_refused(index):
    with pytest.raises(IndexError, match=f"at least 0 and below 5, got {index}"):
        Squares()[index]
