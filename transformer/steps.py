"""The steps of a config, made without any data: model, objective, optimizer, and the runner that compiles and spreads them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from transformer.config import Config
from transformer.data.tokenizers import Vocabulary
from transformer.ops.ids import check_batch_ids
from transformer.ops.places import balanced_order
from transformer.ops.ring import check_blocks
from transformer.parallel.mesh import make_mesh, mesh_runner, num_row_shards
from transformer.parallel.pmap import AXIS_NAME, check_memory, pmap_runner
from transformer.parallel.runner import Runner, check_divisible, choose_devices
from transformer.tasks import initialize, training_runtime
from transformer.training.loss_scale import make_loss_scale
from transformer.training.optimizer import check_scanned_groups, freeze, make_optimizer
from transformer.training.spikes import make_spikes
from transformer.training.state import TrainState, create_state
from transformer.training.step import TrainStep, make_eval_step, make_train_step
from transformer.types import Loss, PyTree
from transformer.validation import require


class Steps(NamedTuple):
    """What trains a config, on the devices that it names."""

    model: nn.Module
    loss: Loss
    runner: Runner
    train_step: TrainStep
    """The step that the runner compiles."""
    axes: PyTree
    """Logical names of the parameters' axes."""
    state: TrainState
    """Shapes before the first step, with the shardings of what a checkpoint is restored to."""
    make_state: Callable[..., TrainState]
    """`make_state([params])`, a function of arrays: the state before the first step, of a config's or given parameters."""

    def init_state(self, *params: PyTree) -> TrainState:
        """The state before the first step, on the devices; no device ever holds more than its part."""
        return self.runner.init_state(self.make_state, *params)


def check_devices(config: Config, mesh: Mesh | None = None) -> None:
    """Raise UserError unless devices, batch and model fit each other, as far as a config says; before any data is read."""
    parallel, data, model = config.parallel, config.data, config.model
    if parallel.strategy == "pmap":
        shards = len(choose_devices(max(parallel.data, 0)))
        if model.memory_length > 0:
            check_memory()
    else:
        mesh = mesh or make_mesh(parallel.sizes)
        shards = num_row_shards(mesh)
        if mesh.shape["context"] > 1:
            _check_context(config, mesh.shape["context"])
    check_divisible(data.batch_size, shards, config.optimizer.accumulate_steps)


def _check_context(config: Config, devices: int) -> None:
    model = config.model
    balanced_order(config.data.sequence_length, devices)
    check_blocks(config.data.sequence_length, devices)
    patterns = {block.attention.pattern for block in model.block_counts}
    config.objective.check_context(config)
    require(
        all(pattern.sees_all for pattern in patterns),
        "parallel.context needs dense attention (a window is fine), got "
        f"attention.pattern={', '.join(sorted(pattern.kind for pattern in patterns))}; "
        "set parallel.context=1.",
    )
    require(
        model.dropout == 0 and all(block.attention.dropout == 0 for block in model.block_counts),
        "parallel.context needs model.dropout=0 and attention.dropout=0: what is dropped is drawn by place in an array, and rows "
        "are dealt out in another order; set them, or parallel.context=1.",
    )


def make_steps(
    config: Config,
    tokenizer: Vocabulary,
    mesh: Mesh | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Steps:
    """The steps of a resolved config (`tasks.resolve`); nothing is allocated on any device.

    Args:
        config: with its vocabulary and lengths known.
        tokenizer: the run's, or what its losses know of one.
        mesh: of devices, present or absent; None takes those of `config.parallel`.
        optimizer: in the place of the config's, learning rate and all.
    """
    pmap = config.parallel.strategy == "pmap"
    if mesh is None and not pmap:
        mesh = make_mesh(config.parallel.sizes)
    # The kernels for CPUs fold batch and places, which over a context axis would gather both.
    context = 1 if mesh is None else mesh.shape["context"]
    model = config.objective.make_model(config.model, training_runtime(config.training.cpu_kernels and context == 1))
    shapes, axes = initialize(config.objective, model, None)
    if config.model.scan_layers:
        check_scanned_groups(config.optimizer, shapes)
    schedule = None
    if optimizer is None:
        optimizer, schedule = make_optimizer(config.optimizer, config.training.steps, shapes)
    loss = freeze(config.objective.bind(model, tokenizer), config.optimizer, shapes)

    def make_state(params: PyTree | None = None) -> TrainState:
        key = jax.random.key(config.training.seed)
        if params is None:
            params, _ = initialize(config.objective, model, key)
        return create_state(
            params,
            optimizer,
            jax.random.key(config.training.seed + 1),
            carry=loss.init_carry(config.data.batch_size),
            ema=config.optimizer.ema_decay > 0,
            loss_scale=make_loss_scale(config.model),
            spikes=make_spikes(config.training.skip_spikes),
        )

    train_step, runner = make_runner(config, loss, optimizer, schedule, mesh=mesh, axes=axes)
    place = runner.place_batch
    runner = runner._replace(place_batch=lambda batch: place(check_batch_ids(config.model, batch)))
    state = runner.abstract_state(jax.eval_shape(make_state))
    return Steps(model, loss, runner, train_step, axes, state, make_state)


def make_runner(
    config: Config,
    loss: Loss,
    optimizer: Any,
    schedule: Any,
    *,
    mesh: Mesh | None = None,
    axes: PyTree | None = None,
) -> tuple[TrainStep, Runner]:
    """The step of a run, and what compiles and runs it, over a mesh or under pmap.

    Args:
        config: of the run.
        loss: what is minimised.
        optimizer: as `make_optimizer` gives it, with its schedule.
        schedule: learning rate by step; None where it is not known.
        mesh: of devices; None takes those of `config.parallel`.
        axes: the parameters' logical names; None leaves a whole copy of the state on every device.
    """
    axis_name = AXIS_NAME if config.parallel.strategy == "pmap" else None
    train_step = make_train_step(
        loss,
        optimizer,
        schedule,
        accumulate_steps=config.optimizer.accumulate_steps,
        ema_decay=config.optimizer.ema_decay,
        skip_spikes=config.training.skip_spikes,
        axis_name=axis_name,
    )
    evaluate_step = make_eval_step(loss, axis_name=axis_name)
    if axis_name:
        return train_step, pmap_runner(config.parallel.data, train_step, evaluate_step)
    mesh = mesh or make_mesh(config.parallel.sizes)
    context = mesh.shape["context"]
    row_order = functools.partial(balanced_order, devices=context) if context > 1 else None
    return train_step, mesh_runner(mesh, train_step, evaluate_step, axes, row_order)
