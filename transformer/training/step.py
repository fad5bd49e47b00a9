"""The training and evaluation step as pure functions: keys, micro-batches, gradient, update, moving average."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transformer.layers.adapters import join
from transformer.training.loss_scale import keep_if_finite
from transformer.training.spikes import skip_spike, updates_done
from transformer.training.state import TrainState
from transformer.types import Array, Loss, PyTree, Statistics

PER_STEP = ("grad_norm", "learning_rate", "loss_scale", "skipped_steps", "skipped_spikes")
"""Statistics of a single step. All other statistics are summed over steps."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """One optimizer step: a pure function `(state, batch) -> (state, statistics)`. A `parallel.Runner` compiles it.

    The step minimizes `loss_sum / weight`, where both are sums over the whole batch: all micro-batches and devices. An average
    of averages per device would depend on the assignment of rows to devices.

    The statistics are:

    * sums over the batch: `objective`, `loss`, `weight`, and the objective's own;
    * `grad_norm`, the norm of the gradient before clipping;
    * `learning_rate`, if there is a `schedule`;
    * `loss_scale` and `skipped_steps`, if the state has a loss scale (float16);
    * `skipped_spikes`, if the state has `spikes`.
    """

    objective: Loss
    """The loss to minimize."""
    optimizer: optax.GradientTransformation
    """The optimizer, with its own learning rate."""
    schedule: optax.Schedule | None
    """Learning rate by step, for the statistics only; None omits it there."""
    accumulate_steps: int = 1
    """Number of micro-batches, a divisor of the number of rows. Row r belongs to micro-batch r % accumulate_steps:
    splitting a sharded batch then moves no row to another device."""
    ema_decay: float = 0.0
    """Decay of the moving average of the parameters (`update_ema`); 0 means no average."""
    skip_spikes: float = 0.0
    """Skip a step whose gradient norm exceeds this multiple of the recent median, if the state has `spikes`."""
    axis_name: str | None = None
    """Name of the device axis under `pmap`, where each device runs the step on its own rows; None without `pmap`."""

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Statistics]:
        """Take one step on a batch."""
        key = jax.random.fold_in(state.key, state.step)
        if self.axis_name:
            key = jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))
        weight = _sum_over_devices(self.objective.weight(batch), self.axis_name)
        # A batch that is all padding has weight 0. Its gradient is 0, not 0 / 0.
        weight = jnp.where(weight > 0, weight, jnp.ones_like(weight))
        scaling = state.loss_scale
        if scaling:
            # Dividing the weight by the scale multiplies the loss by it. The gradients are divided by the scale below.
            weight = weight / scaling.scale
        compute = self._gradient if self.accumulate_steps == 1 else self._accumulated_gradient
        grads, carry, statistics = compute(state.params, state.frozen, state.carry, batch, key, weight)
        grads, statistics = _sum_over_devices((grads, statistics), self.axis_name)
        if scaling:
            grads = jax.tree.map(lambda g: (g / scaling.scale).astype(g.dtype), grads)
        return self._update(state, carry, grads, statistics)

    def _gradient(self, params: PyTree, frozen: PyTree, carry: PyTree, batch: Any, key: Array, weight: Array) -> tuple:
        """The gradient of the loss, the new carry and the statistics, of all rows at once."""

        def mean_loss(params: PyTree) -> tuple[Array, tuple[PyTree, Statistics]]:
            all_params = join(frozen, params)
            (loss_sum, weight_sum), (new_carry, own) = self.objective.loss(all_params, carry, batch, key, True)
            return loss_sum / weight, (new_carry, _batch_statistics(loss_sum, weight_sum, own))

        grads, (new_carry, statistics) = jax.grad(mean_loss, has_aux=True)(params)
        return grads, new_carry, statistics

    def _accumulated_gradient(
        self, params: PyTree, frozen: PyTree, carry: PyTree, batch: Any, key: Array, weight: Array
    ) -> tuple:
        """As `_gradient`, with the gradients and statistics summed in a scan over micro-batches."""

        def add_micro_batch(sums: tuple, xs: tuple) -> tuple[tuple, PyTree]:
            index, micro_carry, micro_batch = xs
            grads, new_carry, statistics = self._gradient(
                params, frozen, micro_carry, micro_batch, jax.random.fold_in(key, index), weight
            )
            return jax.tree.map(jnp.add, sums, (grads, statistics)), new_carry

        indices = jnp.arange(self.accumulate_steps)
        xs = (indices, *_split_rows((carry, batch), self.accumulate_steps))
        first = jax.tree.map(lambda x: x[0], xs)
        shapes = jax.eval_shape(lambda xs: self._gradient(params, frozen, xs[1], xs[2], key, weight), first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[2]))
        (grads, statistics), new_carry = jax.lax.scan(add_micro_batch, zeros, xs)
        return grads, _merge_rows(new_carry), statistics

    def _update(
        self, state: TrainState, carry: PyTree, grads: PyTree, statistics: Statistics
    ) -> tuple[TrainState, Statistics]:
        """The state after an optimizer step, or after skipping it, and all statistics of the step."""
        num_updates = updates_done(state)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if self.ema_decay > 0:
            with jax.named_scope("average"):
                ema_params = update_ema(ema_params, params, num_updates, self.ema_decay)
        statistics["grad_norm"] = optax.tree.norm(grads)
        if self.schedule is not None:
            statistics["learning_rate"] = jnp.asarray(self.schedule(num_updates), jnp.float32)
        new_state = state._replace(
            step=state.step + 1, params=params, opt_state=opt_state, carry=carry, ema_params=ema_params
        )
        if state.spikes:
            new_state, statistics = skip_spike(state, new_state, statistics, self.skip_spikes)
        return keep_if_finite(state, new_state, statistics) if state.loss_scale else (new_state, statistics)


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluateStep:
    """A pure function `(params, carry, batch) -> (carry, statistics)`: the objective's sums over a batch, without dropout."""

    objective: Loss
    """The loss to evaluate."""
    axis_name: str | None = None
    """Name of the device axis under `pmap`, as in `TrainStep`."""

    def __call__(self, params: PyTree, carry: PyTree, batch: PyTree) -> tuple[PyTree, Statistics]:
        """Evaluate one batch."""
        (loss_sum, weight_sum), (carry, own) = self.objective.loss(params, carry, batch, jax.random.key(0), False)
        return carry, _sum_over_devices(_batch_statistics(loss_sum, weight_sum, own), self.axis_name)


