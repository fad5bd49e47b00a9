"""Sharding rules: the mesh axes of each logical axis, and the resulting shardings of parameters and activations."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.types import Array, PyTree
from transformer.validation import require

AXES = ("dcn", "data", "fsdp", "expert", "context", "tensor")
"""The axes of a mesh, slowest first: `dcn` is the data-centre network between slices, the others lie within one slice."""


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The mesh axes of each logical axis. Without rules, the default of modules, the current mesh is ignored.

    Example:
        >>> RULES.spec(("embed", None)) == PartitionSpec("fsdp", None)
        True
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(logical axis, mesh axes) pairs; an empty tuple means a whole copy on every device."""

    def axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes of a logical axis; a mesh axis maps to itself unless a rule says otherwise.

        Raises:
            UserError: there is no rule for the name.
        """
        table = {**{axis: (axis,) for axis in AXES}, **dict(self.rules)}
        require(
            name in table,
            f"An axis of a parameter must have a name of the sharding rules, got {name!r}; there are {', '.join(table)}.",
        )
        return table[name]

    def spec(self, names: Iterable[str | Sequence[str] | None], axes: Collection[str] = AXES) -> PartitionSpec:
        """The mesh axes of an array.

        Args:
            names: for each axis of the array: a logical name, several, or None.
            axes: axes of the mesh; other axes in the rules are left out.

        Raises:
            UserError: a name has no rule.
        """
        parts = [(name,) if isinstance(name, str) else name or () for name in names]
        found = [tuple(axis for name in part for axis in self.axes(name) if axis in axes) for part in parts]
        return PartitionSpec(*(mesh[0] if len(mesh) == 1 else mesh or None for mesh in found))

    def sharded_axes(self) -> dict[str, int]:
        """Axes of the current mesh that occur in the rules and are partitioned by the compiler, with their sizes.

        None without a mesh (`jax.set_mesh`), on one device, and where each device runs its own program (`pmap`, `shard_map`).
        """
        mesh, known = jax.sharding.get_abstract_mesh(), {axis for _, axes in self.rules for axis in axes}
        sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        return {name: size for name, size, kind in sizes if kind == AxisType.Auto and size > 1 and name in known}

    def constrain(self, x: Array, *names: str | None) -> Array:
        """Ask the compiler to shard an activation by the logical names of its axes, over the current mesh, if any."""
        mesh_axes = self.sharded_axes()
        return jax.lax.with_sharding_constraint(x, self.spec(names, mesh_axes)) if mesh_axes else x


RULES = Sharding(
    (
        # Parameters.
        ("vocab", ("tensor",)),
        ("position", ()),
        ("embed", ("fsdp",)),
        ("heads", ("tensor",)),
        ("kv_heads", ("tensor",)),
        ("head_dim", ()),
        ("hidden", ("tensor",)),
        ("expert", ("expert",)),
        ("norm", ()),
        ("rank", ()),
        ("layers", ()),
        # Activations; they share "heads", "kv_heads", "hidden" and "vocab" with parameters.
        ("batch", ("dcn", "data", "fsdp", "expert")),
        ("length", ("context",)),
    )
)
"""The trainer's rules.

Parameters are sharded along `embed` over `fsdp` (Rajbhandari et al. 2020, stage 3), and along heads and hidden units over
`tensor` (Shoeybi et al. 2019). Rows of a batch are sharded over every axis except `context` and `tensor`.
"""


def axes_in(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`: a name, several, or None."""
    return (entry,) if isinstance(entry, str) else entry or ()


def parameter_shardings(mesh: Mesh, axes: PyTree, shapes: PyTree | None = None) -> PyTree:
    """The sharding of each parameter.

    Args:
        mesh: of devices.
        axes: the tree of logical names that `init_params` returns.
        shapes: the parameters, or anything with their shapes, to check that shards have equal sizes.

    Raises:
        UserError: a mesh axis does not divide an axis of a parameter; the message names both.
    """
    shardings = jax.tree.map(lambda names: _parameter_sharding(mesh, names), axes, is_leaf=is_names)
    if shapes is not None:
        jax.tree_util.tree_map_with_path(_check_divides, axes, shapes, shardings, is_leaf=is_names)
    return shardings


def tree_shardings(mesh: Mesh, axes: PyTree | None, tree: PyTree) -> PyTree:
    """The sharding of every array of a state, or of a part of it.

    An array with the name and the axes of a parameter is sharded like it: a moment, an average, a gradient. Other arrays
    (counts, keys, factored moments and their placeholders) are whole on every device.

    Args:
        mesh: of devices.
        axes: the parameters' logical names; None keeps everything whole.
        tree: arrays, or anything with shapes.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    if axes is None:
        return jax.tree.map(lambda _: whole, tree)
    names = {_keys(path): value for path, value in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_names)}

    def sharding(path: Any, x: Any) -> NamedSharding:
        keys = _keys(path)
        own = next((names[keys[i:]] for i in range(len(keys)) if keys[i:] in names), None)
        if own is None or len(own) != len(x.shape) or math.prod(x.shape) == 1:
            return whole
        return _check_divides(path, own, x, _parameter_sharding(mesh, own))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _parameter_sharding(mesh: Mesh, names: Any) -> NamedSharding:
    spec = RULES.spec(names, mesh.axis_names)
    used = [axis for entry in spec for axis in axes_in(entry)]
    require(
        len(used) == len(set(used)),
        f"A parameter can be cut along each axis of a mesh once, got the names {tuple(names)}.",
    )
    return NamedSharding(mesh, spec)


def _check_divides(path: Any, names: Any, x: Any, sharding: NamedSharding) -> NamedSharding:
    for name, size, entry in zip(names, x.shape, sharding.spec, strict=True):
        for axis in axes_in(entry):
            devices = sharding.mesh.shape[axis]
            # Padded rows of a table stand for no token and are never generated; a run to start from may have fewer rows.
            more = (
                f"model.vocab_size={-(-size // devices) * devices}"
                if name == "vocab"
                else "the model's size to a multiple"
            )
            require(
                size % devices == 0,
                f"parallel.{axis} must divide the {name!r} axis of every parameter, got {devices} devices for {size} in "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(x.shape)}; "
                f"change parallel.{axis}, or set {more}.",
            )
    return sharding


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def is_names(node: object) -> bool:
    """Whether a node of a tree is a tuple of axis names."""
    return isinstance(node, PartitionSpec)
