"""The training and evaluation step as pure functions: keys, micro-batches, gradient, update, moving average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transformer.training.loss_scale import keep_if_finite
from transformer.training.spikes import skip_spike, updates_done
from transformer.training.state import TrainState
from transformer.types import Array, Loss, PyTree, Statistics

TrainStep = Callable[[TrainState, Any], tuple[TrainState, Statistics]]
EvaluateStep = Callable[[PyTree, PyTree, Any], tuple[PyTree, Statistics]]

PER_STEP = ("grad_norm", "learning_rate", "loss_scale", "skipped_steps", "skipped_spikes")
"""Statistics that do not add: they describe one step."""


def make_train_step(
    objective: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    *,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    skip_spikes: float = 0.0,
    axis_name: str | None = None,
) -> TrainStep:
    """One optimizer step, `(state, batch) -> (state, statistics)`, to be compiled by a runner of `parallel`.

    The gradient is of `loss_sum / weight`, where the weight is that of the whole batch, over micro-batches and
    devices, so that a step does not depend on how its rows are dealt out.

    Args:
        objective: what is minimised.
        optimizer: turns gradients into updates.
        schedule: learning rate by step, reported only (the optimizer has its own); None leaves it out.
        accumulate_steps: micro-batches; the number of rows must be a multiple of it. Row r is in micro-batch
            r % accumulate_steps, which keeps every row on the device that has it.
        ema_decay: decay of the moving average in `state.ema_params`, lower in the first steps; 0 means off.
        skip_spikes: `training.skip_spikes`, for a state with `spikes`.
        axis_name: the axis to sum over when each device runs the step on its own rows (`pmap`).

    Returns:
        The step. Its statistics are the objective's and `objective`, `loss` and `weight`, all sums over the batch,
        and the norm of the gradient before clipping and the learning rate, which are of this step and do not add.
        A state with a `loss_scale` has its scale and the number of skipped steps among them, one with `spikes`
        that of skipped spikes.
    """

    def total(tree: PyTree) -> PyTree:
        return jax.lax.psum(tree, axis_name) if axis_name else tree

    def gradient(params: PyTree, carry: PyTree, batch: Any, key: Array, weight: Array) -> tuple:
        def mean_loss(params: PyTree) -> tuple[Array, tuple[PyTree, Statistics]]:
            (loss_sum, weight_sum), (new_carry, statistics) = objective.loss(params, carry, batch, key, True)
            statistics = {"objective": loss_sum, "loss": loss_sum, "weight": weight_sum, **statistics}
            return loss_sum / weight, (new_carry, statistics)

        grads, (new_carry, statistics) = jax.grad(mean_loss, has_aux=True)(params)
        return grads, new_carry, statistics

    def accumulated_gradient(params: PyTree, carry: PyTree, batch: Any, key: Array, weight: Array) -> tuple:
        def add_micro_batch(sums: tuple, xs: tuple) -> tuple[tuple, PyTree]:
            index, micro_carry, micro_batch = xs
            grads, new_carry, statistics = gradient(
                params, micro_carry, micro_batch, jax.random.fold_in(key, index), weight
            )
            return jax.tree.map(jnp.add, sums, (grads, statistics)), new_carry

        indices = jnp.arange(accumulate_steps)
        xs = (indices, *_split_rows((carry, batch), accumulate_steps))
        first = jax.tree.map(lambda x: x[0], xs)
        shapes = jax.eval_shape(lambda xs: gradient(params, xs[1], xs[2], key, weight), first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[2]))
        (grads, statistics), new_carry = jax.lax.scan(add_micro_batch, zeros, xs)
        return grads, _merge_rows(new_carry), statistics

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Statistics]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        weight = total(objective.weight(batch))
        # A batch of nothing but padding has gradient 0, not 0 / 0.
        weight = jnp.where(weight > 0, weight, jnp.ones_like(weight))
        updates, scaling = updates_done(state), state.loss_scale
        if scaling:
            # Of the loss times the scale, which the gradient is then divided by.
            weight = weight / scaling.scale
        compute = gradient if accumulate_steps == 1 else accumulated_gradient
        grads, carry, statistics = compute(state.params, state.carry, batch, key, weight)
        grads, statistics = total((grads, statistics))
        if scaling:
            grads = jax.tree.map(lambda g: (g / scaling.scale).astype(g.dtype), grads)

        with jax.named_scope("optimizer"):
            changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, changes)
        with jax.named_scope("average"):
            ema_params = update_ema(state.ema_params, params, updates, ema_decay) if ema_decay > 0 else state.ema_params
        statistics["grad_norm"] = optax.tree.norm(grads)
        if schedule is not None:
            statistics["learning_rate"] = jnp.asarray(schedule(updates), jnp.float32)
        new_state = TrainState(state.step + 1, params, opt_state, carry, state.key, ema_params, scaling, state.spikes)
        if state.spikes:
            new_state, statistics = skip_spike(state, new_state, statistics, skip_spikes)
        return keep_if_finite(state, new_state, statistics) if scaling else (new_state, statistics)

    return step


def make_eval_step(objective: Loss, *, axis_name: str | None = None) -> EvaluateStep:
    """`(params, carry, batch) -> (carry, statistics)`: the objective's sums over a batch, without dropout."""

    def step(params: PyTree, carry: PyTree, batch: Any) -> tuple[PyTree, Statistics]:
        (loss_sum, weight_sum), (carry, statistics) = objective.loss(params, carry, batch, jax.random.key(0), False)
        statistics = {"objective": loss_sum, "loss": loss_sum, "weight": weight_sum, **statistics}
        return carry, jax.lax.psum(statistics, axis_name) if axis_name else statistics

    return step


def update_ema(ema_params: PyTree, params: PyTree, step: Array, decay: float) -> PyTree:
    """`decay * average + (1 - decay) * params`, with a decay of at most (1 + step) / (10 + step).

    The bound, usual in image models, lets the average forget the initial parameters within a short run.
    """
    count = step.astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda a, p: a + ((1.0 - decay_now) * (p - a)).astype(a.dtype), ema_params, params)


def _split_rows(tree: PyTree, parts: int) -> PyTree:
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), tree)


def _merge_rows(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)
