"""Masked language modelling: the cross-entropy of hidden tokens given those on both sides."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from transformer.config import ObjectiveConfig
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import chunked, predicted_statistics
from transformer.types import Array, Batch, LossOutput, Objective, PyTree


def masked_lm(model: nn.Module, config: ObjectiveConfig) -> Objective:
    """The objective of an encoder on a `Batch` whose tokens to predict have a weight (Devlin et al. 2019, section 3.1).

    Logits are computed for these tokens only: in every row for as many as may have a weight.

    Args:
        model: an `Encoder`.
        config: how many tokens are hidden; label smoothing and z-loss.

    Its statistics are sums over hidden tokens: `loss`, `weight`, `correct`, `objective` (`predicted_statistics`).
    """

    def weight(batch: Batch) -> Array:
        return jnp.sum(batch.weights)

    def loss(params: PyTree, carry: PyTree, batch: Batch, key: Array, train: bool) -> LossOutput:
        most = config.num_masked(batch.inputs.shape[1])
        weights_BN, places_BN = jax.lax.top_k(batch.weights, most)
        predicted, routing = model.apply(
            {"params": params},
            batch.inputs,
            positions_BT=batch.positions,
            segment_ids_BT=batch.segment_ids,
            places_BN=places_BN,
            train=train,
            rngs={"dropout": key} if train else {},
            head=not chunked(config),
            mutable="routing",
            method="logits",
        )
        targets_BN = jnp.take_along_axis(batch.targets, places_BN, axis=1)
        statistics = predicted_statistics(model, params, predicted, targets_BN, weights_BN, config)
        statistics = add_routing(statistics, routing, config)
        return (statistics["objective"], statistics["weight"]), (carry, jax.lax.stop_gradient(statistics))

    return Objective(weight=weight, loss=loss)
