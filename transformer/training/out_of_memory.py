"""The device memory of a training step, by arithmetic, the free memory, and changes that make the step fit."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from transformer.config import Config
from transformer.memory import device_bytes
from transformer.model_config import ModelConfig
from transformer.parallel_config import ParallelConfig
from transformer.training.state import TrainState
from transformer.types import UserError


def row_shards(parallel: ParallelConfig) -> int:
    """Number of devices with rows of their own; at least 1 along `data`."""
    return max(parallel.dcn, 1) * max(parallel.data, 1) * parallel.fsdp * parallel.expert


def activation_bytes(config: Config) -> float:
    """Activations that the blocks of one device keep for the backward pass of a micro-batch."""
    model, parallel = config.model, config.parallel
    rows = config.data.batch_size / config.optimizer.accumulate_steps / row_shards(parallel)
    positions = config.data.sequence_length / parallel.context
    itemsize = jnp.dtype(model.dtype).itemsize
    layers = sum(stack.num_layers for stack in (model, model.decoder)[: config.objective.num_stacks])
    return rows * positions * kept_widths(model, parallel.tensor) * model.embed_dim * itemsize * layers


def output_bytes(config: Config) -> float:
    """Logits of one device's micro-batch and their gradient, and the gathered output matrix and its gradient."""
    model, parallel = config.model, config.parallel
    rows = config.data.batch_size / config.optimizer.accumulate_steps / row_shards(parallel)
    positions = config.data.sequence_length / parallel.context
    logits = 2 * rows * positions * model.vocab_size * 4 / parallel.tensor / config.objective.loss_chunks
    return logits + 2 * model.vocab_size * model.embed_dim * jnp.dtype(model.dtype).itemsize / parallel.tensor


def kept_widths(model: ModelConfig, tensor: int) -> float:
    """Activations that a block keeps for the backward pass, per position, in multiples of the hidden size.

    `full` keeps the hidden state alone, plus all activations of the one block being recomputed. `dots` also keeps the block's
    matrix products; `none` also keeps the intermediate values, most of them float32 in and around the norms, which `tensor`
    does not shard. Counted from the layers, and adjusted to programs of Llama 3.1 8B compiled for TPUs.
    """
    products = between = 0.0
    for block in model.blocks:
        attention, network = block.attention, block.feed_forward
        heads = attention.num_heads + 2 * attention.kv_heads
        projected = heads * attention.resolved_head_dim(model.embed_dim) / model.embed_dim
        copies = network.experts_per_token if network.num_experts else 1
        hidden = copies * (1 + network.gated) * network.resolved_hidden_dim(model.embed_dim) / model.embed_dim
        products += (projected + hidden) / model.num_layers
        between += (2 * projected + 3 * hidden) / model.num_layers
    everything = 16 + between / tensor
    dots = 2 + products / tensor
    return {"none": everything, "dots": dots, "offload": 2.0, "full": 1 + everything / model.num_layers}[model.remat]


