"""Loading of a checkpoint of looped layers into a scanned stack, and vice versa."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from transformer.layers.scan_params import loop_params, scan_params
from transformer.types import PyTree


class Layout(NamedTuple):
    """The difference between the stored and the target layout."""

    stored: Callable[[PyTree], PyTree]
    """Converts shapes (with shardings) of the target to stored shapes."""
    convert: Callable[[PyTree], PyTree]
    """Converts stored arrays to target arrays."""

    def read(self, arrays: PyTree, target: PyTree) -> PyTree:
        """The arrays in the target layout, with the target's shardings."""
        shardings = jax.tree.map(lambda x: x.sharding, target)
        return jax.jit(self.convert, out_shardings=shardings)(arrays)


def stored_layout(
    found: Mapping[str, str], target: PyTree, describe: Callable[[PyTree], Mapping[str, str]]
) -> Layout | None:
    """The layout in which a checkpoint fits a target; None if it fits as it is, or cannot fit.

    Args:
        found: names, types and shapes of the stored arrays.
        target: shapes of the target arrays.
        describe: returns the names, types and shapes of a tree.
    """
    if describe(target) == found:
        return None
    wanted = describe(target)
    there, here = _num_blocks(found), _num_blocks(wanted)
    # The scanned layout has the blocks of one period only; with a single period, both have equally many.
    candidates = []
    if 0 < there <= here:
        scan = functools.partial(scan_params, pattern_length=there, num_first=_num_blocks(found, "first"))
        candidates.append(Layout(functools.partial(scan, stack=_stack), loop_params))
    if 0 < here <= there:
        scan = functools.partial(scan_params, pattern_length=here, num_first=_num_blocks(wanted, "first"))
        candidates.append(Layout(functools.partial(loop_params, take=_take), scan))
    return next((layout for layout in candidates if describe(layout.stored(target)) == found), None)


def _num_blocks(names: Mapping[str, str], part: str = "blocks") -> int:
    block = re.compile(rf"(?:^|/){part}/block_(\d+)/")
    return max((int(match.group(1)) + 1 for match in map(block.search, names) if match), default=0)


def _stack(leaves: Any) -> jax.ShapeDtypeStruct:
    first = leaves[0]
    sharding = first.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype, sharding=sharding)


def _take(leaf: jax.ShapeDtypeStruct, period: int) -> jax.ShapeDtypeStruct:
    del period
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)
