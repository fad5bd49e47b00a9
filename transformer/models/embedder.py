"""The embedder: one vector per text, pooled from an encoder's hidden states, for search and comparison."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.linear import Linear
from transformer.layers.runtime import Runtime
from transformer.model_config import ModelConfig
from transformer.models.pooled import pooled_states


class Embedder(nn.Module):
    """One vector per text (Reimers and Gurevych 2019); its parameters have the names of an `Encoder`'s.

    Padding is neither attended to nor pooled: a text's vector does not depend on the other texts in its batch. With
    `config.pooler` it holds the parameters of that layer for a classifier to start from, but does not use them.

    Attributes:
        config: the model, with vocab_size set; `config.pooling` reduces the hidden states to one vector.
        runtime: `dot_general` and sharding; types and initialisation are the config's.
        normalize: divide each vector by its length; dot products are then cosines.
        max_segments: the promise about its segment ids (`AttentionMask.max_segments`); 0 promises nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> model = Embedder(ModelConfig(vocab_size=11, num_layers=1, embed_dim=8))
        >>> tokens, segment_ids = jnp.array([[1, 2, 3, 0]]), jnp.array([[1, 1, 1, 0]])
        >>> vectors, variables = model.init_with_output(jax.random.key(0), tokens, segment_ids_BT=segment_ids)
        >>> vectors.shape, float(jnp.linalg.norm(vectors[0]).round(4))
        ((1, 8), 1.0)
    """

    config: ModelConfig
    runtime: Runtime = Runtime()
    normalize: bool = True
    max_segments: int = 0

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        token_types_BT: Int[Array, "B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B D"]:
        """Float32 vectors; zeros for a row without a token.

        Args:
            tokens_BT: tokens, one text per row.
            segment_ids_BT: 0 is padding; None means there is none.
            token_types_BT: of each token, where the config has token types; None means 0.
            train: apply dropout, with the `dropout` key.
        """
        runtime = self.runtime.of(self.config)
        pooled_BD = pooled_states(
            dataclasses.replace(self.config, pooler=False),
            runtime,
            tokens_BT,
            segment_ids_BT=segment_ids_BT,
            token_types_BT=token_types_BT,
            max_segments=self.max_segments,
            train=train,
        ).astype(jnp.float32)
        if self.config.pooler:
            Linear((self.config.embed_dim,), ("embed", None), use_bias=True, runtime=runtime, name="pooler")(pooled_BD)
        if not self.normalize:
            return pooled_BD
        # The square is bounded, not the norm: the square's gradient at zero is zero, the norm's is NaN.
        squared_B1 = jnp.sum(jnp.square(pooled_BD), axis=-1, keepdims=True)
        return pooled_BD * jax.lax.rsqrt(jnp.maximum(squared_B1, 1e-24))
