"""A step compiled for absent devices, and the estimates from it: memory, operations, communication, time, cost."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer.config import Config
from transformer.memory import check_model, device_bytes
from transformer.parallel.mesh import make_mesh, num_row_shards
from transformer.parallel.rules import RULES, axes_in, parameter_shardings
from transformer.parts import StandIn, Steps, check_devices, count_parameters, resolve
from transformer.planning.chips import NODE_DEVICES, Topology
from transformer.planning.program import COLLECTIVES, Collective, Program, read_program
from transformer.training.flops import Flops, count_flops, traced_flops
from transformer.types import UserError
from transformer.validation import require

CLASSES = ("no", "yes")
"""Classes of a classifier whose data is not read; the number has little effect."""


class Plan(NamedTuple):
    """Estimates for one step on one device, unless stated otherwise."""

    topology: str
    step: str
    """train or decode."""
    mesh: dict[str, int]
    settings: dict[str, Any]
    """The config fields with the largest effect: batch, micro-batches, remat, types."""
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
    """If it does not fit: the missing bytes, and remedies."""
    traced_flops: float
    """Of all devices, recomputation included; attention by formula, without the pairs of positions that masks hide."""
    formula_flops: float
    """Of all devices, without recomputation, and with only the visible pairs in attention: the basis of training's MFU."""
    formula_flops_whole: float
    """The same, with every pair of positions counted."""
    program_flops: float
    """In one device's program, without custom kernels."""
    collectives: dict[str, dict[str, float]]
    """By kind: number of calls, and bytes sent."""
    least_network_bytes: float
    """Lower bound on the bytes that a device sends with this mesh: parameters and gradients over the axes that share them."""
    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    step_seconds: float
    """The largest of the three: a lower bound, as if all three overlapped perfectly."""
    bottleneck: str
    mfu_bound: float
    """Of formula_flops, if the step took exactly the bound's time."""
    tokens_per_second: float
    chip_hours: float
    """Of the configured run."""
    days: float
    compile_seconds: float


class _Work(NamedTuple):
    """The program to compile, and the quantities known before."""

    step: str
    config: Config
    topology: Topology
    mesh: Mesh
    settings: dict[str, Any]
    params: Any
    operands: Any
    """Shapes with shardings of the step's arguments."""
    lower: Callable[[], Any]
    traced: float
    flops: Flops
    tokens: int
    least: float


def plan_training(config: Config, topology: Topology) -> Plan:
    """Compile the training step of a config for absent devices; only shapes are allocated.

    Raises:
        UserError: the config does not set the vocabulary size, or its sizes do not fit the devices.
    """
    model, batch = config.model, config.objective.batch_shapes(config)
    rows, length = batch.inputs.shape
    mesh, steps = _make_steps(config, topology)
    check_devices(config, mesh)
    with jax.set_mesh(mesh):
        traced = traced_flops(steps.train_step, steps.state, batch)
    flops = steps.parts.count_step(batch)
    # The count has two products of attention forward and four backward. A fused kernel has five in its backward pass, because it
    # recomputes the logits, and two more if the layer is rematerialised.
    kernel = flops.attention / 6 * (7 + (0 if model.remat == "none" else 2))
    return _compile(
        _Work(
            step="train",
            config=config,
            topology=topology,
            mesh=mesh,
            settings={
                "batch_size": rows,
                "sequence_length": length,
                "accumulate_steps": config.optimizer.accumulate_steps,
                "remat": model.remat,
                "loss_chunks": config.objective.loss_chunks,
                "dtype": model.dtype,
            },
            params=steps.state.model_params,
            operands=steps.state,
            lower=functools.partial(steps.runner.lower, steps.state, batch),
            traced=traced + kernel,
            flops=flops,
            tokens=rows * length,
            least=least_network_bytes(config, steps, dict(mesh.shape)),
        )
    )


