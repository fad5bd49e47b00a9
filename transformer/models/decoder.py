"""The decoder: a language model that reads left to right."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.cache import cache_positions
from transformer.layers.linear import DotGeneral
from transformer.layers.stack import Stack, StackCache, init_stack_cache
from transformer.model_config import ModelConfig
from transformer.models.head import TokenLogits, token_embedding
from transformer.ops.masks import AttentionMask


class Decoder(nn.Module):
    """Logits of the next token at every position (Radford et al. 2018).

    Attributes:
        config: the model, with vocab_size (and for learned positions max_length) set.
        dot_general: replaces `jax.lax.dot_general` in the linear layers.

    Example:
        >>> model = Decoder(ModelConfig(vocab_size=11, num_layers=1, embed_dim=8))
        >>> tokens = jnp.array([[1, 2, 3]])
        >>> logits, variables = model.init_with_output(jax.random.key(0), tokens)
        >>> logits.shape
        (1, 3, 11)
        >>> cache = model.init_cache(batch_size=1, capacity=8)
        >>> logits, cache = model.apply(variables, tokens, cache=cache)
    """

    config: ModelConfig
    dot_general: DotGeneral = jax.lax.dot_general

    def setup(self) -> None:
        self.token_embedding = token_embedding(self.config, self.dot_general)
        self.decoder = Stack(self.config, dot_general=self.dot_general)
        self.output = TokenLogits(self.config, dot_general=self.dot_general)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "#B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        cache: StackCache | None = None,
        train: bool = False,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], StackCache]:
        """Float32 logits, and the cache where one was given.

        Args:
            tokens_BT: the tokens read.
            positions_BT: of each token; None means its index. Give packed rows positions that restart.
            segment_ids_BT: tokens attend within their segment, 0 is padding. With a cache: 0 marks right padding, other
                values say nothing more.
            cache: of the tokens before these (`init_cache`); positions follow from it.
            train: apply dropout, with the `dropout` key.

        Raises:
            ValueError: if the config leaves something open, or the arguments contradict each other.
        """
        if cache is None:
            if positions_BT is None:
                positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        else:
            positions_BT = next_positions(cache, tokens_BT, positions_BT, segment_ids_BT)
        hidden_BTD, cache = self.decoder(
            self.token_embedding(tokens_BT),
            positions_BT=positions_BT,
            # Order in the row decides what is earlier: a segment is contiguous, so that its positions would say the
            # same, but only indices tell a backend while tracing what it need not compute.
            mask=AttentionMask(causal=True, query_segment_ids=segment_ids_BT, key_segment_ids=segment_ids_BT),
            cache=cache,
            train=train,
        )
        logits_BTV = self.output(hidden_BTD, self.token_embedding)
        return logits_BTV if cache is None else (logits_BTV, cache)

    @nn.nowrap
    def init_cache(self, batch_size: int, capacity: int, dtype: Any = None) -> StackCache:
        """An empty cache with room for `capacity` tokens a row; `dtype` None means the model's."""
        return init_stack_cache(self.config, batch_size, capacity, dtype=dtype)


def next_positions(cache: StackCache, tokens_BT: Array, positions_BT: Any, segment_ids_BT: Any) -> Array:
    """Positions of the tokens that follow a cache."""
    if positions_BT is not None:
        raise ValueError("With a cache, positions are its next slots; leave positions_BT out.")
    valid_BT = None if segment_ids_BT is None else segment_ids_BT != 0
    first = jax.tree.map(lambda x: x[0] if cache[0].attention.lengths_B.ndim == 2 else x, cache[0].attention)
    return cache_positions(first, tokens_BT.shape[1], valid_BT)
