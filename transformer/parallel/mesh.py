"""The step over a mesh of devices: jit with shardings, the default strategy."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.parallel.rules import AXES, RULES, axes_in, tree_shardings
from transformer.parallel.runner import (
    EvaluateFunction,
    RowOrder,
    Runner,
    TrainFunction,
    carry_apart,
    choose_devices,
    frozen_apart,
    with_carry,
    with_frozen,
)
from transformer.parallel_config import ParallelConfig
from transformer.types import PyTree, Statistics
from transformer.validation import require


def make_mesh(sizes: Mapping[str, int] | int = -1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all axes of `parallel.rules.AXES`.

    Args:
        sizes: devices along each axis, by default 1 (`ParallelConfig.sizes`); -1 for one axis takes the remaining devices. A
            single number is the size of `data`; 0 means -1.
        devices: the devices to use, in JAX's order; None takes all, or as many as the sizes need.

    Raises:
        UserError: the sizes do not fit the devices.
    """
    sizes = {"data": sizes or -1} if isinstance(sizes, int) else sizes
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    open_axes = [axis for axis, size in shape.items() if size == -1]
    given = math.prod(size for size in shape.values() if size != -1)
    require(len(open_axes) <= 1, f"One axis of parallel at most may be -1, got {', '.join(open_axes)}; set the others.")
    chosen = list(devices) if devices is not None else choose_devices(0 if open_axes else given)
    if open_axes:
        require(
            len(chosen) % given == 0 and len(chosen) >= given,
            f"The axes of parallel must divide the {len(chosen)} devices, got {_text(shape)}, of which {given} are one "
            f"part; change them, or set parallel.{open_axes[0]} too to use fewer devices.",
        )
        shape[open_axes[0]] = len(chosen) // given
    require(
        math.prod(shape.values()) == len(chosen),
        f"The axes of parallel must multiply to the {len(chosen)} devices, got {_text(shape)}; set one of them to -1.",
    )
    # Linen does not support explicit axes, the default.
    return Mesh(_arrange(chosen, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _text(shape: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in shape.items() if size != 1) or "1 device"


def _arrange(devices: list[Any], shape: dict[str, int]) -> np.ndarray:
    """The devices as an array of the mesh's shape: fast axes connect hardware neighbours, `dcn` connects slices."""
    sizes = tuple(shape.values())
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)
    if shape["dcn"] == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (1, *sizes[1:]), (sizes[0],) + (1,) * (len(sizes) - 1), devices, allow_split_physical_axes=True
    )


def batch_sharding(mesh: Mesh, ndim: int = 1) -> NamedSharding:
    """Rows over all axes that share a batch; the second axis of arrays with several, positions in a row, over `context`."""
    return NamedSharding(mesh, RULES.spec(("batch", "length")[:ndim], mesh.axis_names))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def num_row_shards(mesh: Mesh) -> int:
    """The number of parts into which the rows of a batch are sharded."""
    (entry,) = batch_sharding(mesh).spec
    return math.prod(mesh.shape[axis] for axis in axes_in(entry))


def process_rows(mesh: Mesh, process: int) -> tuple[int, int]:
    """`(index, count)`: a process reads part `index` of `count` equal parts of the rows; several may read the same.

    Raises:
        UserError: the rows of a process's devices are not such a part.
    """
    sharding, shards = batch_sharding(mesh), num_row_shards(mesh)
    places = sharding.devices_indices_map((shards,))
    own = sorted({place[0].indices(shards)[0] for device, place in places.items() if device.process_index == process})
    count = shards // len(own)
    require(
        own == list(range(own[0], own[0] + len(own))) and shards % len(own) == 0 and own[0] % len(own) == 0,
        f"The devices of a process must hold neighbouring rows of a batch, process {process} holds parts {own} of "
        f"{shards}; give parallel.context and parallel.tensor sizes that divide the devices of a process, or are multiples.",
    )
    return own[0] // len(own), count


def whole_copy(mesh: Mesh, tree: PyTree) -> PyTree:
    """The arrays of a tree, gathered where they were sharded."""
    if all(x.sharding.is_fully_replicated for x in jax.tree.leaves(tree)):
        return tree
    return jax.jit(lambda x: x, out_shardings=replicated_sharding(mesh))(tree)


