"""The decoder: a causal language model."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
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
        runtime: `dot_general` and sharding; types and initialisation are the config's.
        bidirectional_prefix: the tokens of a prefix, or of a prompt, see each other in both directions.
        max_segments: the promise about its segment ids (`AttentionMask.max_segments`); 0 promises nothing.

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
        """Make the submodules."""
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
        memory_BLPD: Float[Array, "B L P D"] | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], StackCache | Float[Array, "B L P D"]]:
        """Float32 logits, and the cache or the Transformer-XL memory if one was given.

        Args:
            tokens_BT: input tokens.
            positions_BT: of each token; None means its index. Packed rows need positions that restart.
            segment_ids_BT: tokens attend within their segment; 0 is padding. With a cache, 0 marks right padding and other values
                are ignored.
            prefix_BT: tokens that are visible to all of their segment, to earlier tokens too (`bidirectional_prefix`). With a
                cache, pass it in the first call only; that call must contain the whole prefix.
            cache: of the previous tokens (`init_cache`); positions follow from it.
            memory_BLPD: Transformer-XL memory of each layer: `init_memory`, then the result of the last call. A row whose first
                position is p continues a document, and sees its last p tokens as far as the memory reaches. With p = 0 it sees
                no memory.
            train: apply dropout, with the `dropout` key.
            head: False returns the hidden states [B, T, D] instead of logits (`project`).

        Raises:
            ValueError: if the config is incomplete, or the arguments contradict each other.
        """
        if prefix_BT is not None and not self.bidirectional_prefix:
            raise ValueError(
                "A prefix needs Decoder(bidirectional_prefix=True), which T5's positions and generation depend on, got False."
            )
        hidden_BTD, kept = self.decoder(
            self.token_embedding(tokens_BT),
            positions_BT=positions_BT,
            # The mask compares indices. Positions within a contiguous segment would give the same mask, but only from indices
            # can a backend tell while tracing which blocks to skip.
            mask=AttentionMask(
                causal=True,
                query_segment_ids=segment_ids_BT,
                key_segment_ids=segment_ids_BT,
                key_prefix=prefix_BT,
                max_segments=self.max_segments,
            ),
            cache=cache,
            memory_BLPD=memory_BLPD,
            train=train,
        )
        out = self.project(hidden_BTD) if head else hidden_BTD
        return out if kept is None else (out, kept)

    def project(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of hidden states: the step that `head=False` leaves out."""
        return token_logits(self.config, hidden_BTD, self.token_embedding, self.output)

    @nn.nowrap
    def init_cache(self, batch_size: int, capacity: int, dtype: DTypeLike | None = None) -> StackCache:
        """An empty cache with room for `capacity` tokens a row; a `dtype` of None means the model's."""
        return init_stack_cache(self.config, batch_size, capacity, dtype=dtype)

    @nn.nowrap
    def init_memory(self, batch_size: int) -> Float[Array, "B L P D"]:
        """An empty Transformer-XL memory, `config.memory_length` vectors for each layer."""
        config = self.config
        shape = (batch_size, config.num_layers, config.memory_length, config.embed_dim)
        return jnp.zeros(shape, jnp.dtype(config.dtype))
