"""Sequence to sequence: the cross-entropy of each target token given the source and the tokens before it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from transformer.config import ObjectiveConfig
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import chunked, predicted_statistics
from transformer.types import Array, LossOutput, Objective, PairBatch, PyTree


def seq2seq(model: nn.Module, config: ObjectiveConfig) -> Objective:
    """The objective of an `EncoderDecoder` on a `PairBatch`, with teacher forcing (Vaswani et al. 2017, section 3.1).

    Args:
        model: called with source and inputs, their segment ids, `train=` and `rngs=`, giving logits [B, T, V].
        config: label smoothing and z-loss.

    Its statistics are sums over target tokens, the end of the text among them (`predicted_statistics`).
    """

    def weight(batch: PairBatch) -> Array:
        return jnp.sum(batch.weights)

    def loss(params: PyTree, carry: PyTree, batch: PairBatch, key: Array, train: bool) -> LossOutput:
        predicted, routing = model.apply(
            {"params": params},
            batch.source,
            batch.inputs,
            source_segment_ids_BS=batch.source_segment_ids,
            target_segment_ids_BT=batch.segment_ids,
            train=train,
            rngs={"dropout": key} if train else {},
            head=not chunked(config),
            mutable="routing",
        )
        statistics = predicted_statistics(model, params, predicted, batch.targets, batch.weights, config)
        statistics = add_routing(statistics, routing, config)
        return (statistics["objective"], statistics["weight"]), (carry, jax.lax.stop_gradient(statistics))

    return Objective(weight=weight, loss=loss)
