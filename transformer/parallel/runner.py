"""The interface of a parallel strategy: how training and evaluation steps run on devices."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from transformer.parallel_config import ParallelConfig
from transformer.types import PyTree, Statistics, UserError

TrainFunction = Callable[[Any, Any], tuple[Any, Statistics]]
"""`(state, batch) -> (state, statistics)`, such as a `TrainStep`."""
EvaluateFunction = Callable[[PyTree, PyTree, Any], tuple[PyTree, Statistics]]
"""`(params, carry, batch) -> (carry, statistics)`, such as an `EvaluateStep`."""
RowOrder = Callable[[int, int], Any]
"""`(length, devices)` -> the positions of a row, in the order in which the devices that share it hold them."""


class Runner(abc.ABC):
    """Compiled training and evaluation steps, and the transfers between host and devices that they need."""

    axis_name: ClassVar[str | None] = None
    """The axis over which a step sums (`TrainStep(..., axis_name=)`)."""
    num_programs: int = 1
    """Number of programs that draw random numbers for separate rows, each with its own key."""
    num_devices: int
    """Number of devices that share the work, over all processes."""
    feeds: tuple[int, int]
    """`(index, count)`: this process reads part `index` of `count` equal parts of every batch's rows."""

    def __init__(self) -> None:
        self.check_batch: Callable[[Any], Any] = lambda batch: batch
        """Called with each batch before it is placed; returns the batch or raises."""

    @classmethod
    @abc.abstractmethod
    def shares(cls, config: ParallelConfig, mesh: Mesh | None = None) -> tuple[int, int]:
        """The number of parts into which the rows of a batch, and the positions of a row, are sharded.

        Raises:
            UserError: there are no such devices.
        """

    @classmethod
    @abc.abstractmethod
    def check_memory(cls) -> None:
        """Raise UserError unless a Transformer-XL memory can be kept."""

    @classmethod
    @abc.abstractmethod
    def make(
        cls,
        config: ParallelConfig,
        train_step: TrainFunction,
        evaluate_step: EvaluateFunction,
        *,
        mesh: Mesh | None = None,
        axes: PyTree | None = None,
        row_order: RowOrder | None = None,
    ) -> "Runner":
        """The runner of a config.

        Args:
            config: the devices, and how they share the work.
            train_step: `TrainStep` with this class's `axis_name`.
            evaluate_step: `EvaluateStep` with the same.
            mesh: of devices, present or absent; None uses the config's devices.
            axes: the parameters' logical names; None keeps a whole copy of the state on every device.
            row_order: the order of positions in rows shared by devices; None keeps it.
        """

    @abc.abstractmethod
    def init_state(self, make: Callable[..., Any], *arguments: PyTree) -> PyTree:
        """`make(*arguments)`, a state made directly on all devices: no device holds more than its part.

        Arguments are arrays on the host, such as initial parameters.
        """

    @abc.abstractmethod
    def abstract_state(self, tree: PyTree) -> PyTree:
        """The shapes of a state, with shardings: the target of restoring a checkpoint."""

    @abc.abstractmethod
    def place_state(self, tree: PyTree) -> PyTree:
        """Copy the arrays of a state or of parameters to all devices; the caller keeps its own arrays.

        The `carry` of a state has rows, and is sharded like a batch. Arrays that are already placed are returned unchanged.
        """

    @abc.abstractmethod
    def place_batch(self, tree: PyTree) -> PyTree:
        """Copy this process's rows of a batch (numpy arrays) to the devices."""

    @abc.abstractmethod
    def step(self, state: PyTree, batch: PyTree) -> tuple[Any, Statistics]:
        """`(state, statistics)` from placed arguments; the given state is donated and must not be used afterwards."""

    @abc.abstractmethod
    def evaluate_step(self, params: PyTree, carry: PyTree, batch: PyTree) -> tuple[PyTree, Statistics]:
        """`(carry, statistics)` from placed arguments; the carry is sharded like the batch."""

    @abc.abstractmethod
    def fetch_state(self, tree: PyTree) -> PyTree:
        """The inverse of `place_state`, without a copy between devices; over a mesh, arrays stay sharded."""

    @abc.abstractmethod
    def gather(self, tree: PyTree) -> PyTree:
        """Convert the result of `fetch_state` to whole arrays, for programs on one device."""

    @abc.abstractmethod
    def lower(self, state: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """The `jax.stages.Lowered` of the step, from arrays or shapes with shardings."""


def carry_apart(tree: PyTree) -> tuple[PyTree, PyTree]:
    """A state without its carry, and the carry; `(tree, ())` for anything else."""
    return (tree._replace(carry=()), tree.carry) if hasattr(tree, "carry") else (tree, ())


def with_carry(tree: PyTree, carry: PyTree) -> PyTree:
    """The inverse of `carry_apart`."""
    return tree._replace(carry=carry) if hasattr(tree, "carry") else tree


def frozen_apart(tree: PyTree) -> tuple[PyTree, PyTree]:
    """A state without its frozen parameters, and these; `(tree, ())` for anything else."""
    return (tree._replace(frozen=()), tree.frozen) if hasattr(tree, "frozen") else (tree, ())


def with_frozen(tree: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `frozen_apart`."""
    return tree._replace(frozen=frozen) if hasattr(tree, "frozen") else tree


def check_divisible(batch_size: int, devices: int, accumulate_steps: int) -> None:
    """Raise UserError unless every device gets equally many rows of every micro-batch.

    Args:
        batch_size: rows of the batch of one optimizer step.
        devices: number of devices that share it; devices along context and tensor axes hold the same rows and count once.
        accumulate_steps: number of micro-batches.
    """
    if batch_size % (devices * accumulate_steps) != 0:
        raise UserError(
            f"data.batch_size must be divisible by devices x optimizer.accumulate_steps = {devices} x "
            f"{accumulate_steps}, got {batch_size}; change one of them, or use fewer devices with parallel.data."
        )


def choose_devices(count: int) -> list:
    """`count` of all devices (0 means all), equally many from each process, in JAX's order.

    Raises:
        UserError: there are fewer, or processes cannot have equally many.
    """
    devices = jax.devices()
    if count > len(devices):
        raise UserError(
            f"The axes of parallel must not exceed the {len(devices)} devices there are, got {count}; "
            "lower one of them, or set it to -1 to use the remaining devices."
        )
    if count % jax.process_count() != 0:
        raise UserError(
            f"The number of devices in parallel must be a multiple of the {jax.process_count()} processes, got {count}; "
            "change its axes, or set parallel.data to -1 to use all devices."
        )
    share = (count or len(devices)) // jax.process_count()
    by_process = [[d for d in devices if d.process_index == process] for process in range(jax.process_count())]
    return [device for own in by_process for device in own[:share]]