def _batch_statistics(loss_sum: Array, weight_sum: Array, statistics: Statistics) -> Statistics:
    """The statistics of a batch. Entries of the objective replace the default ones, such as a `loss` without penalties."""
    return {"objective": loss_sum, "loss": loss_sum, "weight": weight_sum, **statistics}


def _sum_over_devices(tree: PyTree, axis_name: str | None) -> PyTree:
    """Sums over the devices of `pmap`. On a mesh (`axis_name` is None) sums already include all devices."""
    return jax.lax.psum(tree, axis_name) if axis_name else tree


def update_ema(ema_params: PyTree, params: PyTree, step: Array, decay: float) -> PyTree:
    """The moving average `d * ema_params + (1 - d) * params`, where d = min(decay, (1 + step) / (10 + step)).

    The bound on d makes the average forget the initial parameters early (`num_updates` of TensorFlow's
    `tf.train.ExponentialMovingAverage`).
    """
    count = step.astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda a, p: a + ((1.0 - decay_now) * (p - a)).astype(a.dtype), ema_params, params)


def _split_rows(tree: PyTree, parts: int) -> PyTree:
    """Arrays [rows, ...] as [parts, rows / parts, ...]; part i has the rows i, i + parts, i + 2 * parts, ..."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), tree)


def _merge_rows(tree: PyTree) -> PyTree:
    """The inverse of `_split_rows`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)
