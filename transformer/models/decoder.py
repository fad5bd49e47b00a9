"""The decoder: a language model that reads left to right."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from transformer.layers.runtime import Runtime
from transformer.layers.stack import Stack, StackCache, init_stack_cache
from transformer.model_config import ModelConfig
from transformer.models.head import output_projection, token_embedding, token_logits
from transformer.ops.masks import AttentionMask


class Decoder(nn.Module):
    """Logits of the next token at every position (Radford et al. 2018).

    Attributes:
        config: the model, with vocab_size (and for learned positions max_length) set.
        runtime: the product and sharding; types and initialisation are the config's.
        bidirectional_prefix: the tokens of a prefix, or of a prompt, see each other in both directions.
        max_segments: what `AttentionMask.max_segments` promises of the segment ids that it is called with; 0 is nothing.

    Example:
        >>> import jax
        >>> model = Decoder(ModelConfig(vocab_size=11, num_layers=1, embed_dim=8))
        >>> tokens = jnp.array([[1, 2, 3]])
        >>> logits, variables = model.init_with_output(jax.random.key(0), tokens)
        >>> logits.shape
        (1, 3, 11)
        >>> logits, cache = model.apply(variables, tokens, cache=model.init_cache(batch_size=1, capacity=8))
    """

    config: ModelConfig
    runtime: Runtime = Runtime()
    bidirectional_prefix: bool = False
    max_segments: int = 0

    def setup(self) -> None:
        """Make the parts."""
        runtime = self.runtime.of(self.config)
        self.token_embedding = token_embedding(self.config, runtime)
        self.decoder = Stack(self.config, bidirectional_prefix=self.bidirectional_prefix, runtime=runtime)
        self.output = output_projection(self.config, runtime)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        positions_BT: Int[Array, "#B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        prefix_BT: Bool[Array, "B T"] | None = None,
        cache: StackCache | None = None,
        recurrence_BLPD: Float[Array, "B L P D"] | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], StackCache | Float[Array, "B L P D"]]:
        """Float32 logits, and the cache or the recurrence where one was given.

        Args:
            tokens_BT: the tokens read.
            positions_BT: of each token; None means its index. Give packed rows positions that restart.
            segment_ids_BT: tokens attend within their segment, 0 is padding. With a cache, 0 marks right padding and
                other values say nothing more.
            prefix_BT: tokens that all of their segment see, those before them too (`bidirectional_prefix`). With a
                cache, in the first call only, which must hold all of them.
            cache: of the tokens before these (`init_cache`); positions follow from it.
            recurrence_BLPD: what each layer remembers of the rows before (`init_recurrence`, then what the last call
                returned). A row whose first position is p continues a document, of which it sees the last p tokens, as far
                as they are remembered; one that starts at 0 sees none.
            train: apply dropout, with the `dropout` key.
            head: project to logits; without, the hidden states [B, T, D] are returned in their place (`project`).

        Raises:
            ValueError: if the config leaves something open, or the arguments contradict each other.
        """
        if prefix_BT is not None and not self.bidirectional_prefix:
            raise ValueError(
                "A prefix needs Decoder(bidirectional_prefix=True), which T5's positions and generation go by, got False."
            )
        hidden_BTD, kept = self.decoder(
            self.token_embedding(tokens_BT),
            positions_BT=positions_BT,
            # Order in the row decides what is earlier: a segment is contiguous, so that its positions would say the
            # same, but only indices tell a backend while tracing what it need not compute.
            mask=AttentionMask(
                causal=True,
                query_segment_ids=segment_ids_BT,
                key_segment_ids=segment_ids_BT,
                key_prefix=prefix_BT,
                max_segments=self.max_segments,
            ),
            cache=cache,
            recurrence_BLPD=recurrence_BLPD,
            train=train,
        )
        out = self.project(hidden_BTD) if head else hidden_BTD
        return out if kept is None else (out, kept)

    def project(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of hidden states: what is left out with `head=False`."""
        return token_logits(self.config, hidden_BTD, self.token_embedding, self.output)

    @nn.nowrap
    def init_cache(self, batch_size: int, capacity: int, dtype: Any = None) -> StackCache:
        """An empty cache with room for `capacity` tokens a row; a `dtype` of None means the model's."""
        return init_stack_cache(self.config, batch_size, capacity, dtype=dtype)

    @nn.nowrap
    def init_recurrence(self, batch_size: int) -> Float[Array, "B L P D"]:
        """Memory of nothing yet, `config.memory_length` vectors for each layer."""
        config = self.config
        shape = (batch_size, config.num_layers, config.memory_length, config.embed_dim)
        return jnp.zeros(shape, jnp.dtype(config.dtype))
