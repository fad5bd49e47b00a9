"""Search over meshes, rematerialisation and micro-batches for a topology: pruned by arithmetic, then compiled and ranked."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from transformer.config import Config
from transformer.model_config import ModelConfig
from transformer.objective import Objective
from transformer.parts import Parts, StandIn, count_parameters, initialize
from transformer.planning.chips import Topology
from transformer.planning.plan import CLASSES, Plan, plan_training, resolve_size
from transformer.training.out_of_memory import activation_bytes, output_bytes, row_shards
from transformer.types import UserError
from transformer.validation import require

REMATS = ("none", "dots", "full")


class Candidate(NamedTuple):
    """One choice, and its estimates by arithmetic."""

    config: Config
    bytes: float
    """Bytes of state and stored activations on a device."""
    seconds: float
    """Seconds per step: the longer of computing and sending."""


def search(
    config: Config, topology: Topology, *, compiled: int = 12, report: Callable[[str], object] = lambda _: None
) -> list[tuple[Config, Plan]]:
    """The best ways to train a config on absent devices: plans that fit come first, faster ones before slower ones.

    Args:
        config: of the run; its mesh (all axes except `dcn`), remat and micro-batches are replaced.
        topology: the devices.
        compiled: number of candidates to compile: the best by arithmetic, equally many for each `remat`. If none of them fits,
            the same number with the smallest memory follows.
        report: called with one line per candidate.

    Raises:
        UserError: no choice divides rows, heads and widths.
    """
    found = candidates(config, topology)
    require(
        bool(found),
        f"No mesh of {len(topology.devices)} devices divides the {config.data.batch_size} rows of a batch, the "
        "heads and the widths of the model; change data.batch_size.",
    )
    ranked = sorted(found, key=lambda c: c.seconds)
    within = [c for c in ranked if c.bytes <= topology.chip.memory_bytes]
    share = -(-compiled // len(REMATS))
    chosen = [c for remat in REMATS for c in [c for c in within if c.config.model.remat == remat][:share]]
    spare = [c for c in sorted(ranked, key=lambda c: c.bytes) if c not in chosen]
    plans: list[tuple[Config, Plan]] = []
    for number, candidate in enumerate([*chosen, *spare[:compiled]], 1):
        if number > len(chosen) and any(plan.fits for _, plan in plans):
            break
        try:
            plan = plan_training(candidate.config, topology)
        except UserError as error:
            report(f"{number}: refused, {error}")
            continue
        report(f"{number}: {plan.mesh} {plan.settings['remat']}, {'fits' if plan.fits else 'does not fit'}")
        plans.append((candidate.config, plan))
    return sorted(plans, key=lambda pair: (not pair[1].fits, pair[1].step_seconds))


def candidates(config: Config, topology: Topology) -> list[Candidate]:
    """All choices that divide rows, heads and widths, with estimates."""
    found = []
    resolved = resolve_size(config)
    flops = (
        Parts(resolved, StandIn(resolved.model.vocab_size), class_names=CLASSES)
        .count_step(config.objective.batch_shapes(config))
        .total
    )
    for parallel, remat, accumulate in itertools.product(
        _meshes(config, len(topology.devices)), REMATS, _micro_batches(config)
    ):
        chosen = dataclasses.replace(config.parallel, **parallel)
        if config.data.batch_size % (accumulate * row_shards(chosen)) != 0:
            continue
        changed = dataclasses.replace(
            config,
            parallel=chosen,
            model=dataclasses.replace(config.model, remat=remat),
            optimizer=dataclasses.replace(config.optimizer, accumulate_steps=accumulate),
        )
        found.append(estimate(changed, topology, flops))
    return found


def _meshes(config: Config, devices: int) -> Iterator[dict[str, int]]:
    model, devices = config.model, devices // max(config.parallel.dcn, 1)
    powers = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
    experts = {block.feed_forward.num_experts for block in model.block_counts} - {0}
    dense = all(block.attention.pattern.sees_all for block in model.block_counts) and model.memory_length == 0
    for fsdp, tensor, context, expert in itertools.product(powers, powers, powers, powers):
        shared = fsdp * tensor * context * expert
        if devices % shared != 0 or tensor > 16 or context > 16:
            continue
        heads = all(block.attention.kv_heads % tensor == 0 for block in model.block_counts)
        divides = model.embed_dim % fsdp == 0 and model.vocab_size % tensor == 0
        places = context == 1 or (dense and config.data.sequence_length % (2 * context) == 0)
        held = expert == 1 or (len(experts) > 0 and all(number % expert == 0 for number in experts))
        if heads and divides and places and held:
            yield {"data": devices // shared, "fsdp": fsdp, "tensor": tensor, "context": context, "expert": expert}


def _micro_batches(config: Config) -> list[int]:
    return sorted({n for n in (1, 2, 4, 8, 16, config.optimizer.accumulate_steps) if config.data.batch_size % n == 0})


def estimate(config: Config, topology: Topology, flops: float) -> Candidate:
    """Memory and time of a step by arithmetic alone.

    State: parameters, their gradients and the optimizer's moments, over the axes that share them. Activations: the results that
    blocks store (`kept_widths`). Output layer: its logits and their gradient, its gathered matrix and the gradient of that.
    Time: the step's operations (`flops`) at peak speed, and the communication of parameters. Tensor parallelism adds four
    transfers of the residual stream per block.
    """
    parallel, model, chip = config.parallel, config.model, topology.chip
    devices, accumulate = len(topology.devices), config.optimizer.accumulate_steps
    shapes = _shapes(config.objective, dataclasses.replace(model, remat="none"))
    number, itemsize = count_parameters(shapes), jnp.dtype(model.dtype).itemsize
    state = number * 4 * (2 + 2) / (parallel.fsdp * parallel.tensor * parallel.expert)
    rows = config.data.batch_size / accumulate / row_shards(parallel)
    places = config.data.sequence_length / parallel.context
    activations, logits = activation_bytes(config), output_bytes(config)
    compute = flops * {"none": 1, "dots": 1.05, "full": 4 / 3}[model.remat] / devices / chip.peak_flops
    links = chip.link_bandwidth * 2 * max(1, chip.torus_dims)
    whole = number * itemsize / (parallel.tensor * parallel.expert)
    gathered = 3 * whole * accumulate * (1 - 1 / parallel.fsdp) + 2 * whole / parallel.fsdp * (1 - 1 / parallel.data)
    stream = rows * places * model.embed_dim * itemsize * accumulate * model.num_layers
    exchanged = 4 * 2 * stream * (1 - 1 / parallel.tensor)
    around = (
        4 * stream * (parallel.context - 1) * model.blocks[0].attention.kv_heads / model.blocks[0].attention.num_heads
    )
    network = (gathered + exchanged + around) / links if links else 0.0
    return Candidate(config, state + activations + logits, max(compute, network) + 0.1 * min(compute, network))


@functools.cache
def _shapes(objective: Objective, model: ModelConfig) -> Any:
    return initialize(objective, objective.make_model(model, class_names=CLASSES), None)[0]