class Needs:
    """The memory of a step of a resolved config on one device, in bytes.

    Args:
        config: the run's config; with `parallel.data` of -1, that axis takes the devices left by the other axes.
        state: shapes of the run's state, with their final shardings.
        devices: number of devices that share the work.
        local: devices that share one memory: all devices of this process on a CPU, 1 elsewhere.
    """

    def __init__(self, config: Config, state: TrainState, devices: int, local: int = 1) -> None:
        others = devices // max(1, row_shards(dataclasses.replace(config.parallel, data=1)) * _shared(config))
        parallel = dataclasses.replace(config.parallel, data=max(1, others))
        self.config = dataclasses.replace(config, parallel=parallel)
        self.state, self.gradients = local * device_bytes(state), local * device_bytes(state.params)
        self.local = local

    @property
    def total(self) -> float:
        """State, gradients, activations and logits."""
        return self.state + self.gradients + self.local * (activation_bytes(self.config) + output_bytes(self.config))

    def describe(self) -> str:
        """The parts of `total`."""
        activations, output = (self.local * f(self.config) for f in (activation_bytes, output_bytes))
        return (
            f"A step needs about {_size(self.total)}: {_size(self.state)} of state, {_size(self.gradients)} of gradients, "
            f"{_size(activations)} of activations and {_size(output)} for the output layer"
        )

    def remedies(self, free: float) -> str:
        """Changes that make the step fit in `free` bytes (0: unknown), each with the memory of the changed step."""
        changes = self._changes()
        found = _first_of_each([(name, needs) for name, needs in changes if free <= 0 or needs <= free])
        if found and free > 0:
            return f"What would make it fit: {', or '.join(found)}."
        parts = [*(found or _first_of_each(changes)), "a smaller model", "parallel.fsdp over more devices"]
        return f"What takes less: {', '.join(parts)}."

    def _changes(self) -> list[tuple[str, float]]:
        """Changes that keep a run's arithmetic, each alone and the cheapest together; only those that save memory."""
        config, shards = self.config, row_shards(self.config.parallel)
        remat = {"model.remat=full": _with(config, "model", remat="full")} if config.model.remat != "full" else {}
        chunks = {}
        cheaper = config.objective.in_chunks(8)
        if config.objective.loss_chunks == 1 and cheaper != config.objective:
            chunks = {"objective.loss_chunks=8": dataclasses.replace(config, objective=cheaper)}
        most = config.data.batch_size // shards
        numbers = [n for n in (2, 4, 8, 16, 32, 64) if n <= most and config.data.batch_size % (n * shards) == 0]
        micro = {
            f"optimizer.accumulate_steps={n}": _with(config, "optimizer", accumulate_steps=n)
            for n in numbers
            if n > config.optimizer.accumulate_steps
        }
        changed = {**micro, **remat, **chunks}
        if micro and remat:
            name, smallest = list(micro.items())[-1]
            changed[f"{name} with model.remat=full"] = _with(smallest, "model", remat="full")
        found = []
        for name, other in changed.items():
            needs = self.state + self.gradients + self.local * (activation_bytes(other) + output_bytes(other))
            if needs < 0.95 * self.total:
                found.append((name, needs))
        data = config.parallel.data
        if data > 1 and self.local == 1 and config.model.embed_dim % data == 0 and config.parallel.shares_state:
            whole = self.state + self.gradients
            found.append((f"parallel.fsdp={data * config.parallel.fsdp}", self.total - whole * (1 - 1 / data)))
        return found


def _shared(config: Config) -> int:
    return max(1, config.parallel.tensor) * max(1, config.parallel.context)


def _first_of_each(changes: list[tuple[str, float]]) -> list[str]:
    """The first value of each field, with the memory of the step."""
    first: dict[str, str] = {}
    for name, needs in changes:
        first.setdefault(name.split("=")[0] + ("&" if " " in name else ""), f"{name} (about {_size(needs)})")
    return list(first.values())


def _with(config: Config, part: str, **changes: Any) -> Config:
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changes)})


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 5e7 else f"{number / 1e6:.2f} MB"


def free_bytes() -> float:
    """Free bytes of this process's first device, or of a CPU's host within its control groups; 0 if unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        found = device.memory_stats() or {}
        return float(found.get("bytes_limit", 0) - found.get("bytes_in_use", 0))
    free = []
    lines = _read("/proc/meminfo").splitlines()
    free += [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        numbers = [_read(path).strip() for path in (limit, used)]
        if all(number.isdigit() for number in numbers):
            free.append(float(int(numbers[0]) - int(numbers[1])))
    return max(0.0, min(free, default=0.0))


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that a device or a host is out of memory."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError)
        and ("RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower() or "bad_alloc" in text)
    )


class OutOfMemory(UserError):
    """There is not enough memory; the message has the requirement and changes that make it fit."""


@contextlib.contextmanager
def explained(needs: Needs | None = None, what: str = "A training step") -> Iterator[None]:
    """Convert out-of-memory errors inside into `OutOfMemory`; every command that holds a model uses it.

    Args:
        needs: the memory of the run's step; None if the operation has no formula.
        what: the operation, for the message.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        free = free_bytes()
        there = f" ({_size(free)} are free now)" if free > 0 else ""
        if needs is None:
            raise OutOfMemory(
                f"{what} needs more memory than there is{there}. Use fewer or shorter rows, or a smaller model."
            ) from error
        raise OutOfMemory(
            f"This run does not fit in the memory of a device{there}. {needs.describe()}. {needs.remedies(0)}"
        ) from error


def warning(needs: Needs) -> str:
    """A warning if a step needs more memory than is free, by its arithmetic; else empty."""
    free = free_bytes()
    if free <= 0 or needs.total <= free:
        return ""
    return f"{needs.describe()}; {_size(free)} are free. It may not fit. {needs.remedies(free)}"
