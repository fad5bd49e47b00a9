"""The step over a mesh of devices: jit with shardings, the main path."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.parallel.runner import Runner, carry_apart, choose_devices, with_carry
from transformer.types import PyTree, Statistics

DATA_AXIS = "data"


def make_mesh(data: int = 0) -> Mesh:
    """A mesh of one axis, `data`, of `data` devices (0: all)."""
    # Explicit axes, the default, are not understood by linen's logical constraints.
    return Mesh(np.array(choose_devices(data)), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_runner(
    mesh: Mesh,
    train_step: Callable[[Any, Any], tuple[Any, Statistics]],
    evaluate_step: Callable[[PyTree, PyTree, Any], tuple[PyTree, Statistics]],
) -> Runner:
    """Run the steps with the batch and the carry sharded over `mesh` and the rest of the state replicated.

    The arithmetic is that of one device: XLA inserts the sums over devices.
    """
    rows, whole = batch_sharding(mesh), replicated_sharding(mesh)

    def train_apart(state: Any, carry: PyTree, batch: Any) -> tuple[Any, PyTree, Statistics]:
        state, statistics = train_step(with_carry(state, carry), batch)
        return *carry_apart(state), statistics

    train = jax.jit(
        train_apart, in_shardings=(whole, rows, rows), out_shardings=(whole, rows, whole), donate_argnums=(0, 1)
    )
    evaluate = jax.jit(evaluate_step, in_shardings=(whole, rows, rows), out_shardings=(rows, whole))

    def step(state: Any, batch: Any) -> tuple[Any, Statistics]:
        # Without the mesh in context, linen's constraints are silently ignored.
        with jax.set_mesh(mesh):
            state, carry, statistics = train(*carry_apart(state), batch)
        return with_carry(state, carry), statistics

    def run_evaluate_step(params: PyTree, carry: PyTree, batch: Any) -> tuple[PyTree, Statistics]:
        with jax.set_mesh(mesh):
            return evaluate(params, carry, batch)

    def place_state(tree: PyTree) -> PyTree:
        def copy(x: Any) -> jax.Array:
            # Device by device: `device_put` to them all would reuse the buffer it is given as one of the copies, and
            # the step, which donates its state, would take it from the caller.
            copies = [jax.device_put(x, device, may_alias=False) for device in mesh.local_devices]
            return jax.make_array_from_single_device_arrays(x.shape, whole, copies)

        def spread(x: Any) -> jax.Array:
            parts = rows.addressable_devices_indices_map(x.shape)
            pieces = [jax.device_put(x[part], device, may_alias=False) for device, part in parts.items()]
            return jax.make_array_from_single_device_arrays(x.shape, rows, pieces)

        rest, carry = carry_apart(tree)
        return with_carry(jax.tree.map(copy, rest), jax.tree.map(spread, carry))

    return Runner(
        place_state=place_state,
        place_batch=lambda tree: jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), tree),
        step=step,
        evaluate_step=run_evaluate_step,
        fetch_state=lambda tree: tree,
    )
