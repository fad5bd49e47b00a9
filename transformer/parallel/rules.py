"""Which mesh axes each logical axis is spread over: the one table, and what follows from it for parameters and activations."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.types import PyTree
from transformer.validation import require

AXES = ("dcn", "data", "fsdp", "expert", "context", "tensor")
"""The axes of a mesh, slowest first: `dcn` goes over the data-centre network between slices, the others stay within one."""

RULES: dict[str, tuple[str, ...]] = {
    # Of parameters.
    "vocab": ("tensor",),
    "position": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "hidden": ("tensor",),
    "expert": ("expert",),
    "norm": (),
    "layers": (),
    # Of activations, which share "heads", "kv_heads", "hidden" and "vocab".
    "batch": ("dcn", "data", "fsdp", "expert"),
    "length": ("context",),
}
"""Logical name -> mesh axes; none means a whole copy on every device.

Parameters are cut along `embed` over `fsdp` (Rajbhandari et al. 2020, stage 3) and along heads and hidden units over `tensor`
(Shoeybi et al. 2019). Rows of a batch are spread over every axis but `context` and `tensor`, whose devices share them.
"""


def mesh_axes(names: Any, axes: Any = AXES) -> PartitionSpec:
    """The mesh axes of an array from the logical names of its axes.

    Args:
        names: a logical name or None for each axis of the array.
        axes: those of the mesh; others of the rules are left out.

    Raises:
        ValueError: a name without a rule.

    Example:
        >>> mesh_axes(("embed", None)) == PartitionSpec("fsdp", None)
        True
    """
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(
            f"A logical axis must have a rule in parallel/rules.py, got {unknown}; there are {list(RULES)}."
        )
    found = [tuple(axis for axis in RULES.get(name, ()) if axis in axes) for name in names]
    return PartitionSpec(*(mesh[0] if len(mesh) == 1 else mesh or None for mesh in found))


def axes_in(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`: a name, several, or None."""
    return (entry,) if isinstance(entry, str) else entry or ()


def spread_axes() -> dict[str, int]:
    """Axes of the mesh that is set (`jax.set_mesh`) over which the compiler spreads arrays, and how many devices each has.

    None without a mesh, on one device, and where devices run a program each (`pmap`, inside `shard_map`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind == AxisType.Auto and size > 1}


def constrain(x: Any, *names: str | None) -> Any:
    """Ask the compiler to spread an activation by the logical names of its axes, over the mesh that is set, if there is one."""
    spread = spread_axes()
    return jax.lax.with_sharding_constraint(x, mesh_axes(names, spread)) if spread else x


def parameter_shardings(mesh: Mesh, axes: PyTree, shapes: PyTree | None = None) -> PyTree:
    """The sharding of each parameter.

    Args:
        mesh: of devices.
        axes: the tree of logical names that `init_params` returns.
        shapes: the parameters, or anything with their shapes, to check that devices get as much each.

    Raises:
        UserError: an axis of the mesh does not divide an axis of a parameter; which, and by how much.
    """
    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, mesh_axes(names, mesh.axis_names)), axes, is_leaf=_is_names
    )
    if shapes is not None:
        jax.tree_util.tree_map_with_path(_check_divides, axes, shapes, shardings, is_leaf=_is_names)
    return shardings


def tree_shardings(mesh: Mesh, axes: PyTree | None, tree: PyTree) -> PyTree:
    """The sharding of every array of a state or a part of it.

    An array with the name and the axes of a parameter is spread as that is: a moment, an average, a gradient. All others
    (counts, keys, factored moments and what stands in for them) are whole on every device.

    Args:
        mesh: of devices.
        axes: the parameters' logical names; None leaves everything whole.
        tree: arrays, or anything with shapes.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    if axes is None:
        return jax.tree.map(lambda _: whole, tree)
    names = {_keys(path): value for path, value in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_names)}

    def sharding(path: Any, x: Any) -> NamedSharding:
        keys = _keys(path)
        own = next((names[keys[i:]] for i in range(len(keys)) if keys[i:] in names), None)
        if own is None or len(own) != len(x.shape) or math.prod(x.shape) == 1:
            return whole
        found = NamedSharding(mesh, mesh_axes(own, mesh.axis_names))
        return _check_divides(path, own, x, found)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _check_divides(path: Any, names: Any, x: Any, sharding: NamedSharding) -> NamedSharding:
    for name, size, entry in zip(names, x.shape, sharding.spec, strict=True):
        for axis in axes_in(entry):
            devices = sharding.mesh.shape[axis]
            require(
                size % devices == 0,
                f"parallel.{axis} must divide the {name!r} axis of every parameter, got {devices} devices for {size} in "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(x.shape)}; "
                f"change parallel.{axis}, or the model's size to a multiple of it.",
            )
    return sharding


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _is_names(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
