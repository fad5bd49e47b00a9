"""Computes the attention weights of each layer of a model for a text."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from transformer.layers.scan_params import loop_params
from transformer.model_config import ModelConfig
from transformer.types import PyTree, Reading
from transformer.validation import require

MOST_WEIGHTS = 64_000_000
"""Most attention weights of a text over all layers: 256 MB as float32."""
_ROLES = ("attention", "cross_attention")


class AttentionMap(NamedTuple):
    """Attention weights of a stack to itself, or of a decoder to an encoder."""

    queries: str
    """The stack of the queries: `encoder` or `decoder`."""
    keys: str
    """The stack of the keys."""
    weights: tuple[np.ndarray, ...]
    """Weights of each layer, float32 [H, T, S]; a row sums to one, and masked keys have weight 0."""


class TextAttention(NamedTuple):
    """The attention weights and logits of a model for a text."""

    reading: Reading
    """The call of the model."""
    maps: tuple[AttentionMap, ...]
    """Maps of the encoder, of the decoder to itself, and of the decoder to the encoder, in this order."""
    logits: np.ndarray | None
    """Logits of the predictions that `reading.predicts` names, float32 [n, V]; rows without a prediction are NaN."""


def layer_weights(collection: PyTree, *, scanned: bool) -> dict[str, list[dict[str, Any]]]:
    """The weights [B, H, T, S] of each layer of each stack, by role.

    Args:
        collection: the collection `attention` that `model.apply(..., mutable=["attention"])` returns.
        scanned: whether the model's layers are scanned.

    Example:
        `layer_weights(seen["attention"], scanned=False)["decoder"][0]["attention"]`
    """
    stacks = loop_params(collection) if scanned else collection
    return {
        stack: [
            {
                role: parts["blocks"][f"block_{layer}"][role]["weights"][0]
                for role in _ROLES
                if role in parts["blocks"]["block_0"]
            }
            for layer in range(len(parts["blocks"]))
        ]
        for stack, parts in stacks.items()
    }


def read_attention(model: nn.Module, params: PyTree, reading: Reading) -> TextAttention:
    """Compute the attention weights and the logits of a model for a text.

    Args:
        model: a linen module of the package.
        params: its parameters.
        reading: the call of the model (`Objective.reading`).

    Raises:
        UserError: there are too many weights, or some are not finite.
    """
    check_size(model.config, reading)
    output, collection = _apply(model, reading.method, params, reading.inputs, dict(reading.options))
    stacks = layer_weights(jax.device_get(collection["attention"]), scanned=model.config.scan_layers)
    maps = [
        AttentionMap(
            stack, "encoder" if role == "cross_attention" else stack, tuple(layer[role][0] for layer in layers)
        )
        for stack, layers in sorted(stacks.items(), reverse=True)
        for role in layers[0]
    ]
    for found in maps:
        for layer, weights in enumerate(found.weights, 1):
            require(
                bool(np.isfinite(weights).all()),
                f"Attention weights must be finite, layer {layer} of the {found.queries} has NaN; the model has diverged.",
            )
    logits = None
    if reading.predicts:
        logits = np.array(reading.logits(model, params, output), np.float32)
        logits[: reading.first] = np.nan
    return TextAttention(reading, tuple(maps), logits)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: Any, method: str, params: PyTree, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return model.apply({"params": params}, *inputs, **options, method=method, mutable=["attention"])


def check_size(config: ModelConfig, reading: Reading) -> None:
    """Refuse a text with too many attention weights over all layers and heads.

    Raises:
        UserError: there are more than `MOST_WEIGHTS`.
    """
    lengths = {stack: len(ids) for stack, ids in reading.ids.items()}
    count = 0
    for stack, length in lengths.items():
        blocks = (config.decoder if stack == "decoder" else config).blocks
        keys = sum(lengths.values()) if stack == "decoder" else length
        count += sum(block.attention.num_heads for block in blocks) * length * keys
    require(
        count <= MOST_WEIGHTS,
        f"A text for an attention page must have at most {MOST_WEIGHTS:,} weights over all layers and heads, got {count:,} for "
        f"{max(lengths.values())} tokens; shorten it to about {int(max(lengths.values()) * (MOST_WEIGHTS / count) ** 0.5)}.",
    )
