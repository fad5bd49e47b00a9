"""A transformer block: attention and feed-forward sub-layers on a residual stream."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.attention import Attention
from transformer.layers.cache import KVCache, MemoryCache
from transformer.layers.experts import MixtureOfExperts
from transformer.layers.feed_forward import FeedForward
from transformer.layers.linear import DotGeneral
from transformer.layers.norm import make_norm
from transformer.model_config import BlockConfig, PositionConfig
from transformer.ops.bias import BiasDescription
from transformer.ops.masks import AttentionMask


class BlockCache(NamedTuple):
    """What a block remembers between calls; `cross_attention` is None in a block that has none."""

    attention: KVCache
    cross_attention: MemoryCache | None = None


class Block(nn.Module):
    """Self-attention, cross-attention where there is a memory, and a feed-forward network or a mixture of experts.

    Each sub-layer `f` is added to the stream `x`, with `n` its norms and dropout after `f`:

        pre        x + f(n(x))
        post       n(x + f(x))
        sandwich   x + n(f(n(x)))

    Attributes:
        config: attention, feed-forward network and norms.
        positions: those of attention, rotary and others, act in self-attention.
        cross_attention: whether the block attends to a memory too; without positions and window, otherwise alike.
        dropout: probability of dropping an element of a sub-layer's output.
        init_std: standard deviation of initial kernels; 0 means 1 / sqrt(fan_in).
        residual_init_scale: multiplies that of the projections back to the stream.
        dtype: of activations and products.
        param_dtype: of the parameters.
        dot_general: replaces `jax.lax.dot_general` in the linear layers.

    Example:
        >>> x = jnp.ones((1, 3, 8))
        >>> y, variables = Block(BlockConfig()).init_with_output(jax.random.key(0), x, mask=AttentionMask(causal=True))
        >>> sorted(variables["params"])
        ['attention', 'feed_forward', 'pre_attention_norm', 'pre_feed_forward_norm']
    """

    config: BlockConfig
    positions: PositionConfig = PositionConfig(kind="none")
    cross_attention: bool = False
    dropout: float = 0.0
    init_std: float = 0.0
    residual_init_scale: float = 1.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(
        self,
        inputs_BTD: Float[Array, "B T D"],
        *,
        mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen)
        positions_BT: Int[Array, "#B T"] | None = None,
        relative_bias: BiasDescription | None = None,
        memory_BSD: Float[Array, "B S M"] | None = None,
        memory_mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen)
        cache: BlockCache | None = None,
        earlier_BPD: Float[Array, "B P D"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], BlockCache]:
        """The stream after this block, and the cache where one was given.

        Args:
            inputs_BTD: the residual stream.
            mask: of self-attention.
            positions_BT: of the tokens, None meaning 0, 1, ... or the cache's next slots.
            relative_bias: of self-attention, for t5 positions.
            memory_BSD: what cross-attention attends to; with a cache, needed in the first call only.
            memory_mask: of cross-attention.
            cache: what earlier calls left.
            earlier_BPD: the stream before these inputs, for self-attention to see (`layers.recurrence`).
            train: apply dropout, with the `dropout` key.
        """
        shared: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        weights: dict[str, Any] = {
            **shared,
            "init_std": self.init_std,
            "residual_init_scale": self.residual_init_scale,
            "dot_general": self.dot_general,
        }
        placement = self.config.norm.placement

        def norm(name: str, x_BTD: Array) -> Array:
            return make_norm(self.config.norm, name=name, **shared)(x_BTD)

        def before(role: str, x_BTD: Array) -> Array:
            return x_BTD if placement == "post" else norm(f"pre_{role}_norm", x_BTD)

        def after(role: str, x_BTD: Array, update_BTD: Array) -> Array:
            if placement == "sandwich":
                update_BTD = norm(f"post_{role}_norm", update_BTD)
            x_BTD = x_BTD + nn.Dropout(self.dropout)(update_BTD, deterministic=not train)
            return norm(f"post_{role}_norm", x_BTD) if placement == "post" else x_BTD

        x_BTD = inputs_BTD
        update: Any
        caches: dict[str, Any] = {}
        epsilon = self.config.norm.epsilon
        attention = Attention(
            self.config.attention, positions=self.positions, norm_epsilon=epsilon, name="attention", **weights
        )
        if earlier_BPD is None:
            normed_BTD = before("attention", x_BTD)
        else:
            both = before("attention", jnp.concatenate([earlier_BPD.astype(x_BTD.dtype), x_BTD], axis=1))
            earlier_BPD, normed_BTD = jnp.split(both, [earlier_BPD.shape[1]], axis=1)
        update = attention(
            normed_BTD,
            earlier_BPD=earlier_BPD,
            mask=mask,
            positions_BT=positions_BT,
            relative_bias=relative_bias,
            cache=None if cache is None else cache.attention,
            train=train,
        )
        if cache is not None:
            update, caches["attention"] = update
        x_BTD = after("attention", x_BTD, update)

        if self.cross_attention:
            # A distance to a token of another sequence means nothing: no positions, no window.
            config = dataclasses.replace(self.config.attention, window=0)
            update = Attention(config, norm_epsilon=epsilon, name="cross_attention", **weights)(
                before("cross_attention", x_BTD),
                memory_BSD=memory_BSD,
                mask=memory_mask,
                cache=None if cache is None else cache.cross_attention,
                train=train,
            )
            if cache is not None:
                update, caches["cross_attention"] = update
            x_BTD = after("cross_attention", x_BTD, update)

        normed_BTD = before("feed_forward", x_BTD)
        if self.config.feed_forward.num_experts > 0:
            valid_BT = None if mask.query_segment_ids is None else mask.query_segment_ids != 0
            mixture = MixtureOfExperts(self.config.feed_forward, name="feed_forward", **weights)
            update = mixture(normed_BTD, valid_BT=valid_BT)
        else:
            update = FeedForward(self.config.feed_forward, name="feed_forward", **weights)(normed_BTD)
        x_BTD = after("feed_forward", x_BTD, update)
        return x_BTD if cache is None else (x_BTD, BlockCache(**caches))