def plan_decoding(config: Config, topology: Topology, *, rows: int, capacity: int) -> Plan:
    """Compile a step of decoding, one token for each of `rows` caches of `capacity` tokens, as `plan_training` does."""
    require(
        config.objective.continues_text,
        f"plan decodes a model that continues texts, got the {config.objective.kind} objective.",
    )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="none", max_length=max(capacity, config.model.max_length)),
    )
    mesh, steps = _make_steps(config, topology)
    shards = num_row_shards(mesh)
    require(
        rows % shards == 0,
        f"The rows of --decode must be a multiple of the {shards} devices that share them, got {rows}; change them, or the "
        "axes of parallel.",
    )
    dtype = jnp.dtype(config.model.dtype)
    shardings = parameter_shardings(mesh, steps.parts.axes, steps.state.model_params)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding),
        steps.state.model_params,
        shardings,
    )
    model: Any = steps.parts.model
    cache = _place_cache(jax.eval_shape(lambda: model.init_cache(rows, capacity)), config.model.scan_layers, mesh)
    token = jax.ShapeDtypeStruct((rows, 1), jnp.int32)

    def step(params: Any, token_B1: Any, cache: Any) -> Any:
        logits_B1V, cache = model.apply({"params": params}, token_B1, cache=cache)
        return jnp.argmax(logits_B1V, axis=-1), cache

    def lower() -> Any:
        with jax.set_mesh(mesh):
            return jax.jit(step, donate_argnums=2).lower(params, token, cache)

    with jax.set_mesh(mesh):
        traced = traced_flops(step, params, token, cache)
    flops = count_flops(lambda _, *arguments: step(*arguments), (), params, token, cache)
    return _compile(
        _Work(
            step="decode",
            config=config,
            topology=topology,
            mesh=mesh,
            settings={"rows": rows, "capacity": capacity, "dtype": config.model.dtype},
            params=params,
            operands=(params, cache),
            lower=lower,
            traced=traced + flops.attention,
            flops=flops,
            tokens=rows,
            least=0.0,
        )
    )


def _place_cache(cache: Any, scanned: bool, mesh: Mesh) -> Any:
    """The shapes of a model's cache, with their shardings."""

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        # Keys and values are [B, G, P, K], lengths [B]; a scanned stack has a leading axis of periods.
        leading = (None,) * scanned
        own = {4: ("batch", "kv_heads", None, None), 1: ("batch",)}.get(x.ndim - len(leading))
        axes = RULES.spec((*leading, *own), mesh.axis_names) if own else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes))

    return jax.tree.map(placed, cache)


def resolve_size(config: Config) -> Config:
    """`parts.resolve` without a tokenizer, for a config that sets the size of its vocabulary."""
    require(
        config.model.vocab_size > 0,
        "A plan reads no data: model.vocab_size must be set, got 0; for example --model.vocab-size 32000.",
    )
    return resolve(config, StandIn(config.model.vocab_size))


def _make_steps(config: Config, topology: Topology) -> tuple[Mesh, Steps]:
    config = resolve_size(config)
    require(
        config.parallel.shares_state,
        f"plan compiles for a mesh, got parallel.strategy={config.parallel.strategy}; set it to mesh.",
    )
    check_model(config.model, config.objective.num_stacks)
    mesh = make_mesh(config.parallel.sizes, topology.devices)
    return mesh, Steps(config, StandIn(config.model.vocab_size), mesh, class_names=CLASSES)


def _compile(work: _Work) -> Plan:
    chip, devices, step = work.topology.chip, len(work.topology.devices), work.step
    start = time.perf_counter()
    try:
        compiled = work.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        peak, capacity = _memory_error(str(error))
        arguments = min(peak, device_bytes(work.operands))
        program = Program([], 0.0, 0.0, {}, 0.0)
        fits = False
    else:
        stats = compiled.memory_analysis()
        arguments, capacity = float(stats.argument_size_in_bytes), chip.memory_bytes
        # Results reuse the memory of donated arguments; other results need their own.
        fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
        peak = arguments + stats.temp_size_in_bytes + fresh
        program = read_program(compiled.as_text())
        fits = peak <= capacity
    order = list(work.mesh.devices.flat)
    times = {
        "compute": max(work.traced / devices, program.flops) / chip.peak_flops,
        "memory": program.traffic_bytes / chip.memory_bandwidth,
        "network": sum(_seconds(c, work.topology, order, work.mesh.shape["dcn"]) for c in program.collectives),
    }
    seconds = max(times.values())
    steps = work.config.training.steps if step == "train" else 1
    return Plan(
        topology=work.topology.name,
        step=step,
        mesh={axis: size for axis, size in work.mesh.shape.items() if size > 1},
        settings=work.settings,
        devices=devices,
        chips=work.topology.chips,
        parameters=count_parameters(work.params),
        fits=fits,
        argument_bytes=arguments,
        temporary_bytes=peak - arguments,
        peak_bytes=peak,
        capacity_bytes=capacity,
        advice="" if fits else _advice(work, peak - capacity, arguments > capacity),
        traced_flops=work.traced,
        formula_flops=work.flops.total,
        formula_flops_whole=work.flops.products + work.flops.attention_whole,
        program_flops=program.flops,
        collectives=_by_kind(program.collectives),
        least_network_bytes=work.least,
        compute_seconds=times["compute"],
        memory_seconds=times["memory"],
        network_seconds=times["network"],
        step_seconds=seconds,
        bottleneck=max(times, key=lambda name: times[name]),
        mfu_bound=work.flops.total / devices / chip.peak_flops / seconds,
        tokens_per_second=work.tokens / seconds,
        chip_hours=seconds * steps * work.topology.chips / 3600,
        days=seconds * steps / 86_400,
        compile_seconds=time.perf_counter() - start,
    )


