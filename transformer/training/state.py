"""The state of a run: all that a step reads and writes, and all that a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer.layers.adapters import join
from transformer.types import Array, PyTree


class TrainState(NamedTuple):
    """What a training step takes and returns.

    Randomness of step `t` is `fold_in(key, t)`, so that nothing else is needed to go on exactly.
    """

    step: Any  # int32 scalar, optimizer steps done
    params: PyTree  # what is trained: all of the model, or its adapters alone
    opt_state: PyTree
    carry: PyTree  # what flows from step to step in each row besides the parameters; () for most objectives
    key: Any  # a PRNG key, the same in every step
    ema_params: PyTree  # moving average of the parameters; () when there is none
    loss_scale: Any = ()  # a `LossScale` in float16, else ()
    spikes: Any = ()  # a `Spikes` where they are skipped, else ()
    frozen: PyTree = ()  # the base that adapters are beside, else (); never changed, never in a checkpoint

    @property
    def model_params(self) -> PyTree:
        """All parameters of the model, as they are trained."""
        return join(self.frozen, self.params)


def create_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    carry: PyTree = (),
    ema: bool = False,
    loss_scale: Any = (),
    spikes: Any = (),
) -> TrainState:
    """The state before the first step.

    Args:
        params: initial parameters, plain arrays.
        optimizer: as given to `TrainStep`.
        key: a PRNG key (`jax.random.key(seed)`); dropout derives from it.
        carry: the objective's initial carry.
        ema: keep a moving average of the parameters, starting from `params`.
        loss_scale: as `make_loss_scale` gives it.
        spikes: as `make_spikes` gives it.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.jit(optimizer.init)(params),  # one compilation, not one per shape of array
        carry=carry,
        key=key,
        # A copy: the step donates its state, and a buffer cannot be donated twice.
        ema_params=jax.tree.map(jnp.copy, params) if ema else (),
        loss_scale=loss_scale,
        spikes=spikes,
    )


def evaluation_params(state: TrainState) -> PyTree:
    """All parameters of the model to score and to sample from: the moving average where there is one."""
    averaged = not (isinstance(state.ema_params, tuple) and state.ema_params == ())
    return join(state.frozen, state.ema_params) if averaged else state.model_params
