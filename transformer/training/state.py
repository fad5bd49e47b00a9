"""The state of a run: everything that a step reads and writes, and that a checkpoint holds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer.layers.adapters import join
from transformer.types import Array, PyTree


class TrainState(NamedTuple):
    """The input and output of a training step.

    The randomness of step `t` is `fold_in(key, t)`; an exact resume needs nothing else.
    """

    step: Array  # int32 scalar, optimizer steps done
    params: PyTree  # the trained parameters: the whole model, or its adapters alone
    opt_state: PyTree
    carry: PyTree  # per-row state from step to step, such as the Transformer-XL memory; () for most objectives
    key: Array  # a PRNG key, the same in every step
    ema_params: PyTree  # moving average of the parameters; () when there is none
    loss_scale: PyTree = ()  # a `LossScale` in float16, else ()
    spikes: PyTree = ()  # a `Spikes` if spikes are skipped, else ()
    frozen: PyTree = ()  # the base model of adapters, else (); never changed, never in a checkpoint

    @property
    def model_params(self) -> PyTree:
        """All parameters of the model, with the latest values."""
        return join(self.frozen, self.params)


def create_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    carry: PyTree = (),
    ema: bool = False,
    loss_scale: PyTree = (),
    spikes: PyTree = (),
) -> TrainState:
    """The state before the first step.

    Args:
        params: initial parameters, plain arrays.
        optimizer: the optimizer of `TrainStep`.
        key: a PRNG key (`jax.random.key(seed)`), from which dropout derives.
        carry: the objective's initial carry.
        ema: whether to keep a moving average of the parameters, starting from `params`.
        loss_scale: the result of `make_loss_scale`.
        spikes: the result of `make_spikes`.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.jit(optimizer.init)(params),  # one compilation instead of one per array shape
        carry=carry,
        key=key,
        # A copy: the step donates its state, and a buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params) if ema else (),
        loss_scale=loss_scale,
        spikes=spikes,
    )


def evaluation_params(state: TrainState) -> PyTree:
    """All parameters of the model for scoring and sampling: the moving average if there is one."""
    averaged = not (isinstance(state.ema_params, tuple) and state.ema_params == ())
    return join(state.frozen, state.ema_params) if averaged else state.model_params
