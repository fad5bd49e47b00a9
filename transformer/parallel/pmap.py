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
    """A copy of every array on each device, as one array with a new first axis."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS_NAME,)), PartitionSpec(AXIS_NAME))

    def copy(x: Any) -> jax.Array:
        x = jax.numpy.asarray(x)
        copies = [jax.device_put(x[None], device) for device in devices]
        return jax.make_array_from_single_device_arrays((len(devices), *x.shape), sharding, copies)

    return jax.tree.map(copy, tree)


def unreplicate(tree: PyTree) -> PyTree:
    """The first device's copy. (`x[0]` would gather from all devices.)"""
    return jax.tree.map(lambda x: x.addressable_shards[0].data.reshape(x.shape[1:]), tree)


def pmap_runner(
    data: int,
    train_step: Callable[[Any, Any], tuple[Any, Statistics]],
    evaluate_step: Callable[[PyTree, Any], Statistics],
) -> Runner:
    """Run the steps on this process's first `data` devices (0: all), and on those of every other process.

    Args:
        data: devices.
        train_step: made with `axis_name=AXIS_NAME`.
        evaluate_step: likewise.
    """
    devices = choose_devices(jax.local_devices(), data)
    train = jax.pmap(train_step, axis_name=AXIS_NAME, devices=devices, donate_argnums=0)
    evaluate = jax.pmap(evaluate_step, axis_name=AXIS_NAME, devices=devices)

    def place_batch(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), tree)

    def step(state: Any, batch: Any) -> tuple[Any, Statistics]:
        state, statistics = train(state, batch)
        return state, unreplicate(statistics)

    return Runner(
        place_state=lambda tree: replicate(tree, devices),
        place_batch=place_batch,
        step=step,
        evaluate_step=lambda params, batch: unreplicate(evaluate(params, batch)),
        fetch_state=unreplicate,
    )
