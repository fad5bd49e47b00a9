"""Memory use of a process, estimated from a config and compared with the available memory before tracing or allocating."""

import math
import os
import pathlib

import jax
import jax.numpy as jnp

from transformer.config import Config
from transformer.model_config import ModelConfig
from transformer.types import PyTree, UserError
from transformer.validation import require

MOST_LOOPED_LAYERS = 1024
"""Most layers traced one by one; of a scanned stack, only one period is traced."""
_MOST_PARAMETERS = 10**14
"""More than any set of machines can hold, and too few to overflow in array shapes."""
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BATCH_BYTES = 20  # per position: inputs, targets, weights, segment ids and positions


def host_memory() -> int:
    """Bytes of memory available to processes of this machine (the container's limit, if there is one)."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in _CGROUPS:
        path = pathlib.Path(name)
        text = path.read_text().strip() if path.exists() else ""
        sizes += [int(text)] if text.isdecimal() else []
    return min(sizes)


def device_memory() -> int:
    """Bytes of memory of one device; for a CPU, the machine's memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else host_memory()


def num_parameters(config: ModelConfig, stacks: int = 1) -> int:
    """Parameters of a model by its dimensions: matrices only, without norms, biases and other vectors."""
    D = config.embed_dim
    count = stacks * config.positions.num_parameters(config)
    count += (config.token_types + D * (config.masked_head + config.pooler)) * D
    # In an encoder-decoder, the decoder also has cross-attention.
    for attentions, stack in ((1, config), (2, config.decoder))[:stacks]:
        for block, times in stack.block_counts.items():
            attention, network = block.attention, block.feed_forward
            head_dim = attention.head_dim or D // attention.num_heads
            projections = 2 * D * head_dim * (attention.num_heads + attention.kv_heads)
            matrices = (2 + network.gated) * D * network.resolved_hidden_dim(D)
            experts = max(1, network.num_experts) * matrices + network.num_experts * D
            count += times * (attentions * projections + experts)
    return count + config.vocab_size * (1 if config.tie_embeddings else 2) * D


def check_model(config: ModelConfig, stacks: int = 1) -> None:
    """Refuse a model that cannot be traced; `plan` and `inspect` trace without holding parameters.

    Raises:
        UserError: too many looped layers, or more parameters than any set of machines can hold.
    """
    for name, stack in (("num_layers", config), ("decoder_layers", config.decoder))[:stacks]:
        around = len(stack.first) + len(stack.pattern) + len(stack.remainder)
        looped = around if stack.scan_layers else stack.num_layers
        require(
            looped <= MOST_LOOPED_LAYERS,
            f"At most {MOST_LOOPED_LAYERS:,} layers are traced one by one, got {looped:,}; set model.scan_layers=True, or a "
            f"smaller model.{name}.",
        )
    count = num_parameters(config, stacks)
    require(
        count <= _MOST_PARAMETERS,
        f"A model must have at most {_MOST_PARAMETERS:.0e} parameters, got {count:.3g} ({_dimensions(config)}); choose smaller "
        "ones.",
    )


def check_config(config: Config) -> None:
    """Refuse a run that does not fit in this process, as far as its config shows; before any data is prepared.

    Raises:
        UserError: as in `check_model` and `check_batch`, or this process's smallest share of the parameters is too large.
    """
    stacks = config.objective.num_stacks
    check_model(config.model, stacks)
    check_batch(config, jax.process_count())
    shares = jax.process_count() if jax.local_devices()[0].platform == "cpu" else jax.device_count()
    check_bytes(
        num_parameters(config.model, stacks)
        * _BYTES[config.model.param_dtype]
        // (shares if config.parallel.shares_state else 1),
        device_memory(),
        f"the parameters of a model of {_dimensions(config.model)}",
        "Choose a smaller model, or shard it over more devices (parallel.fsdp).",
    )


