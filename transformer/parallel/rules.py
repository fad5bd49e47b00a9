"""Which mesh axis each logical axis of a parameter is spread over."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer.types import PyTree

RULES: dict[str, str | None] = {
    "vocab": None,
    "position": None,
    "embed": None,
    "heads": None,
    "kv_heads": None,
    "head_dim": None,
    "hidden": None,
    "layers": None,
}
"""Logical name -> mesh axis; None means a whole copy on every device."""


def mesh_axes(names: PartitionSpec) -> PartitionSpec:
    """The mesh axes of an array from the logical names of its axes.

    Raises:
        ValueError: a name without a rule.

    Example:
        >>> mesh_axes(PartitionSpec("embed", None)) == PartitionSpec(None, None)
        True
    """
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(
            f"A logical axis must have a rule in parallel/rules.py, got {unknown}; there are {list(RULES)}."
        )
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def parameter_shardings(mesh: Mesh, axes: PyTree) -> PyTree:
    """The sharding of each parameter from the tree of logical names that `init_params` returns."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, mesh_axes(names)), axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
