"""The step under pmap: a copy of the state on every device, each with its rows of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer.parallel.runner import Runner, carry_apart, choose_devices, with_carry
from transformer.types import PyTree, Statistics, UserError

AXIS_NAME = "data"
"""What a step must sum over (`make_train_step(..., axis_name=AXIS_NAME)`)."""


def replicate(tree: PyTree, devices: list) -> PyTree:
    """A copy of every array on each of this process's devices, as one array with a new first axis."""
    return jax.tree.map(lambda x: _on_each(devices, [jax.numpy.asarray(x)] * len(devices)), tree)


def _on_each(devices: list, parts: list) -> jax.Array:
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS_NAME,)), PartitionSpec(AXIS_NAME))
    copies = [jax.device_put(part[None], device, may_alias=False) for part, device in zip(parts, devices, strict=True)]
    return jax.make_array_from_single_device_arrays((len(devices), *parts[0].shape), sharding, copies)


def unreplicate(tree: PyTree) -> PyTree:
    """The copy of this process's first device. (`x[0]` would gather from all devices.)"""
    return jax.tree.map(lambda x: x.addressable_shards[0].data.reshape(x.shape[1:]), tree)


def check_memory() -> None:
    """Raise UserError unless a memory of earlier rows, which pmap keeps in one process, is all in this one."""
    if jax.process_count() > 1:
        raise UserError(
            f"Under pmap, a memory of earlier rows stays in one process, got {jax.process_count()} processes; "
            "set parallel.strategy=mesh, or model.memory_length=0."
        )


def pmap_runner(
    data: int,
    train_step: Callable[[Any, Any], tuple[Any, Statistics]],
    evaluate_step: Callable[[PyTree, PyTree, Any], tuple[PyTree, Statistics]],
) -> Runner:
    """Run the steps on `data` devices (-1 or 0: all), as many in each process.

    Args:
        data: devices.
        train_step: made with `axis_name=AXIS_NAME`.
        evaluate_step: likewise.
    """
    devices = choose_devices(max(data, 0))
    local_devices = [device for device in devices if device.process_index == jax.process_index()]
    # The first device of every process: what they hold together is one copy, known to all (a checkpoint needs that).
    first_devices = [next(d for d in devices if d.process_index == p) for p in range(jax.process_count())]
    one_copy = NamedSharding(Mesh(np.array(first_devices), (AXIS_NAME,)), PartitionSpec())
    train = jax.pmap(train_step, axis_name=AXIS_NAME, devices=devices, donate_argnums=0)
    evaluate = jax.pmap(evaluate_step, axis_name=AXIS_NAME, devices=devices)

    def place_batch(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.reshape(len(local_devices), -1, *x.shape[1:]), tree)

    def place_state(tree: PyTree) -> PyTree:
        rest, carry = carry_apart(tree)
        if jax.tree.leaves(carry):
            check_memory()
        spread = jax.tree.map(lambda x: _on_each(devices, jax.numpy.split(x, len(devices))), carry)
        return with_carry(replicate(rest, local_devices), spread)

    def step(state: Any, batch: Any) -> tuple[Any, Statistics]:
        state, statistics = train(state, batch)
        return state, unreplicate(statistics)

    def run_evaluate_step(params: PyTree, carry: PyTree, batch: Any) -> tuple[PyTree, Statistics]:
        carry, statistics = evaluate(params, carry, batch)
        return carry, unreplicate(statistics)

    def fetch_state(tree: PyTree) -> PyTree:
        rest, carry = carry_apart(tree)
        one = jax.tree.map(
            lambda x: jax.make_array_from_single_device_arrays(x.shape, one_copy, [x]), unreplicate(rest)
        )
        rows = jax.tree.map(lambda x: jax.device_put(jax.device_get(x).reshape(-1, *x.shape[2:]), one_copy), carry)
        return with_carry(one, rows)

    def lower(state: Any, batch: Any) -> Any:
        return train.lower(state, batch)

    return Runner(
        init_state=lambda make, *arguments: place_state(make(*arguments)),
        abstract_state=lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree),
        place_state=place_state,
        place_batch=place_batch,
        step=step,
        evaluate_step=run_evaluate_step,
        fetch_state=fetch_state,
        gather=lambda tree: tree,
        lower=lower,
        num_devices=len(devices),
        feeds=(jax.process_index(), jax.process_count()),
    )
