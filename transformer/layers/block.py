"""A transformer block: attention and feed-forward sub-layers on a residual stream."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float, Int

from transformer.layers.attention import Attention
from transformer.layers.cache import NO_CACHE, Cache, valid_tokens
from transformer.layers.experts import MixtureOfExperts
from transformer.layers.feed_forward import FeedForward
from transformer.layers.norm import Normalize
from transformer.layers.runtime import Runtime
from transformer.model_config import AttentionConfig, BlockConfig
from transformer.model_kinds import Positions
from transformer.ops.bias import BiasDescription
from transformer.ops.masks import AttentionMask
from transformer.ops.patterns.dense import DensePattern
from transformer.ops.positions.none import NoPositions
from transformer.validation import require


class BlockCache(NamedTuple):
    """The cache of one block."""

    attention: Cache
    """A `KVCache`, or a `TransformerXLMemory`."""
    cross_attention: Cache = NO_CACHE
    """A `CrossAttentionCache` in a block with cross-attention."""


class Block(nn.Module):
    """Self-attention, cross-attention in decoders with an encoder, and a feed-forward network or a mixture of experts.

    An `apply` with `mutable=["stream"]` also returns the residual stream after the block, under `output`.

    Each sub-layer `f` is added to the stream `x`; `n` stands for its norms, and dropout follows `f`:

        pre        x + f(n(x))
        post       n(x + f(x))
        sandwich   x + n(f(n(x)))
        output     x + n(f(x))

    With `config.parallel`, attention and feed-forward network read the same `x`: x + a(n(x)) + f(n'(x)).

    Attributes:
        config: attention, feed-forward network and norms.
        positions: the model's; they act in self-attention unless the block has its own.
        cross_attention: whether the block has cross-attention: without positions and window, otherwise configured the same.
        dropout: probability of dropping an element of a sub-layer's output.
        runtime: types, initialisation, `dot_general` and sharding.

    Example:
        >>> import jax.numpy as jnp
        >>> import jax
        >>> x = jnp.ones((1, 3, 8))
        >>> y, variables = Block(BlockConfig()).init_with_output(jax.random.key(0), x, mask=AttentionMask(causal=True))
        >>> sorted(variables["params"])
        ['attention', 'feed_forward', 'pre_attention_norm', 'pre_feed_forward_norm']
    """

    config: BlockConfig
    positions: Positions = NoPositions()
    cross_attention: bool = False
    dropout: float = 0.0
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(
        self,
        inputs_BTD: Float[Array, "B T D"],
        *,
        mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen)
        positions_BT: Int[Array, "#B T"] | None = None,
        relative_bias: BiasDescription | None = None,
        encoded_BSD: Float[Array, "B S M"] | None = None,
        encoder_mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen)
        cache: BlockCache | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], BlockCache]:
        """The stream after this block, and the cache if one was given.

        Args:
            inputs_BTD: the residual stream.
            mask: of self-attention.
            positions_BT: of the tokens; None means 0, 1, ..., or the cache's next slots.
            relative_bias: of self-attention, for t5 positions.
            encoded_BSD: the encoder output, for cross-attention; with a cache, needed in the first call only.
            encoder_mask: mask of cross-attention.
            cache: the cache returned by the previous call.
            train: apply dropout, with the `dropout` key.
        """
        require(
            not (self.config.parallel and self.cross_attention),
            "BlockConfig.parallel=True is for blocks without cross-attention, got a block that has it; leave it out.",
        )
        kept = BlockCache(NO_CACHE) if cache is None else cache
        positions = self.config.own_positions.within(self.positions)
        attention = self._attention("attention", self.config.attention, positions)
        normed_BTD, state = kept.attention.enter(inputs_BTD, lambda x_BTD: self._before("attention", x_BTD))
        update, state = attention(
            normed_BTD,
            mask=mask,
            positions_BT=positions_BT,
            relative_bias=relative_bias if positions is self.positions else None,
            cache=state,
            train=train,
        )
        kept = kept._replace(attention=kept.attention.leave(inputs_BTD, state))
        x_BTD = self._after("attention", inputs_BTD, update, train)

        if self.cross_attention:
            # Distances between tokens of two sequences have no meaning: no positions, no window, no pattern.
            config = dataclasses.replace(self.config.attention, window=0, pattern=DensePattern())
            attention = self._attention("cross_attention", config, NoPositions())
            normed_BTD, state = self._before("cross_attention", x_BTD), kept.cross_attention
            update, state = attention(normed_BTD, encoded_BSD=encoded_BSD, mask=encoder_mask, cache=state, train=train)
            kept = kept._replace(cross_attention=state)
            x_BTD = self._after("cross_attention", x_BTD, update, train)

        read_BTD = inputs_BTD if self.config.parallel else x_BTD
        update = self._feed_forward(self._before("feed_forward", read_BTD), mask)
        x_BTD = self._after("feed_forward", x_BTD, update, train)
        if self.is_mutable_collection("stream") and not self.is_initializing():
            self.sow("stream", "output", x_BTD)
        return x_BTD if cache is None else (x_BTD, kept)

    def _attention(self, name: str, config: AttentionConfig, positions: Positions) -> Attention:
        return Attention(config, positions=positions, norm=self.config.norm, runtime=self.runtime, name=name)

    def _feed_forward(self, normed_BTD: Array, mask: AttentionMask) -> Array:
        """The output of the feed-forward network or of the experts; experts leave out padding."""
        if self.config.feed_forward.num_experts == 0:
            return FeedForward(self.config.feed_forward, runtime=self.runtime, name="feed_forward")(normed_BTD)
        mixture = MixtureOfExperts(self.config.feed_forward, runtime=self.runtime, name="feed_forward")
        return mixture(normed_BTD, valid_BT=valid_tokens(mask))

    def _before(self, role: str, x_BTD: Array) -> Array:
        """The input of a sub-layer."""
        normed = self.config.norm.before and (role != "attention" or self.config.attention_norm)
        return self._norm(f"pre_{role}_norm", x_BTD) if normed else x_BTD

    def _after(self, role: str, x_BTD: Array, update_BTD: Array, train: bool) -> Array:
        """The stream with a sub-layer's output added."""
        placement = self.config.norm.placement
        if placement in ("sandwich", "output"):
            update_BTD = self._norm(f"post_{role}_norm", update_BTD)
        x_BTD = x_BTD + nn.Dropout(self.dropout)(update_BTD, deterministic=not train)
        return self._norm(f"post_{role}_norm", x_BTD) if placement == "post" else x_BTD

    def _norm(self, name: str, x_BTD: Array) -> Array:
        return Normalize(self.config.norm, runtime=self.runtime, name=name)(x_BTD)