def check_params(config: Config) -> None:
    """Refuse a model whose parameters do not fit on one device, before loading it or starting from it.

    Raises:
        UserError: as in `check_model`, or the parameters are too large.
    """
    model, stacks = config.model, config.objective.num_stacks
    check_model(model, stacks)
    check_bytes(
        num_parameters(model, stacks) * _BYTES[model.param_dtype],
        device_memory(),
        f"the parameters of a model of {_dimensions(model)}",
        "Load a smaller model.",
    )


def check_state(state: PyTree, local_devices: int) -> None:
    """Refuse a training state whose local part does not fit in this process.

    Args:
        state: shapes with shardings (`Runner.abstract_state`).
        local_devices: this process's devices in the mesh; CPU devices share its memory.

    Raises:
        UserError: it is too large.
    """
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    check_bytes(
        device_bytes(state) * (local_devices if jax.local_devices()[0].platform == "cpu" else 1),
        device_memory(),
        f"the state of {count:,} parameters",
        "Choose a smaller model, or shard it over more devices (parallel.fsdp).",
    )


def device_bytes(tree: PyTree) -> int:
    """Bytes of one device's part of arrays with shardings."""
    arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.number)]
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * jnp.dtype(x.dtype).itemsize
        for x in arrays
    )


def check_batch(config: Config, processes: int = 1) -> None:
    """Refuse a config whose batches, or Transformer-XL memory, do not fit in this process.

    Args:
        config: with the model's width set.
        processes: number of processes that share the rows.

    Raises:
        UserError: they are too large.
    """
    data, model = config.data, config.model
    width = model.embed_dim * _BYTES[model.dtype]
    of_hidden = width // config.optimizer.accumulate_steps if jax.local_devices()[0].platform == "cpu" else 0
    a_row = data.sequence_length * (_BATCH_BYTES + of_hidden) + model.num_layers * model.memory_length * width
    check_bytes(
        -(-data.batch_size // processes) * a_row,
        host_memory(),
        f"a batch of data.batch_size={data.batch_size:,}, data.sequence_length={data.sequence_length:,} and "
        f"model.memory_length={model.memory_length:,}",
        "Choose smaller ones.",
    )


def check_cache(config: ModelConfig, rows: int, capacity: int, *, num_beams: int = 1) -> None:
    """Refuse a KV cache that does not fit on one device; `num_beams` rows belong to one text.

    Raises:
        UserError: it is too large.
    """
    width = sum(
        times * block.attention.kv_heads * block.attention.resolved_head_dim(config.embed_dim)
        for block, times in config.block_counts.items()
    )
    a_token = 2 * width * _BYTES[config.dtype]
    check_bytes(
        rows * capacity * a_token,
        device_memory(),
        f"a cache of {rows:,} rows of {capacity:,} tokens",
        f"Ask for fewer (--max-new-tokens{', --beams' if num_beams > 1 else ''}).",
    )


def check_bytes(needed: int, room: int, what: str, remedy: str) -> None:
    """Refuse an allocation of more bytes than are available.

    Raises:
        UserError: with both numbers and the remedy.
    """
    if needed > room:
        raise UserError(
            f"Memory must hold {what}, which takes at least {_amount(needed)}; this process has {_amount(room)}. {remedy}"
        )


def _amount(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1e13 else f"{size:.1e} bytes"


def _dimensions(config: ModelConfig) -> str:
    """The dimensions that determine a model's size, as in the config."""
    names = ("vocab_size", "max_length", "num_layers", "decoder_layers", "embed_dim", "token_types")
    named = {name: getattr(config, name) for name in names}
    for section, name in (
        *(("attention", name) for name in ("num_heads", "head_dim")),
        *(("feed_forward", name) for name in ("hidden_dim", "num_experts")),
    ):
        named[f"{section}.{name}"] = max(getattr(getattr(block, section), name) for block in config.block_counts)
    return ", ".join(f"model.{name}={value:,}" for name, value in named.items() if value > 1)
