"""A checkpoint of looped layers for a scanned stack, and the other way round."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from transformer.layers.scan_params import loop_params, scan_params
from transformer.types import PyTree


class Layout(NamedTuple):
    """How what is stored differs from what is wanted."""

    stored: Callable[[PyTree], PyTree]
    """Shapes (with shardings) of what is wanted -> of what is stored."""
    convert: Callable[[PyTree], PyTree]
    """Arrays as they are stored -> as they are wanted."""

    def read(self, arrays: PyTree, target: PyTree) -> PyTree:
        """The arrays as they are wanted, with the shardings of the target."""
        shardings = jax.tree.map(lambda x: x.sharding, target)
        return jax.jit(self.convert, out_shardings=shardings)(arrays)


def stored_layout(
    found: Mapping[str, str], target: PyTree, describe: Callable[[PyTree], Mapping[str, str]]
) -> Layout | None:
    """The layout in which a checkpoint fits a target; None where it fits as it is, or in no way at all.

    Args:
        found: names, types and shapes of the arrays there are.
        target: shapes of those wanted.
        describe: gives the names, types and shapes of a tree.
    """
    if describe(target) == found:
        return None
    wanted = describe(target)
    there, here = _num_blocks(found), _num_blocks(wanted)
    # The scanned one has the blocks of a period only; of a single period, they are as many.
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