def least_network_bytes(config: Config, steps: Steps, mesh: Mapping[str, int]) -> float:
    """Lower bound on the bytes that a device sends in a step, for the axes that share the state and the batch.

    Parameters sharded over an axis with its own rows are all-gathered in the model's type, for the forward and for the backward
    pass. Their gradients are reduce-scattered once per micro-batch. The resulting shards are all-reduced over the other axes with
    rows. A ring sends (n - 1) / n of the bytes for each of these, and twice that for an all-reduce. Experts are not moved: rows
    are sent to them.
    """
    itemsize = jnp.dtype(config.model.dtype).itemsize
    total = 0.0
    rows = [axis for axis in ("dcn", "data", "fsdp", "expert") if mesh[axis] > 1]
    for x in jax.tree_util.tree_leaves(steps.state.params):
        spread = {axis for entry in x.sharding.spec for axis in axes_in(entry)}
        part = math.prod(x.shape) * itemsize / math.prod(mesh[axis] for axis in spread if axis != "fsdp")
        gathered = mesh["fsdp"] if "fsdp" in spread else 1
        total += 3 * config.optimizer.accumulate_steps * part * (gathered - 1) / gathered
        for axis in rows:
            if axis not in spread:
                total += 2 * part / gathered * (mesh[axis] - 1) / mesh[axis]
    return total


def _by_kind(collectives: list[Collective]) -> dict[str, dict[str, float]]:
    found = {kind: [c for c in collectives if c.kind == kind] for kind in COLLECTIVES}
    return {
        kind: {"count": sum(c.runs for c in items), "bytes": sum(c.wire_bytes for c in items)}
        for kind, items in found.items()
        if items
    }


def _seconds(collective: Collective, topology: Topology, order: list[Any], num_slices: int) -> float:
    """Communication time: over the links of the torus dimensions that the group spans, a switch, or the inter-slice network."""
    chip, numbers = topology.chip, collective.devices or range(len(order))
    island = NODE_DEVICES if chip.torus_dims == 0 else len(order) // num_slices
    if collective.exchange.through_hosts or len({number // island for number in numbers}) > 1:
        return collective.wire_bytes / chip.network_bandwidth
    if chip.torus_dims == 0:
        return collective.wire_bytes / chip.link_bandwidth
    links = 1
    if collective.exchange.passes:
        links = max(1, _links([order[n].coords for n in numbers], [d.coords for d in order], chip.torus_dims))
    return collective.wire_bytes / (chip.link_bandwidth * links)


def _links(group: list[Any], everything: list[Any], torus_dims: int) -> int:
    """Number of links by which a corner of a group's box sends: two along a side that is a closed ring, one along others.

    A v5e or v6e closes rings of 16 chips. A v4, v5p or 7x closes rings in shapes made of whole cubes of 4.
    """
    sides = [len({coords[axis] for coords in everything}) for axis in range(torus_dims)]
    cubes = torus_dims == 3 and all(side % 4 == 0 for side in sides)
    spans = [len({coords[axis] for coords in group}) for axis in range(torus_dims)]
    closed = [span == side and (cubes or side == 16) for span, side in zip(spans, sides, strict=True)]
    return sum(2 if closed[axis] else 1 for axis, span in enumerate(spans) if span > 1)


def _memory_error(message: str) -> tuple[float, float]:
    """Used and available bytes, from the compiler's message that a program does not fit; any other error is raised again."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    size = r"([\d.]+)([KMGT])"
    found = re.search(rf"Used {size} of {size}", message) or re.search(
        rf"\({size}\) exceeds available HBM \({size}\)", message
    )
    if found is None:
        raise UserError(f"The step does not compile for these devices: {message.splitlines()[0]}")
    return float(found.group(1)) * units[found.group(2)], float(found.group(3)) * units[found.group(4)]


def _advice(work: _Work, missing: float, state_too_large: bool) -> str:
    config, levers = work.config, []
    if work.step == "train" and not state_too_large:
        accumulate = 2 * config.optimizer.accumulate_steps
        halves = config.data.batch_size % (accumulate * num_row_shards(work.mesh)) == 0
        levers += [] if config.model.remat == "full" else ["model.remat=full"]
        levers += [] if config.model.scan_layers else ["model.scan_layers=True"]
        levers += [f"optimizer.accumulate_steps={accumulate}"] if halves else []
        levers += [] if config.objective.loss_chunks > 1 else ["objective.loss_chunks=8"]
        levers += [] if config.model.dtype != "float32" else ["model.dtype=bfloat16"]
    levers += ["parallel.fsdp or tensor over more devices"]
    what = "The state alone is too much" if state_too_large else "Too much"
    return f"{what}, by {missing / 1e9:.2f} GB a device in all. What takes less: {', '.join(levers)}."
