"""Next-token prediction: the cross-entropy of each token given those before it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import ObjectiveConfig
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import chunked, predicted_statistics
from transformer.types import Array, Batch, LossOutput, Objective, PyTree


def next_token(model: nn.Module, config: ObjectiveConfig, token_bytes: np.ndarray) -> Objective:
    """The objective of a decoder on a `Batch`.

    Args:
        model: called as `model.apply({"params": params}, inputs, positions_BT=, segment_ids_BT=, train=, rngs=)`,
            giving logits [B, T, V], or with `head=False` hidden states [B, T, D]. With a memory_length, its recurrence is
            what is carried from batch to batch.
        config: label smoothing and z-loss.
        token_bytes: int [V], UTF-8 bytes each token stands for, for bits per byte.

    Its statistics are sums over valid targets: `loss` (negative log-likelihood, nats), `weight` (targets),
    `correct` (targets that were the most likely token), `bytes` (of text predicted), and `objective` (what is
    minimised: the loss with smoothing and z-loss).
    """

    def weight(batch: Batch) -> Array:
        return jnp.sum(batch.weights)

    def loss(params: PyTree, carry: PyTree, batch: Batch, key: Array, train: bool) -> LossOutput:
        predicted, routing = model.apply(
            {"params": params},
            batch.inputs,
            positions_BT=batch.positions,
            segment_ids_BT=batch.segment_ids,
            train=train,
            rngs={"dropout": key} if train else {},
            head=not chunked(config),
            mutable="routing",
            **(carry or {}),
        )
        if carry:
            predicted, recurrence_BLPD = predicted
            carry = {"recurrence_BLPD": recurrence_BLPD}
        statistics = predicted_statistics(model, params, predicted, batch.targets, batch.weights, config)
        statistics = add_routing(statistics, routing, config)
        statistics["bytes"] = jnp.sum(jnp.asarray(token_bytes, jnp.float32)[batch.targets] * batch.weights)
        return (statistics["objective"], statistics["weight"]), (carry, jax.lax.stop_gradient(statistics))

    def init_carry(rows: int) -> PyTree:
        return {"recurrence_BLPD": model.init_recurrence(rows)} if model.config.memory_length > 0 else ()

    return Objective(weight=weight, loss=loss, init_carry=init_carry)
