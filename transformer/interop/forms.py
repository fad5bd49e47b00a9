"""The correspondence of two tensor layouts: a reshape and a transposition of named axes, for both directions."""

import functools
import math
import re
from typing import Any, NamedTuple

import numpy as np

from transformer.types import Array

PART = "part"
"""The axis along which equally shaped parameters are fused in one stored tensor."""
_AXIS = re.compile(r"\(([a-z_ ]+)\)|([a-z_]+)")


class Form(NamedTuple):
    """`"(heads head_dim) embed -> embed heads head_dim"`: the stored tensor, with merged axes, then the parameter.

    The axis `part` numbers parameters that are fused in one stored tensor; it comes first on the right.

    Example:
        >>> form = parse("(part heads) embed -> part embed heads")
        >>> fused = np.arange(12).reshape(6, 2)
        >>> key = form.to_ours(fused, [(2, 3), (2, 3)])[1]
        >>> key.tolist()
        [[6, 8, 10], [7, 9, 11]]
        >>> bool((form.to_theirs([form.to_ours(fused, [(2, 3)] * 2)[0], key]) == fused).all())
        True
    """

    groups: tuple[tuple[str, ...], ...]
    """For each axis of the stored tensor, the axes merged in it."""
    ours: tuple[str, ...]

    @property
    def fused(self) -> bool:
        """Whether it has an axis of parts."""
        return PART in self.ours

    @property
    def num_axes(self) -> int:
        """The number of axes of one parameter."""
        return len(self.ours) - self.fused

    @property
    def _axes(self) -> tuple[str, ...]:
        return tuple(axis for group in self.groups for axis in group)

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the stored tensor for parameters of these shapes; unequal ones are concatenated along its first axis.

        Raises:
            ValueError: the shapes do not have the axes of the form.
        """
        if self.fused or len(shapes) == 1:
            return self._shape(shapes[0], len(shapes))
        every = [self._shape(shape, 1) for shape in shapes]
        if len({shape[1:] for shape in every}) > 1:
            raise ValueError(f"parts that follow each other must agree in the other axes, got {shapes}")
        return (sum(shape[0] for shape in every), *every[0][1:])

    def to_ours(self, theirs: Array, shapes: list[tuple[int, ...]]) -> list[Any]:
        """The parameters with these shapes, as views of the stored tensor: nothing is read."""
        if self.fused:
            whole = self._ours(theirs, self._sizes(shapes[0], len(shapes)))
            return list(whole)
        views, start = [], 0
        for shape in shapes:
            rows = self._shape(shape, 1)[0] if len(shapes) > 1 else theirs.shape[0] if theirs.ndim else 0
            part = theirs[start : start + rows] if len(shapes) > 1 else theirs
            views.append(self._ours(part, self._sizes(shape, 1)))
            start += rows
        return views

    def to_theirs(self, ours: list[Any]) -> Array:
        """The stored tensor; a new array if its memory layout differs."""
        if self.fused:
            return self._theirs(np.stack(ours))
        return self._theirs(ours[0]) if len(ours) == 1 else np.concatenate([self._theirs(x) for x in ours])

    def _sizes(self, shape: tuple[int, ...], parts: int) -> dict[str, int]:
        named = tuple(axis for axis in self.ours if axis != PART)
        if len(named) != len(shape):
            raise ValueError(f"a tensor of the axes {named} has {len(named)} of them, got the shape {shape}")
        return {**dict(zip(named, shape, strict=True)), PART: parts}

    def _shape(self, shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
        sizes = self._sizes(shape, parts)
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)

    def _ours(self, theirs: Any, sizes: dict[str, int]) -> Any:
        split = theirs.reshape([sizes[axis] for axis in self._axes])
        return split.transpose([self._axes.index(axis) for axis in self.ours])

    def _theirs(self, ours: Any) -> Any:
        split = ours.transpose([self.ours.index(axis) for axis in self._axes])
        sizes = dict(zip(self._axes, split.shape, strict=True))
        return split.reshape([math.prod(sizes[axis] for axis in group) for group in self.groups])


@functools.cache
def parse(text: str) -> Form:
    """Parse the text of a form.

    Raises:
        ValueError: the text is no form.
    """
    left, arrow, right = text.partition("->")
    found = [match[1] or match[2] for match in _AXIS.finditer(left)]
    form = Form(tuple(tuple(group.split()) for group in found), tuple(right.split()))
    axes = form._axes
    fits = sorted(axes) == sorted(form.ours) and len(set(axes)) == len(axes) and PART not in form.ours[1:]
    if not arrow or not fits or _AXIS.sub("", left).strip():
        raise ValueError(f"a form names the same axes on both sides, `part` first on the right, got {text!r}")
    return form