class MeshRunner(Runner):
    """Runs the steps with batch, carry and state sharded over a mesh.

    The arithmetic is the same as on one device: XLA inserts the communication between devices.

    Args:
        mesh: from `make_mesh`.
        train_step: `TrainStep`.
        evaluate_step: `EvaluateStep`.
        axes: the parameters' logical names (`init_params`); None leaves a whole copy of the state on every device.
        row_order: as for `make`.
    """

    def __init__(
        self,
        mesh: Mesh,
        train_step: TrainFunction,
        evaluate_step: EvaluateFunction,
        axes: PyTree | None = None,
        row_order: RowOrder | None = None,
    ) -> None:
        super().__init__()
        self._mesh, self._axes = mesh, axes
        self._row_order = row_order if mesh.shape["context"] > 1 else None
        self._train_step, self._evaluate_step = train_step, evaluate_step
        self._rows, self._whole = batch_sharding(mesh), replicated_sharding(mesh)
        self._train: Any = None
        self._evaluate: Any = None
        self.num_devices = mesh.size
        self.feeds = process_rows(mesh, jax.process_index()) if _is_local(mesh) else (0, 1)

    @classmethod
    def shares(cls, config: ParallelConfig, mesh: Mesh | None = None) -> tuple[int, int]:
        """Rows over all axes that share a batch, positions over `context`."""
        mesh = mesh or make_mesh(config.sizes)
        return num_row_shards(mesh), mesh.shape["context"]

    @classmethod
    def check_memory(cls) -> None:
        """Always possible: the Transformer-XL memory is sharded with the rows."""

    @classmethod
    def make(
        cls,
        config: ParallelConfig,
        train_step: TrainFunction,
        evaluate_step: EvaluateFunction,
        *,
        mesh: Mesh | None = None,
        axes: PyTree | None = None,
        row_order: RowOrder | None = None,
    ) -> "MeshRunner":
        """Over the given mesh, or a mesh of the config's axes."""
        return cls(mesh or make_mesh(config.sizes), train_step, evaluate_step, axes, row_order)

    # ---- The steps ---------------------------------------------------------------------------------------------------

    def step(self, state: PyTree, batch: PyTree) -> tuple[Any, Statistics]:
        """The buffers of state and carry are donated; frozen parameters are only read."""
        state, frozen = frozen_apart(state)
        # Without the mesh in context, constraints are silently ignored.
        with jax.set_mesh(self._mesh):
            program = self._train_program(state, frozen, batch)
            state, carry, statistics = program(*carry_apart(state), frozen, batch)
        return with_frozen(with_carry(state, carry), frozen), statistics

    def lower(self, state: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """For the devices of the mesh, present or absent."""
        state, frozen = frozen_apart(state)
        with jax.set_mesh(self._mesh):
            return self._train_program(state, frozen, batch).lower(*carry_apart(state), frozen, batch)

    def evaluate_step(self, params: PyTree, carry: PyTree, batch: PyTree) -> tuple[PyTree, Statistics]:
        """Parameters are sharded as in the state."""
        if self._evaluate is None:
            shardings = (tree_shardings(self._mesh, self._axes, params), self._rows, self._batch_shardings(batch))
            self._evaluate = jax.jit(
                self._evaluate_step, in_shardings=shardings, out_shardings=(self._rows, self._whole)
            )
        with jax.set_mesh(self._mesh):
            return self._evaluate(params, carry, batch)

    def _train_program(self, state: Any, frozen: PyTree, batch: Any) -> Any:
        if self._train is None:
            state_shardings, carry = carry_apart(self._shardings(state))
            self._train = jax.jit(
                self._train_apart,
                in_shardings=(state_shardings, carry, self._shardings(frozen), self._batch_shardings(batch)),
                out_shardings=(state_shardings, carry, self._whole),
                donate_argnums=(0, 1),
            )
        return self._train

    def _train_apart(self, state: Any, carry: PyTree, frozen: PyTree, batch: Any) -> tuple[Any, PyTree, Statistics]:
        state, statistics = self._train_step(with_frozen(with_carry(state, carry), frozen), batch)
        return *carry_apart(frozen_apart(state)[0]), statistics

    # ---- Between host and devices ------------------------------------------------------------------------------------

    def init_state(self, make: Callable[..., Any], *arguments: PyTree) -> PyTree:
        """One program makes the part of every device."""
        # With several processes, JAX accepts no host arrays that it would have to shard.
        given = [self.place_state(argument) for argument in arguments]
        # Given arrays become a part of the state and replace the initialised ones.
        donated = tuple(range(len(given)))
        return jax.jit(make, out_shardings=self._shardings(jax.eval_shape(make, *arguments)), donate_argnums=donated)(
            *given
        )

    def abstract_state(self, tree: PyTree) -> PyTree:
        """With the shardings of the parameters, and of other arrays with their names."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, self._shardings(tree)
        )

    def place_state(self, tree: PyTree) -> PyTree:
        """Each device receives its part."""
        return jax.tree.map(_place, tree, self._shardings(tree))

    def place_batch(self, tree: PyTree) -> PyTree:
        """This process's rows are a part of the global rows."""
        return jax.tree.map(self._place_rows, self.check_batch(tree))

    def fetch_state(self, tree: PyTree) -> PyTree:
        """Unchanged: a checkpoint is written from the parts."""
        return tree

    def gather(self, tree: PyTree) -> PyTree:
        """A whole copy on every device."""
        return whole_copy(self._mesh, tree)

    def _shardings(self, tree: PyTree) -> PyTree:
        rest, carry = carry_apart(tree)
        return with_carry(tree_shardings(self._mesh, self._axes, rest), jax.tree.map(lambda _: self._rows, carry))

    def _batch_shardings(self, batch: Any) -> Any:
        return jax.tree.map(lambda x: batch_sharding(self._mesh, min(x.ndim, 2)), batch)

    def _place_rows(self, x: Any) -> jax.Array:
        x, (index, count) = np.asarray(x), self.feeds
        if self._row_order is not None and x.ndim > 1:
            x = x[:, self._row_order(x.shape[1], self._mesh.shape["context"])]
        shape, first = (len(x) * count, *x.shape[1:]), len(x) * index

        def piece(place: Any) -> np.ndarray:
            start, stop, _ = place[0].indices(shape[0])
            return x[(slice(start - first, stop - first), *place[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(self._mesh, min(x.ndim, 2)), piece)


def _place(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
        # One device at a time: `device_put` to all devices would reuse the given buffer as one of the copies, and the step,
        # which donates its state, would delete the caller's array.
    parts = sharding.addressable_devices_indices_map(x.shape)
    pieces = [jax.device_put(x[part], device, may_alias=False) for device, part in parts.items()]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, pieces)


def _is_local(mesh: Mesh) -> bool:
    """Whether this process has devices of the mesh; absent hardware belongs to none."""
    return any(device in mesh.devices.flat for device in jax.local_devices())
