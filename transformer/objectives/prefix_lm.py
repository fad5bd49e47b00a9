"""Prefix language modelling: the cross-entropy of each token given those before it and, in both directions, a prefix."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from transformer.config import ObjectiveConfig
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import chunked, predicted_statistics
from transformer.types import Batch, LossOutput, Objective, PyTree


def prefix_lm(model: nn.Module, config: ObjectiveConfig) -> Objective:
    """The objective of a decoder on a `Batch` (Liu et al. 2018; Raffel et al. 2020, section 3.2.1).

    Args:
        model: a `Decoder` with `bidirectional_prefix`.
        config: label smoothing and z-loss.

    Its statistics are sums over the targets behind the prefixes (`predicted_statistics`). Bytes are not among them: scores
    of compressors, which read all of a text, would not be of the same ones.
    """

    def weight(batch: Batch) -> Float[Array, ""]:
        return jnp.sum(batch.weights)

    def loss(params: PyTree, carry: PyTree, batch: Batch, key: Any, train: bool) -> LossOutput:
        predicted, routing = model.apply(
            {"params": params},
            batch.inputs,
            positions_BT=batch.positions,
            segment_ids_BT=batch.segment_ids,
            prefix_BT=prefix_tokens(batch.weights, batch.segment_ids),
            train=train,
            rngs={"dropout": key} if train else {},
            head=not chunked(config),
            mutable="routing",
        )
        statistics = predicted_statistics(model, params, predicted, batch.targets, batch.weights, config)
        statistics = add_routing(statistics, routing, config)
        return (statistics["objective"], statistics["weight"]), (carry, jax.lax.stop_gradient(statistics))

    return Objective(weight=weight, loss=loss)


def prefix_tokens(
    weights_BT: Float[Array | np.ndarray, "B T"], segment_ids_BT: Int[Array | np.ndarray, "B T"]
) -> Bool[Array, "B T"]:
    """Which inputs are a prefix: those of each segment up to the one whose target is the first that counts.

    >>> prefix_tokens(jnp.array([[0.0, 0, 1, 1, 0, 1]]), jnp.array([[1, 1, 1, 1, 2, 2]])).astype(int).tolist()
    [[1, 1, 1, 0, 1, 1]]
    """
    counted_BT = (weights_BT > 0).astype(jnp.int32)
    before_BT = jnp.cumsum(counted_BT, axis=1) - counted_BT
    starts_BT = jnp.diff(segment_ids_BT, axis=1, prepend=-1) != 0
    # It never falls, so that its value at the latest start is the largest of those at starts so far.
    at_start_BT = jax.lax.cummax(jnp.where(starts_BT, before_BT, 0), axis=1)
    return before_BT == at_start_BT
