"""A step compiled for devices that are not there, and what that tells: memory, operations, exchanges, time, cost."""

import dataclasses
import functools
import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from transformer.config import Config
from transformer.parallel.mesh import make_mesh
from transformer.parallel.rules import AXES, mesh_axes, parameter_shardings
from transformer.planning.chips import Topology
from transformer.planning.flops import formula_flops, traced_flops
from transformer.planning.program import COLLECTIVES, Collective, Program, read_program
from transformer.steps import Steps, check_devices, make_steps
from transformer.tasks import count_parameters, resolve
from transformer.types import Batch, UserError
from transformer.validation import require


class StandIn:
    """The vocabulary of a tokenizer that is not there, for no data have been read: only its size is known."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.token_bytes = np.ones(vocab_size, np.int32)


class Plan(NamedTuple):
    """What one step takes on one device, unless it says otherwise."""

    topology: str
    step: str
    """train or decode."""
    mesh: dict[str, int]
    settings: dict[str, Any]
    """Of the config, what decides most: batch, micro-batches, remat, types."""
    devices: int
    chips: float
    parameters: int
    """Of the whole model."""
    fits: bool
    argument_bytes: float
    temporary_bytes: float
    peak_bytes: float
    capacity_bytes: float
    advice: str
    """If it does not fit: by how much, and what would make it fit."""
    traced_flops: float
    """Of all devices, recomputation included."""
    formula_flops: float
    """Of all devices, the attention of causal models halved; without recomputation."""
    formula_flops_whole: float
    """The same, with every pair of places counted."""
    program_flops: float
    """Of one device's program, custom kernels left out."""
    collectives: dict[str, dict[str, float]]
    """By kind: how often, and bytes sent."""
    least_network_bytes: float
    """What a device must send at the least with this mesh: parameters and gradients over the axes that share them."""
    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    step_seconds: float
    """The largest of the three: a bound, as if they ran at the same time and without loss."""
    bottleneck: str
    mfu_bound: float
    """Of formula_flops, had the step its bound's time."""
    tokens_per_second: float
    chip_hours: float
    """Of the configured run."""
    days: float
    compile_seconds: float


def plan_training(config: Config, topology: Topology) -> Plan:
    """Compile the training step of a config for absent devices; nothing but shapes is allocated.

    Raises:
        UserError: the config leaves its vocabulary to the data, or does not fit the devices by its numbers.
    """
    model = config.model
    require(
        model.vocab_size > 0,
        "A plan reads no data: model.vocab_size must be set, got 0; for example --model.vocab-size 32000.",
    )
    require(
        config.objective.kind == "next_token",
        f"plan knows the rows of the next_token objective, got {config.objective.kind}.",
    )
    # Kernels of CPUs are for CPUs, but a program compiled for others would carry both ways until it is lowered.
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, cpu_kernels=False))
    mesh = make_mesh(config.parallel.sizes, topology.devices)
    check_devices(config, mesh)
    tokenizer = StandIn(model.vocab_size)
    steps = make_steps(resolve(config, tokenizer), tokenizer, mesh)
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens, weights = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(tokens, tokens, weights, tokens, tokens)
    with jax.set_mesh(mesh):
        traced = traced_flops(steps.train_step, steps.state, batch)
    formulas = [
        formula_flops(config, steps.state.params, rows=shape[0], length=shape[1], causal_half=half)
        for half in (True, False)
    ]
    settings = {
        "batch_size": shape[0],
        "sequence_length": shape[1],
        "accumulate_steps": config.optimizer.accumulate_steps,
        "remat": model.remat,
        "loss_chunks": config.objective.loss_chunks,
        "dtype": model.dtype,
    }
    tokens_a_step, least = math.prod(shape), least_network_bytes(config, steps, dict(mesh.shape))
    lowered = functools.partial(steps.runner.lower, steps.state, batch)
    return _compile(
        "train",
        config,
        topology,
        dict(mesh.shape),
        settings,
        steps.state.params,
        lowered,
        traced,
        formulas,
        tokens_a_step,
        least,
    )


