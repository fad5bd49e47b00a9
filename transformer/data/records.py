"""The base of sequences of records that are read at random, one by one or as a slice."""

import abc
import operator
from collections.abc import Sequence
from typing import SupportsIndex, TypeVar, overload

Item = TypeVar("Item")


class RandomAccess(Sequence[Item]):
    """Records read at random; a subclass defines `_read` and `__len__`. Indices count from the start only."""

    @abc.abstractmethod
    def _read(self, index: int) -> Item:
        """The record at an index that exists."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._read(one) for one in range(*index.indices(len(self)))]
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"A record's index must be at least 0 and below {len(self)}, got {index}.")
        return self._read(index)
