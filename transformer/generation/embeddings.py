"""Computes a vector of each text by pooling the hidden states of a layer of a trained model."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from transformer.generation.rows import Row, computed_rows, segment_ids_of
from transformer.layers.scan_params import loop_params
from transformer.layers.stack import Stack
from transformer.model_kinds import POOLINGS, Pooling
from transformer.objective import Objective
from transformer.trained import Trained
from transformer.types import PyTree
from transformer.validation import require


def text_embeddings(
    run: Trained,
    texts: Sequence[str],
    names: Sequence[str],
    *,
    pooling: str,
    layer: int,
    normalize: bool,
    batch_size: int,
) -> Iterator[tuple[Float[np.ndarray, " D"], int]]:
    """The vector of each text, float32, and the number of its tokens beyond the model's length, which are not read.

    Args:
        run: the trained model.
        texts: the texts, not blank.
        names: name of each text in messages.
        pooling: a kind of `POOLINGS`; empty means `Objective.pooling_of`.
        layer: from 1 to the number of layers; 0 means the last. The last layer includes the final norm.
        normalize: scale each vector to length one.
        batch_size: texts of a batch.

    Raises:
        UserError: the pooling or layer does not exist, or a vector is not finite.
    """
    objective, model = run.config.objective, run.config.model
    num_layers, limit = model.num_layers, model.max_length
    require(0 <= layer <= num_layers, f"layer must be from 1 to {num_layers}, or 0 for the last, got {layer}.")
    kind: Pooling = POOLINGS.find(pooling)() if pooling else objective.pooling_of(model)
    require(
        not kind.learned or "pooling" in run.params,
        f"Pooling by {kind.kind} needs the trained scores of a classifier with model.pooling={kind.kind}, this run has none; "
        "choose mean, first, last or max.",
    )

    def rows() -> Iterator[Row]:
        for text in texts:
            yield (np.asarray(objective.encode(text, run.tokenizer, run.config.data), np.int32)[:limit],)

    compute = functools.partial(_pooled, objective, kind, 0 if layer == num_layers else layer, normalize)
    found = computed_rows(run, compute, rows(), batch_size, limit)
    for ((tokens,), vector_D), text, name in zip(found, texts, names, strict=True):
        require(bool(np.isfinite(vector_D).all()), f"An embedding must be finite, the one of {name} is not.")
        yield vector_D, len(objective.encode(text, run.tokenizer, run.config.data)) - len(tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _pooled(
    objective: Objective,
    pooling: Pooling,
    layer: int,
    normalize: bool,
    model: Any,
    params: PyTree,
    lengths_PB: Array,
    tokens_BT: Array,
) -> Float[Array, "B D"]:
    segment_ids_BT = segment_ids_of(lengths_PB[0], tokens_BT)
    hidden_BTD = _hidden_states(objective, layer, model, params, tokens_BT, segment_ids_BT)

    def scores() -> Array:
        return (hidden_BTD @ params["pooling"]["kernel"])[..., 0]

    pooled_BD = pooling(hidden_BTD.astype(jnp.float32), segment_ids_BT > 0, scores)
    if not normalize:
        return pooled_BD
    return pooled_BD / jnp.maximum(jnp.linalg.norm(pooled_BD, axis=-1, keepdims=True), 1e-12)


def _hidden_states(
    objective: Objective, layer: int, model: Any, params: PyTree, tokens_BT: Array, segment_ids_BT: Array
) -> Float[Array, "B T D"]:
    """The hidden states after a layer, from 1; 0 means after the last layer and the final norm."""
    method, options = objective.reads_texts(segment_ids_BT)
    _, seen = model.apply(
        {"params": params},
        tokens_BT,
        **options,
        method=method,
        capture_intermediates=lambda module, name: isinstance(module, Stack) and name == "__call__",
        mutable=["stream", "intermediates"],
    )
    if layer == 0:
        (stack,) = seen["intermediates"].values()
        return stack["__call__"][0][0]
    (stack,) = (loop_params(seen["stream"]) if model.config.scan_layers else seen["stream"]).values()
    return stack["blocks"][f"block_{layer - 1}"]["output"][0]