def plan_decoding(config: Config, topology: Topology, *, rows: int, capacity: int) -> Plan:
    """Compile a step of decoding, one token for each of `rows` caches of `capacity` tokens, as `plan_training` does."""
    require(config.model.vocab_size > 0, "A plan reads no data: model.vocab_size must be set, got 0.")
    require(config.model.architecture == "decoder", f"plan decodes a decoder, got a {config.model.architecture}.")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="none", max_length=max(capacity, config.model.max_length)),
        training=dataclasses.replace(config.training, cpu_kernels=False),
    )
    mesh = make_mesh(config.parallel.sizes, topology.devices)
    tokenizer = StandIn(config.model.vocab_size)
    steps = make_steps(resolve(config, tokenizer), tokenizer, mesh)
    dtype = jnp.dtype(config.model.dtype)
    shardings = parameter_shardings(mesh, steps.axes, steps.state.params)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding), steps.state.params, shardings
    )
    model: Any = steps.model
    cache = jax.eval_shape(lambda: model.init_cache(rows, capacity))

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        # Keys and values are [B, G, P, K], lengths [B]; a scanned stack has a leading axis of periods.
        scanned = (None,) * config.model.scan_layers
        own = {4: ("batch", "kv_heads", None, None), 1: ("batch",)}.get(x.ndim - len(scanned))
        axes = mesh_axes((*scanned, *own), mesh.axis_names) if own else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes))

    cache = jax.tree.map(placed, cache)
    token = jax.ShapeDtypeStruct((rows, 1), jnp.int32)

    def step(params: Any, token_B1: Any, cache: Any) -> Any:
        logits_B1V, cache = model.apply({"params": params}, token_B1, cache=cache)
        return jnp.argmax(logits_B1V, axis=-1), cache

    def lower() -> Any:
        with jax.set_mesh(mesh):
            return jax.jit(step, donate_argnums=2).lower(params, token, cache)

    with jax.set_mesh(mesh):
        traced = traced_flops(step, params, token, cache)
    formula = formula_flops(config, params, rows=rows, length=1, causal_half=False) / 3
    settings = {"rows": rows, "capacity": capacity, "dtype": config.model.dtype}
    return _compile(
        "decode", config, topology, dict(mesh.shape), settings, params, lower, traced, [formula, formula], rows, 0.0
    )


def _compile(
    step: str,
    config: Config,
    topology: Topology,
    mesh: dict[str, int],
    settings: dict[str, Any],
    params: Any,
    lower: Any,
    traced: float,
    formulas: list[float],
    tokens: int,
    least: float,
) -> Plan:
    chip, devices = topology.chip, len(topology.devices)
    start = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used, capacity = _memory_error(str(error))
        memory, program = (0.0, max(0.0, used), used, capacity), Program([], 0.0, 0.0, {})
    else:
        stats = compiled.memory_analysis()
        arguments = float(stats.argument_size_in_bytes)
        # Results take the place of donated arguments; what is not donated needs its own.
        fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
        peak = arguments + stats.temp_size_in_bytes + fresh
        memory = (arguments, float(stats.temp_size_in_bytes), float(peak), chip.memory_bytes or math.inf)
        program = read_program(compiled.as_text())
    arguments, temporaries, peak, capacity = memory
    fits = peak <= capacity
    compute = max(traced / devices, program.flops) / chip.peak_flops if chip.peak_flops else 0.0
    times = {
        "compute": compute,
        "memory": program.traffic_bytes / chip.memory_bandwidth if chip.memory_bandwidth else 0.0,
        "network": sum(_seconds(c, topology, mesh) for c in program.collectives),
    }
    seconds = max(times.values())
    bottleneck = max(times, key=lambda name: times[name])
    steps = config.training.steps if step == "train" else 1
    return Plan(
        topology=topology.name,
        step=step,
        mesh={axis: size for axis, size in mesh.items() if size > 1},
        settings=settings,
        devices=devices,
        chips=topology.chips,
        parameters=count_parameters(params),
        fits=fits,
        argument_bytes=arguments,
        temporary_bytes=temporaries,
        peak_bytes=peak,
        capacity_bytes=capacity,
        advice="" if fits else _advice(config, peak - capacity, step),
        traced_flops=traced,
        formula_flops=formulas[0],
        formula_flops_whole=formulas[1],
        program_flops=program.flops,
        collectives=_by_kind(program.collectives),
        least_network_bytes=least,
        compute_seconds=times["compute"],
        memory_seconds=times["memory"],
        network_seconds=times["network"],
        step_seconds=seconds,
        bottleneck=bottleneck,
        mfu_bound=formulas[0] / devices / chip.peak_flops / seconds if seconds and chip.peak_flops else 0.0,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        chip_hours=seconds * steps * topology.chips / 3600,
        days=seconds * steps / 86_400,
        compile_seconds=time.perf_counter() - start,
    )


