"""The encoder-decoder: a language model of targets, conditioned on a source."""

import dataclasses
from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from transformer.layers.runtime import Runtime
from transformer.layers.stack import Stack, StackCache, init_stack_cache
from transformer.model_config import ModelConfig
from transformer.models.head import output_projection, token_embedding, token_logits
from transformer.ops.masks import AttentionMask


class EncoderDecoder(nn.Module):
    """Logits of the next target token, given a source (Vaswani et al. 2017).

    Source and target share one token embedding unless `source_vocab_size` is given. Several pairs may share a row: a target
    attends to the source with its segment id.

    Attributes:
        config: the model, with vocab_size (and for learned positions max_length) set. Both stacks have the same depth, unless
            it sets decoder_layers.
        runtime: `dot_general` and sharding; types and initialisation are the config's.
        source_vocab_size: entries of a separate embedding for sources; 0 means a shared one.
        max_segments: the promise about the segment ids of either side (`AttentionMask.max_segments`); 0 promises nothing.

    Example, reading the source once and then the target in pieces:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> config = ModelConfig(vocab_size=11, num_layers=1, embed_dim=8)
        >>> model = EncoderDecoder(config)
        >>> source, target = jnp.array([[1, 2, 3]]), jnp.array([[4, 5]])
        >>> logits, variables = model.init_with_output(jax.random.key(0), source, target)
        >>> logits.shape
        (1, 2, 11)
        >>> encoded = model.apply(variables, source, method="encode")
        >>> cache = model.init_cache(batch_size=1, capacity=8)
        >>> first, cache = model.apply(variables, target[:, :1], encoded, cache=cache, method="decode")
        >>> second, cache = model.apply(variables, target[:, 1:], cache=cache, method="decode")
    """

    config: ModelConfig
    runtime: Runtime = Runtime()
    source_vocab_size: int = 0
    max_segments: int = 0

    def setup(self) -> None:
        """Make the submodules."""
        runtime = self.runtime.of(self.config)
        self.token_embedding = token_embedding(self.config, runtime)
        self.source_embedding = None
        if self.source_vocab_size > 0:
            config = dataclasses.replace(self.config, vocab_size=self.source_vocab_size)
            self.source_embedding = token_embedding(config, runtime)
        self.encoder = Stack(self.config, runtime=runtime)
        self.decoder = Stack(self.config.decoder, cross_attention=True, runtime=runtime)
        self.output = output_projection(self.config, runtime)

    def __call__(
        self,
        source_BS: Int[Array, "B S"],
        target_BT: Int[Array, "B T"],
        *,
        source_positions_BS: Int[Array, "#B S"] | None = None,
        source_segment_ids_BS: Int[Array, "B S"] | None = None,
        target_positions_BT: Int[Array, "#B T"] | None = None,
        target_segment_ids_BT: Int[Array, "B T"] | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Float[Array, "B T V"]:
        """Float32 logits at every target position; see `encode` and `decode` for the arguments."""
        encoded_BSD = self.encode(
            source_BS, positions_BS=source_positions_BS, segment_ids_BS=source_segment_ids_BS, train=train
        )
        logits_BTV: Any = self.decode(
            target_BT,
            encoded_BSD,
            source_segment_ids_BS=source_segment_ids_BS,
            positions_BT=target_positions_BT,
            segment_ids_BT=target_segment_ids_BT,
            train=train,
            head=head,
        )
        return logits_BTV

    def encode(
        self,
        source_BS: Int[Array, "B S"],
        *,
        positions_BS: Int[Array, "#B S"] | None = None,
        segment_ids_BS: Int[Array, "B S"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B S D"]:
        """The encoder output: hidden states of the source.

        Args:
            source_BS: input tokens.
            positions_BS: of each token; None means its index.
            segment_ids_BS: tokens attend within their segment, 0 is padding.
            train: apply dropout, with the `dropout` key.
        """
        embedding = self.source_embedding or self.token_embedding
        encoded_BSD, _ = self.encoder(
            embedding(source_BS),
            positions_BT=positions_BS,
            mask=AttentionMask.packed(segment_ids_BS, max_segments=self.max_segments),
            train=train,
        )
        return encoded_BSD

    def decode(
        self,
        target_BT: Int[Array, "B T"],
        encoded_BSD: Float[Array, "B S D"] | None = None,
        *,
        source_segment_ids_BS: Int[Array, "B S"] | None = None,
        positions_BT: Int[Array, "#B T"] | None = None,
        segment_ids_BT: Int[Array, "B T"] | None = None,
        cache: StackCache | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], StackCache]:
        """Float32 logits, and the cache if one was given.

        Args:
            target_BT: target tokens to read.
            encoded_BSD: the result of `encode`; with a cache, in the first call only (the cache keeps each layer's keys and
                values of it).
            source_segment_ids_BS: as given to `encode`; needed in every call.
            positions_BT: of each target token; None means its index.
            segment_ids_BT: targets attend within their segment, and to the source of the same segment; 0 is padding. With a
                cache, a row holds one target, and 0 marks right padding.
            cache: of the previous target tokens (`init_cache`); positions follow from it.
            train: apply dropout, with the `dropout` key.
            head: False returns the hidden states [B, T, D] instead of logits (`project`).
        """
        hidden_BTD, cache = self.decoder(
            self.token_embedding(target_BT),
            positions_BT=positions_BT,
            mask=AttentionMask(
                causal=True,
                query_segment_ids=segment_ids_BT,
                key_segment_ids=segment_ids_BT,
                max_segments=self.max_segments,
            ),
            encoded_BSD=encoded_BSD,
            encoder_mask=AttentionMask(
                query_segment_ids=segment_ids_BT,
                key_segment_ids=source_segment_ids_BS,
                # If a row holds several pairs, sources and targets have different ids at each index.
                max_segments=self.max_segments if self.max_segments == 1 else 0,
            ),
            cache=cache,
            train=train,
        )
        out = self.project(hidden_BTD) if head else hidden_BTD
        return out if cache is None else (out, cache)

    def project(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of hidden states: the step that `head=False` leaves out."""
        return token_logits(self.config, hidden_BTD, self.token_embedding, self.output)

    @nn.nowrap
    def init_cache(self, batch_size: int, capacity: int, dtype: DTypeLike | None = None) -> StackCache:
        """An empty cache with room for `capacity` target tokens a row; a `dtype` of None means the model's."""
        return init_stack_cache(self.config.decoder, batch_size, capacity, dtype=dtype, cross_attention=True)
