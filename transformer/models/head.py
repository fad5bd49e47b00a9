"""Logits over the vocabulary from hidden states, with the embedding's own matrix or another."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.layers.embedding import Embed
from transformer.layers.linear import DotGeneral, Linear
from transformer.model_config import ModelConfig


def token_embedding(config: ModelConfig, dot_general: DotGeneral) -> Embed:
    """The embedding of a model's tokens; refuses a config whose vocabulary is still to be resolved."""
    if config.vocab_size < 1:
        raise ValueError(
            f"A model needs its vocabulary's size, got vocab_size={config.vocab_size}; "
            "set it to the tokenizer's (dataclasses.replace)."
        )
    return Embed(
        num_embeddings=config.vocab_size,
        embed_dim=config.embed_dim,
        scale=config.scale_embeddings,
        init_std=config.init_std,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        dot_general=dot_general,
    )


class TokenLogits(nn.Module):
    """Float32 logits: products with the token embedding (`config.tie_embeddings`) or with a kernel of its own."""

    config: ModelConfig
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(self, hidden_BTD: Float[Array, "*B D"], embedding: Embed) -> Float[Array, "*B V"]:
        """Logits of every token at each position, capped where the config says so."""
        config = self.config
        if config.tie_embeddings:
            logits_BTV = embedding.attend(hidden_BTD)
        else:
            settings: dict[str, Any] = {"init_std": config.init_std, "dot_general": self.dot_general}
            logits_BTV = Linear(
                features=(config.vocab_size,),
                axes=("embed", "vocab"),
                dtype=jnp.dtype(config.dtype),
                output_dtype=jnp.float32,
                param_dtype=jnp.dtype(config.param_dtype),
                name="projection",
                **settings,
            )(hidden_BTD)
        if config.logits_soft_cap > 0:
            logits_BTV = config.logits_soft_cap * jnp.tanh(logits_BTV / config.logits_soft_cap)
        return logits_BTV