def least_network_bytes(config: Config, steps: Steps, mesh: dict[str, int]) -> float:
    """What a device must send in a step, whatever the compiler does, for the axes that share the state and the batch.

    Parameters that are spread over an axis with rows of its own are gathered for the forward and, rematerialised or not, for
    the backward pass, in the model's type, and their gradients summed and dealt out once; those that are whole have
    their gradients summed. A ring needs (n - 1) / n of the bytes for each, and twice that for a sum that all need.
    """
    itemsize = jnp.dtype(config.model.dtype).itemsize
    total = 0.0
    shapes = jax.tree_util.tree_leaves(steps.state.params)
    rows = [axis for axis in ("dcn", "data", "fsdp", "expert") if mesh[axis] > 1]
    for x in shapes:
        spread = {axis for axes in x.sharding.spec for axis in ((axes,) if isinstance(axes, str) else axes or ())}
        whole = math.prod(x.shape) * itemsize / math.prod(mesh[axis] for axis in spread - set(rows))
        for axis in rows:
            share = (mesh[axis] - 1) / mesh[axis]
            total += (3 if axis in spread else 2) * share * whole
            whole /= mesh[axis] if axis in spread else 1
    return total * config.optimizer.accumulate_steps if mesh["fsdp"] > 1 else total


def _by_kind(collectives: list[Collective]) -> dict[str, dict[str, float]]:
    found = {kind: [c for c in collectives if c.kind == kind] for kind in COLLECTIVES}
    return {
        kind: {"count": sum(c.count for c in items), "bytes": sum(c.wire_bytes for c in items)}
        for kind, items in found.items()
        if items
    }


def _seconds(collective: Collective, topology: Topology, mesh: dict[str, int]) -> float:
    """Time on the wires: both directions of as many rings of the torus as the group's devices span, or one switch."""
    chip = topology.chip
    if chip.link_bandwidth == 0:
        return 0.0
    slice_size = math.prod(mesh[axis] for axis in AXES if axis != "dcn")
    if collective.devices and len({device // slice_size for device in collective.devices}) > 1:
        return collective.wire_bytes / chip.network_bandwidth
    if chip.torus_dims == 0:
        return collective.wire_bytes / chip.link_bandwidth
    side = max(2, round(len(topology.devices) ** (1 / chip.torus_dims)))
    spanned = min(chip.torus_dims, max(1, math.ceil(math.log(max(collective.group, 2), side) - 1e-6)))
    directions = 1 if collective.kind == "collective-permute" else 2
    return collective.wire_bytes / (chip.link_bandwidth * directions * spanned)


def _memory_error(message: str) -> tuple[float, float]:
    """Bytes used and there, from what the compiler says when a program does not fit; any other failure is raised again."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", message)
    if found is None:
        raise UserError(f"The step does not compile for these devices: {message.splitlines()[0]}")
    return float(found.group(1)) * units[found.group(2)], float(found.group(3)) * units[found.group(4)]


def _advice(config: Config, missing: float, step: str) -> str:
    levers = []
    if step == "train":
        accumulate = config.optimizer.accumulate_steps
        levers += [] if config.model.remat == "full" else ["model.remat=full"]
        levers += [] if config.model.scan_layers else ["model.scan_layers=True"]
        levers += [f"optimizer.accumulate_steps={2 * accumulate}"]
        levers += [] if config.objective.loss_chunks > 1 else ["objective.loss_chunks=8"]
        levers += [] if config.model.dtype != "float32" else ["model.dtype=bfloat16"]
    levers += ["parallel.fsdp or tensor over more devices"]
    return f"Too much by {missing / 1e9:.2f} GB a device. What takes less: {', '.join(levers)}."
