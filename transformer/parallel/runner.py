"""What a way of running the step over devices consists of."""

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
"""`(length, devices)` -> the places of a row in the order in which the devices that share it hold them."""


class Runner(abc.ABC):
    """A compiled training and evaluation step, and the moves between host and devices that go with them."""

    axis_name: ClassVar[str | None] = None
    """What a step must sum over (`TrainStep(..., axis_name=)`)."""
    num_programs: int = 1
    """Programs that draw random numbers for rows of their own, each with its own key."""
    num_devices: int
    """That share the work, of all processes."""
    feeds: tuple[int, int]
    """`(index, count)`: this process reads part `index` of `count` equal parts of every batch's rows."""

    def __init__(self) -> None:
        self.check_batch: Callable[[Any], Any] = lambda batch: batch
        """Is given each batch before it is placed, and returns it or raises."""

    @classmethod
    @abc.abstractmethod
    def shares(cls, config: ParallelConfig, mesh: Mesh | None = None) -> tuple[int, int]:
        """Into how many parts the devices of a config, or of a mesh, cut the rows of a batch, and the places of a row.

        Raises:
            UserError: there are no such devices.
        """

    @classmethod
    @abc.abstractmethod
    def check_memory(cls) -> None:
        """Raise UserError unless a memory of earlier rows can be kept."""

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
            config: which devices, and what they share.
            train_step: `TrainStep` with this class's `axis_name`.
            evaluate_step: `EvaluateStep` likewise.
            mesh: of devices, present or absent; None takes those of the config.
            axes: the parameters' logical names; None leaves a whole copy of the state on every device.
            row_order: of rows that devices share; None leaves rows as they are.
        """

    @abc.abstractmethod
    def init_state(self, make: Callable[..., Any], *arguments: PyTree) -> Any:
        """`make(*arguments)`, a state made on all devices at once: no device holds more than its part.

        Arguments are arrays on the host, such as parameters to start from.
        """

    @abc.abstractmethod
    def abstract_state(self, tree: PyTree) -> PyTree:
        """Shapes of a state -> the same with shardings: what a checkpoint is restored to."""

    @abc.abstractmethod
    def place_state(self, tree: PyTree) -> PyTree:
        """Arrays of one copy (a state, parameters) -> new arrays on all devices; what was given stays the caller's.

        A state's `carry` has rows as a batch has, and is spread as those are. What is placed already stays as it is.
        """

    @abc.abstractmethod
    def place_batch(self, tree: PyTree) -> PyTree:
        """This process's rows of a batch, numpy arrays -> arrays spread over the devices."""

    @abc.abstractmethod
    def step(self, state: Any, batch: Any) -> tuple[Any, Statistics]:
        """`(state, statistics)` of placed arguments; the given state is donated, so unusable after."""

    @abc.abstractmethod
    def evaluate_step(self, params: PyTree, carry: PyTree, batch: Any) -> tuple[PyTree, Statistics]:
        """`(carry, statistics)` of placed arguments, the carry as part of the batch."""

    @abc.abstractmethod
    def fetch_state(self, tree: PyTree) -> PyTree:
        """The inverse of `place_state`, without a copy between devices; over a mesh, arrays stay spread over it."""

    @abc.abstractmethod
    def gather(self, tree: PyTree) -> PyTree:
        """What `fetch_state` gave -> whole arrays, for programs of one device."""

    @abc.abstractmethod
    def lower(self, state: Any, batch: Any) -> Any:
        """The `jax.stages.Lowered` of the step, from shapes with shardings or arrays."""


def carry_apart(tree: PyTree) -> tuple[PyTree, PyTree]:
    """A state without its carry, and the carry; `(tree, ())` for anything else."""
    return (tree._replace(carry=()), tree.carry) if hasattr(tree, "carry") else (tree, ())


def with_carry(tree: PyTree, carry: PyTree) -> PyTree:
    """The inverse of `carry_apart`."""
    return tree._replace(carry=carry) if hasattr(tree, "carry") else tree


def frozen_apart(tree: PyTree) -> tuple[PyTree, PyTree]:
    """A state without what is frozen in it, and that; `(tree, ())` for anything else."""
    return (tree._replace(frozen=()), tree.frozen) if hasattr(tree, "frozen") else (tree, ())


def with_frozen(tree: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `frozen_apart`."""
    return tree._replace(frozen=frozen) if hasattr(tree, "frozen") else tree


def check_divisible(batch_size: int, devices: int, accumulate_steps: int) -> None:
    """Raise UserError unless every device gets as many rows of every micro-batch.

    Args:
        batch_size: rows of the batch of one optimizer step.
        devices: how many share it; those of a context or tensor axis, which have the same rows, count as one.
        accumulate_steps: micro-batches it is cut into.
    """
    if batch_size % (devices * accumulate_steps) != 0:
        raise UserError(
            f"data.batch_size must be divisible by devices x optimizer.accumulate_steps = {devices} x "
            f"{accumulate_steps}, got {batch_size}; change one of them, or use fewer devices with parallel.data."
        )


def choose_devices(count: int) -> list:
    """`count` of all devices (0: all), as many from each process, in JAX's order.

    Raises:
        UserError: there are fewer, or processes cannot have as many each.
    """
    devices = jax.devices()
    if count > len(devices):
        raise UserError(
            f"The axes of parallel must not exceed the {len(devices)} devices there are, got {count}; "
            "lower one of them, or set it to -1 to use what the others leave."
        )
    if count % jax.process_count() != 0:
        raise UserError(
            f"The devices that parallel asks for must be a multiple of the {jax.process_count()} processes, got {count}; "
            "change its axes, or set parallel.data to -1 to use all devices."
        )
    share = (count or len(devices)) // jax.process_count()
    by_process = [[d for d in devices if d.process_index == process] for process in range(jax.process_count())]
    return [device for own in by_process for device in own[:share]]
