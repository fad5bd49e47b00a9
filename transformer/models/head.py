"""Token embedding and output projection of a model over a vocabulary, with one shared matrix or two."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.embedding import Embed
from transformer.layers.feed_forward import nonlinearity
from transformer.layers.linear import Linear
from transformer.layers.norm import Normalize
from transformer.layers.runtime import Runtime
from transformer.model_config import ModelConfig
from transformer.types import UserError
from transformer.validation import require


def token_embedding(config: ModelConfig, runtime: Runtime, name: str | None = None) -> Embed:
    """The embedding of a model's tokens; refuses a config whose vocabulary size is not set."""
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


class OutputBias(nn.Module):
    """A bias for each token of the vocabulary, added to the logits of tied embeddings."""

    size: int
    runtime: Runtime

    @nn.compact
    def __call__(self, logits_BTV: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """The logits plus the bias, float32."""
        bias_V = self.runtime.parameter(self, "bias", (self.size,), ("vocab",), fill=0.0).astype(jnp.float32)
        return logits_BTV + bias_V.reshape((1,) * (logits_BTV.ndim - 1) + (-1,))


def token_type_embedding(config: ModelConfig, runtime: Runtime, name: str | None = None) -> Embed | None:
    """The table of an encoder's token types; None if there are none."""
    if config.token_types == 0:
        return None
    return Embed(config.token_types, config.embed_dim, axis=None, runtime=runtime, name=name)


def with_token_types(
    embedded_BTD: Float[Array, "B T D"], types: Embed | None, token_types_BT: Int[Array, "B T"] | None
) -> Float[Array, "B T D"]:
    """Token vectors plus the vectors of their types; None means that all are of type 0."""
    if types is None:
        require(
            token_types_BT is None, "Token types need a table, got ModelConfig.token_types=0; set it to their number."
        )
        return embedded_BTD
    return embedded_BTD + types(
        jnp.zeros(embedded_BTD.shape[:2], jnp.int32) if token_types_BT is None else token_types_BT
    )


def masked_head(config: ModelConfig, runtime: Runtime) -> tuple[Linear, Normalize] | tuple[None, None]:
    """The dense layer and the norm before the output projection of a masked language model (Devlin et al. 2019), or None."""
    if not config.masked_head:
        return None, None
    dense = Linear((config.embed_dim,), ("embed", None), use_bias=config.head_bias, runtime=runtime)
    return dense, Normalize(config.blocks[-1].norm, runtime=runtime)


def transformed(
    config: ModelConfig,
    hidden_BTD: Float[Array, "B T D"],
    dense: Linear | None,
    norm: Normalize | None,
    runtime: Runtime,
) -> Float[Array, "B T D"]:
    """The input of the output projection in a masked language model, from hidden states."""
    if dense is None or norm is None:
        return hidden_BTD
    return norm(nonlinearity(config.blocks[-1].feed_forward, runtime)(dense(hidden_BTD)))


def output_projection(config: ModelConfig, runtime: Runtime) -> Linear | OutputBias | None:
    """The projection to the vocabulary; with tied embeddings, only its bias, or None."""
    if config.tie_embeddings:
        return OutputBias(config.vocab_size, runtime) if config.output_bias else None
    return Linear(
        features=(config.vocab_size,),
        axes=("embed", "vocab"),
        use_bias=config.output_bias,
        output_dtype=jnp.dtype(jnp.float32),
        runtime=runtime,
    )


def token_logits(
    config: ModelConfig, hidden_BTD: Float[Array, "B T D"], embedding: Embed, output: nn.Module | None
) -> Float[Array, "B T V"]:
    """Float32 logits of every token at each position, with the config's scale and soft cap."""
    if config.logits_scale != 1:
        hidden_BTD = hidden_BTD * config.logits_scale
    logits_BTV: Any = embedding.attend(hidden_BTD) if config.tie_embeddings else hidden_BTD
    logits_BTV = logits_BTV if output is None else output(logits_BTV)
    return embedding.runtime.constrain(capped(config, logits_BTV), "batch", "length", "vocab")


def capped(config: ModelConfig, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Logits of tokens or classes, bounded by `config.logits_soft_cap` (Gemma Team 2024, section 2); 0 leaves them unbounded."""
    if config.logits_soft_cap == 0:
        return logits
    return config.logits_soft_cap * jnp.tanh(logits / config.logits_soft_cap)
