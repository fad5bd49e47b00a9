"""The step under pmap: a copy of the state on every device, each with its rows of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer.parallel.runner import Runner, choose_devices
from transformer.types import PyTree, Statistics

AXIS_NAME = "data"
"""What a step must sum over (`make_train_step(..., axis_name=AXIS_NAME)`)."""


def replicate(tree: PyTree, devices: list) -> PyTree:
    """A copy of every array on each of this process's devices, as one array with a new first axis."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS_NAME,)), PartitionSpec(AXIS_NAME))

    def copy(x: Any) -> jax.Array:
        row = jax.numpy.asarray(x)[None]
        copies = [jax.device_put(row, device, may_alias=False) for device in devices]
        return jax.make_array_from_single_device_arrays((len(devices), *row.shape[1:]), sharding, copies)

    return jax.tree.map(copy, tree)


def unreplicate(tree: PyTree) -> PyTree:
    """The copy of this process's first device. (`x[0]` would gather from all devices.)"""
    return jax.tree.map(lambda x: x.addressable_shards[0].data.reshape(x.shape[1:]), tree)


def pmap_runner(
    data: int,
    train_step: Callable[[Any, Any], tuple[Any, Statistics]],
    evaluate_step: Callable[[PyTree, Any], Statistics],
) -> Runner:
    """Run the steps on `data` devices (0: all), as many in each process.

    Args:
        data: devices.
        train_step: made with `axis_name=AXIS_NAME`.
        evaluate_step: likewise.
    """
    devices = choose_devices(data)
    local_devices = [device for device in devices if device.process_index == jax.process_index()]
    # The first device of every process: what they hold together is one copy, known to all (a checkpoint needs that).
    first_devices = [next(d for d in devices if d.process_index == p) for p in range(jax.process_count())]
    one_copy = NamedSharding(Mesh(np.array(first_devices), (AXIS_NAME,)), PartitionSpec())
    train = jax.pmap(train_step, axis_name=AXIS_NAME, devices=devices, donate_argnums=0)
    evaluate = jax.pmap(evaluate_step, axis_name=AXIS_NAME, devices=devices)

    def place_batch(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.reshape(len(local_devices), -1, *x.shape[1:]), tree)

    def step(state: Any, batch: Any) -> tuple[Any, Statistics]:
        state, statistics = train(state, batch)
        return state, unreplicate(statistics)

    def fetch_state(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: jax.make_array_from_single_device_arrays(x.shape, one_copy, [x]), unreplicate(tree)
        )

    return Runner(
        place_state=lambda tree: replicate(tree, local_devices),
        place_batch=place_batch,
        step=step,
        evaluate_step=lambda params, batch: unreplicate(evaluate(params, batch)),
        fetch_state=fetch_state,
    )
