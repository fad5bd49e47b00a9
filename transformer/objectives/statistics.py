"""Sums of loss, targets and hits over a vocabulary; computed at once, or one chunk of each row at a time."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.runtime import Runtime
from transformer.objective import Objective
from transformer.ops.chunks import sum_over_chunks
from transformer.ops.losses import Summarize, counted_only, cross_entropy, summarize
from transformer.types import PyTree, Statistics


def token_statistics(
    logits: Float[Array, "*B V"],
    targets: Int[Array, "*B"],
    weights: Float[Array, "*B"],
    config: Objective,
    summarize: Summarize = summarize,
) -> Statistics:
    """Sums over targets, float32; a target of weight 0 is excluded, whatever value it and its logits have.

    `loss` (negative log-likelihood, nats), `weight` (targets), `correct` (targets that were the most likely token), and
    `objective` (the training loss: with label smoothing and z-loss).
    """
    logits, targets = counted_only(weights, logits, targets)
    settings = {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss}
    found = cross_entropy(logits, targets, **settings, summarize=summarize)
    return {
        "loss": jnp.sum(found.nll * weights),
        "weight": jnp.sum(weights),
        "correct": jnp.sum(found.correct * weights),
        "objective": jnp.sum(found.loss * weights),
    }


def chunked(config: Objective) -> bool:
    """Whether the model returns hidden states (`head=False`), and `predicted_statistics` computes the logits in chunks."""
    return config.loss_chunks > 1


def predicted_statistics(
    model: nn.Module,
    params: PyTree,
    predicted_BTX: Float[Array, "B T X"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    config: Objective,
) -> Statistics:
    """`token_statistics` of a model's logits, or of its hidden states if the loss is `chunked`.

    In chunks, only `objective` has a gradient.
    """
    summarize = getattr(model, "runtime", Runtime()).summarize
    if not chunked(config):
        return token_statistics(predicted_BTX, targets_BT, weights_BT, config, summarize)

    def statistics_of(
        head: PyTree, hidden_BTD: Array, targets_BT: Array, weights_BT: Array
    ) -> tuple[Array, Statistics]:
        logits_BTV: Any = model.apply({"params": head}, hidden_BTD, method="project")
        statistics = token_statistics(logits_BTV, targets_BT, weights_BT, config, summarize)
        return statistics.pop("objective"), statistics

    # Zeroed before the projection: the gradient of a kernel has a term for every hidden state, and 0 times NaN is NaN.
    predicted_BTX, targets_BT = counted_only(weights_BT, predicted_BTX, targets_BT)
    # Only the projection's parameters get a gradient here.
    head = {name: params[name] for name in ("output", "head_dense", "head_norm") if name in params}
    if "kernel" not in head.get("output", ()):
        head["token_embedding"] = params["token_embedding"]
    objective, statistics = sum_over_chunks(
        statistics_of, head, predicted_BTX, (targets_BT, weights_BT), config.loss_chunks
    )
    return {**jax.lax.stop_gradient(statistics), "objective": objective}
