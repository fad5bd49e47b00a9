"""Pooling of an encoder's hidden states to one vector per text, shared by classifiers and embedders."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.linear import Linear
from transformer.layers.runtime import Runtime
from transformer.layers.stack import Stack
from transformer.model_config import ModelConfig
from transformer.models.head import token_embedding, token_type_embedding, with_token_types
from transformer.ops.masks import AttentionMask


def pooled_states(
    config: ModelConfig,
    runtime: Runtime,
    tokens_BT: Int[Array, "B T"],
    *,
    segment_ids_BT: Int[Array, "B T"] | None,
    token_types_BT: Int[Array, "B T"] | None,
    max_segments: int,
    train: bool,
) -> Float[Array, "B D"]:
    """The hidden states of each row, pooled as configured; call it inside a compact method, where it makes its submodules.

    Args:
        config: the model.
        runtime: the runtime with the types of the config.
        tokens_BT: tokens, one text per row.
        segment_ids_BT: 0 is padding; None means there is none.
        token_types_BT: of each token, where the config has token types; None means 0.
        max_segments: the promise about the segment ids (`AttentionMask.max_segments`).
        train: apply dropout, with the `dropout` key.
    """
    valid_BT = jnp.ones(tokens_BT.shape, bool) if segment_ids_BT is None else segment_ids_BT != 0
    embedding: Any = token_embedding(config, runtime, name="token_embedding")
    types = token_type_embedding(config, runtime, name="token_type_embedding")
    hidden_BTD, _ = Stack(config, runtime=runtime, name="encoder")(
        with_token_types(embedding(tokens_BT), types, token_types_BT),
        mask=AttentionMask.packed(segment_ids_BT, max_segments=max_segments),
        train=train,
    )

    def scores() -> Array:
        return Linear(features=(1,), axes=("embed", None), runtime=runtime.of_heads, name="pooling")(hidden_BTD)[..., 0]

    pooled_BD = config.pooling(hidden_BTD, valid_BT, scores)
    if config.pooler:
        dense = Linear((config.embed_dim,), ("embed", None), use_bias=True, runtime=runtime.of_heads, name="pooler")
        pooled_BD = jnp.tanh(dense(pooled_BD).astype(jnp.float32)).astype(pooled_BD.dtype)
    return pooled_BD
