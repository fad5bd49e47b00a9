"""The two ends of a model over a vocabulary: token vectors in, logits out, from one matrix or from two."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.layers.embedding import Embed
from transformer.layers.linear import Linear
from transformer.layers.runtime import Runtime
from transformer.model_config import ModelConfig
from transformer.types import UserError


def token_embedding(config: ModelConfig, runtime: Runtime, name: str | None = None) -> Embed:
    """The embedding of a model's tokens; refuses a config whose vocabulary is still to be resolved."""
    if config.vocab_size < 1:
        raise UserError(
            f"A model needs the size of its vocabulary, got vocab_size={config.vocab_size}; set it to the tokenizer's."
        )
    return Embed(
        num_embeddings=config.vocab_size,
        embed_dim=config.embed_dim,
        scale=config.scale_embeddings,
        runtime=runtime,
        name=name,
    )


def output_projection(config: ModelConfig, runtime: Runtime) -> Linear | None:
    """The projection to the vocabulary; None if it is the embedding's own matrix."""
    if config.tie_embeddings:
        return None
    return Linear(
        features=(config.vocab_size,),
        axes=("embed", "vocab"),
        output_dtype=jnp.dtype(jnp.float32),
        runtime=runtime,
    )


def token_logits(
    config: ModelConfig, hidden_BTD: Float[Array, "B T D"], embedding: Embed, output: nn.Module | None
) -> Float[Array, "B T V"]:
    """Float32 logits of every token at each position, capped where the config says so."""
    logits_BTV = embedding.attend(hidden_BTD) if output is None else output(hidden_BTD)
    return embedding.runtime.constrain(capped(config, logits_BTV), "batch", "length", "vocab")


def capped(config: ModelConfig, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits within `config.logits_soft_cap`, of tokens or of classes (Gemma Team 2024, section 2); 0 leaves them."""
    if config.logits_soft_cap == 0:
        return logits
    return config.logits_soft_cap * jnp.tanh(logits / config.logits_soft_cap)
