"""Classification: the cross-entropy of a text's class."""

from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import ObjectiveConfig
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import token_statistics
from transformer.types import Array, LabelledBatch, LossOutput, Objective, PyTree


def classification(model: nn.Module, config: ObjectiveConfig, mask_token: int) -> Objective:
    """The objective of a `Classifier` on a `LabelledBatch`.

    Args:
        model: called as `model.apply({"params": params}, inputs, segment_ids_BT=, train=, rngs=)`, giving logits [B, C].
        config: label smoothing, z-loss, how many tokens are hidden in training, and the weights of classes as numbers.
        mask_token: the id that stands for a hidden token.

    With class weights, the training loss is `sum_i w[label_i] loss_i / sum_i w[label_i]`, label smoothing and z-loss included
    (scikit-learn's `class_weight`; torch's, where nothing is smoothed). Scores count every text alike.

    Its statistics are sums over texts (`token_statistics`), and in evaluation `confusion`, float32 [C, C]: how many
    texts of the row's class were given the column's.
    """

    weighted = config.class_weights != "none"

    def class_weights(batch: LabelledBatch) -> Array:
        if config.class_weights == "balanced":
            raise ValueError("Balanced class_weights must be made numbers before training, by `balanced_weights`.")
        return batch.weights * jnp.asarray(config.class_weights, jnp.float32)[batch.labels]

    def weight(batch: LabelledBatch) -> Array:
        return jnp.sum(class_weights(batch) if weighted else batch.weights)

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
        statistics = token_statistics(logits_BC, batch.labels, batch.weights, config)
        if train and weighted:
            weights_B = class_weights(batch)
            statistics["objective"] = token_statistics(logits_BC, batch.labels, weights_B, config)["objective"]
            statistics["objective_weight"] = jnp.sum(weights_B)
        statistics = add_routing(statistics, routing, config)
        if not train:
            num_classes = logits_BC.shape[1]
            actual_BC, given_BC = (
                jax.nn.one_hot(x, num_classes, dtype=jnp.float32)
                for x in (batch.labels, jnp.argmax(logits_BC, axis=-1))
            )
            statistics["confusion"] = (actual_BC * batch.weights[:, None]).T @ given_BC
        weight_sum = statistics.get("objective_weight", statistics["weight"])
        return (statistics["objective"], weight_sum), (carry, jax.lax.stop_gradient(statistics))

    return Objective(weight=weight, loss=loss)


def balanced_weights(labels: Iterable[int], num_classes: int) -> tuple[float, ...]:
    """`n / (k count[c])` for each class c, of n labels in k classes that occur (King and Zeng 2001; scikit-learn's `balanced`).

    A class that does not occur has weight 1; nothing is multiplied by it.

    Example:
        >>> balanced_weights([0, 0, 0, 1], 2)
        (0.6666666666666666, 2.0)
    """
    count_C = np.bincount(np.fromiter(labels, np.int64), minlength=num_classes)
    occurring = np.count_nonzero(count_C)
    return tuple(float(count_C.sum() / (occurring * count)) if count else 1.0 for count in count_C)
