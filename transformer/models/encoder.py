"""The encoder: bidirectional hidden states of tokens."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.runtime import Runtime
from transformer.layers.stack import Stack
from transformer.model_config import ModelConfig
from transformer.models.head import (
    masked_head,
    output_projection,
    token_embedding,
    token_logits,
    token_type_embedding,
    transformed,
    with_token_types,
)
from transformer.ops.masks import AttentionMask


class Encoder(nn.Module):
    """A vector for every token, which depends on both sides (Devlin et al. 2019).

    Attributes:
        config: the model, with vocab_size (and for learned positions max_length) set.
        runtime: `dot_general` and sharding; types and initialisation are the config's.
        max_segments: the promise about its segment ids (`AttentionMask.max_segments`); 0 promises nothing.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> model = Encoder(ModelConfig(vocab_size=11, num_layers=1, embed_dim=8))
        >>> tokens, segment_ids = jnp.array([[1, 2, 3, 0]]), jnp.array([[1, 1, 1, 0]])
        >>> hidden, variables = model.init_with_output(jax.random.key(0), tokens, segment_ids_BT=segment_ids)
        >>> hidden.shape
        (1, 4, 8)
    """

    config: ModelConfig
    runtime: Runtime = Runtime()
    max_segments: int = 0

    def setup(self) -> None:
        """Make the submodules."""
        runtime = self.runtime.of(self.config)
        self.token_embedding = token_embedding(self.config, runtime)
        self.token_type_embedding = token_type_embedding(self.config, runtime)
        self.encoder = Stack(self.config, runtime=runtime)
        self.head_dense, self.head_norm = masked_head(self.config, runtime)
        self.output = output_projection(self.config, runtime)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "#B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        token_types_BT: Int[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """Hidden states, in the model's dtype.

        Args:
            tokens_BT: input tokens.
            positions_BT: of each token; None means its index.
            segment_ids_BT: tokens attend within their segment, 0 is padding.
            token_types_BT: of each token, where the config has token types; None means 0.
            train: apply dropout, with the `dropout` key.
        """
        hidden_BTD, _ = self.encoder(
            with_token_types(self.token_embedding(tokens_BT), self.token_type_embedding, token_types_BT),
            positions_BT=positions_BT,
            mask=AttentionMask.packed(segment_ids_BT, max_segments=self.max_segments),
            train=train,
        )
        return hidden_BTD

    def logits(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "#B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        token_types_BT: Int[Array, "B T"] | None = None,
        indices_BN: Int[Array, "B N"] | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Float[Array, "B N V"]:
        """Float32 logits of the token at each position; initialise with this method if embeddings are not tied.

        Args:
            tokens_BT: input tokens.
            positions_BT: of each token; None means its index.
            segment_ids_BT: tokens attend within their segment, 0 is padding.
            token_types_BT: of each token, where the config has token types; None means 0.
            indices_BN: indices of the wanted positions; None means all.
            train: apply dropout, with the `dropout` key.
            head: False returns the hidden states [B, N, D] instead of logits (`project`).
        """
        hidden_BTD = self(
            tokens_BT,
            positions_BT=positions_BT,
            segment_ids_BT=segment_ids_BT,
            token_types_BT=token_types_BT,
            train=train,
        )
        if indices_BN is not None:
            hidden_BTD = jnp.take_along_axis(hidden_BTD, indices_BN[..., None], axis=1)
        return self.project(hidden_BTD) if head else hidden_BTD

    def project(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of hidden states: the step that `head=False` leaves out."""
        runtime = self.runtime.of(self.config)
        hidden_BTD = transformed(self.config, hidden_BTD, self.head_dense, self.head_norm, runtime)
        return token_logits(self.config, hidden_BTD, self.token_embedding, self.output)
