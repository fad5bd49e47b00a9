"""Classification: the cross-entropy of a text's class."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from transformer.config import ObjectiveConfig
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import token_statistics
from transformer.types import Array, LabelledBatch, LossOutput, Objective, PyTree


def classification(model: nn.Module, config: ObjectiveConfig, mask_token: int) -> Objective:
    """The objective of a `Classifier` on a `LabelledBatch`.

    Args:
        model: called as `model.apply({"params": params}, inputs, segment_ids_BT=, train=, rngs=)`, giving logits [B, C].
        config: label smoothing, z-loss, and how many tokens are hidden in training.
        mask_token: the id that stands for a hidden token.

    Its statistics are sums over texts (`token_statistics`), and in evaluation `confusion`, float32 [C, C]: how many
    texts of the row's class were given the column's.
    """

    def weight(batch: LabelledBatch) -> Array:
        return jnp.sum(batch.weights)

    def loss(params: PyTree, carry: PyTree, batch: LabelledBatch, key: Array, train: bool) -> LossOutput:
        dropout_key, token_key = jax.random.split(key)
        inputs_BT = batch.inputs
        if train and config.token_dropout:
            hidden_BT = jax.random.bernoulli(token_key, config.token_dropout, inputs_BT.shape) & (batch.segment_ids > 0)
            inputs_BT = jnp.where(hidden_BT, mask_token, inputs_BT)
        logits_BC, routing = model.apply(
            {"params": params},
            inputs_BT,
            segment_ids_BT=batch.segment_ids,
            train=train,
            rngs={"dropout": dropout_key} if train else {},
            mutable="routing",
        )
        statistics = add_routing(token_statistics(logits_BC, batch.labels, batch.weights, config), routing, config)
        if not train:
            num_classes = logits_BC.shape[1]
            actual_BC, given_BC = (
                jax.nn.one_hot(x, num_classes, dtype=jnp.float32)
                for x in (batch.labels, jnp.argmax(logits_BC, axis=-1))
            )
            statistics["confusion"] = (actual_BC * batch.weights[:, None]).T @ given_BC
        return (statistics["objective"], statistics["weight"]), (carry, jax.lax.stop_gradient(statistics))

    return Objective(weight=weight, loss=loss)
