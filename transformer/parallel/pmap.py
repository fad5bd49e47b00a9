"""The step under pmap: a copy of the state on every device, and a share of the batch's rows."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer.parallel.runner import (
    EvaluateFunction,
    RowOrder,
    Runner,
    TrainFunction,
    carry_apart,
    choose_devices,
    with_carry,
)
from transformer.parallel_config import ParallelConfig
from transformer.types import PyTree, Statistics, UserError
from transformer.validation import require

AXIS_NAME = "data"
"""The axis over which a step sums (`TrainStep(..., axis_name=AXIS_NAME)`)."""


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


class PmapRunner(Runner):
    """Runs the steps on a number of devices, equally many in each process.

    Args:
        data: number of devices; -1 or 0 means all.
        train_step: `TrainStep` with `axis_name=AXIS_NAME`.
        evaluate_step: `EvaluateStep` with the same.
    """

    axis_name = AXIS_NAME

    def __init__(
        self,
        data: int,
        train_step: TrainFunction,
        evaluate_step: EvaluateFunction,
    ) -> None:
        super().__init__()
        self._devices = devices = choose_devices(max(data, 0))
        self._local_devices = [device for device in devices if device.process_index == jax.process_index()]
        # The first device of every process: together they hold one copy that every process knows, as a checkpoint needs.
        first = [next(d for d in devices if d.process_index == p) for p in range(jax.process_count())]
        self._one_copy = NamedSharding(Mesh(np.array(first), (AXIS_NAME,)), PartitionSpec())
        self._train = jax.pmap(train_step, axis_name=AXIS_NAME, devices=devices, donate_argnums=0)
        self._evaluate = jax.pmap(evaluate_step, axis_name=AXIS_NAME, devices=devices)
        self.num_devices = self.num_programs = len(devices)
        self.feeds = (jax.process_index(), jax.process_count())

    @classmethod
    def shares(cls, config: ParallelConfig, mesh: Mesh | None = None) -> tuple[int, int]:
        """Rows over all devices; each has whole rows."""
        _check_present(mesh)
        return len(choose_devices(max(config.data, 0))), 1

    @classmethod
    def check_memory(cls) -> None:
        """In one process only: a Transformer-XL memory is not sent between processes."""
        if jax.process_count() > 1:
            raise UserError(
                f"Under pmap, a Transformer-XL memory stays in one process, got {jax.process_count()} processes; "
                "set parallel.strategy=mesh, or model.memory_length=0."
            )

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
    ) -> "PmapRunner":
        """On `config.data` devices, each with whole rows and a whole copy of the state."""
        del axes, row_order
        _check_present(mesh)
        return cls(config.data, train_step, evaluate_step)

    def init_state(self, make: Callable[..., Any], *arguments: PyTree) -> PyTree:
        """Made once, then copied."""
        return self.place_state(make(*arguments))

    def abstract_state(self, tree: PyTree) -> PyTree:
        """The shapes of one copy, without shardings."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    def place_state(self, tree: PyTree) -> PyTree:
        """One copy per device, except for the carry's rows."""
        rest, carry = carry_apart(tree)
        if jax.tree.leaves(carry):
            self.check_memory()
        devices = self._devices
        spread = jax.tree.map(lambda x: _on_each(devices, jax.numpy.split(x, len(devices))), carry)
        return with_carry(replicate(rest, self._local_devices), spread)

    def place_batch(self, tree: PyTree) -> PyTree:
        """With a new first axis over this process's devices."""
        devices = len(self._local_devices)
        return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), self.check_batch(tree))

    def step(self, state: PyTree, batch: PyTree) -> tuple[Any, Statistics]:
        """Statistics are one copy's; they cover all rows."""
        state, statistics = self._train(state, batch)
        return state, unreplicate(statistics)

    def evaluate_step(self, params: PyTree, carry: PyTree, batch: PyTree) -> tuple[PyTree, Statistics]:
        """Statistics as in `step`."""
        carry, statistics = self._evaluate(params, carry, batch)
        return carry, unreplicate(statistics)

    def fetch_state(self, tree: PyTree) -> PyTree:
        """The copies of each process's first device, and all rows of the carry."""
        rest, carry = carry_apart(tree)
        one = jax.tree.map(
            lambda x: jax.make_array_from_single_device_arrays(x.shape, self._one_copy, [x]), unreplicate(rest)
        )
        rows = jax.tree.map(
            lambda x: jax.device_put(jax.device_get(x).reshape(-1, *x.shape[2:]), self._one_copy), carry
        )
        return with_carry(one, rows)

    def gather(self, tree: PyTree) -> PyTree:
        """Unchanged."""
        return tree

    def lower(self, state: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """For the devices that are present."""
        return self._train.lower(state, batch)


def _check_present(mesh: Mesh | None) -> None:
    require(
        mesh is None,
        "parallel.strategy=pmap runs on the devices that are present, got a mesh; set parallel.strategy=mesh.",
    )
