"""Multi-head attention: projections, positions and cache around `ops.dot_product_attention`."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.cache import KVCache, MemoryCache, mark_slots, next_slots, write_cache
from transformer.layers.linear import DotGeneral, Linear
from transformer.layers.norm import RMSNorm
from transformer.layers.relative import RelativePosition
from transformer.layers.spread_attention import context_size, spread_attention
from transformer.model_config import AttentionConfig, NormConfig, PositionConfig
from transformer.ops.bias import AlibiBias, BiasDescription
from transformer.ops.masks import AttentionMask, BlockPattern
from transformer.ops.positions import rotary
from transformer.parallel.rules import constrain


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), to itself or to a memory.

    Attributes:
        config: heads, norms, window, soft cap, dropout, backend.
        positions: rotary, alibi, t5 and transformer_xl act here, other kinds on the embeddings.
        norm_epsilon: added to the mean square in QK-norm, the block's `NormConfig.epsilon`.
        init_std: standard deviation of initial kernels; 0 means 1 / sqrt(fan_in).
        residual_init_scale: multiplies that of the output projection.
        dtype: of activations and products.
        param_dtype: of the parameters.
        dot_general: replaces `jax.lax.dot_general` in the projections.

    Example:
        >>> layer = Attention(AttentionConfig(num_heads=2, num_kv_heads=1))
        >>> x = jnp.ones((1, 3, 8))
        >>> y, variables = layer.init_with_output(jax.random.key(0), x, mask=AttentionMask(causal=True))
        >>> y.shape
        (1, 3, 8)
    """

    config: AttentionConfig
    positions: PositionConfig = PositionConfig(kind="none")
    norm_epsilon: float = NormConfig.epsilon
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
        memory_BSD: Float[Array, "B S M"] | None = None,
        earlier_BPD: Float[Array, "B P D"] | None = None,
        mask: AttentionMask | Array = AttentionMask(),  # noqa: B008 (frozen)
        positions_BT: Int[Array, "#B T"] | None = None,
        relative_bias: BiasDescription | None = None,
        cache: KVCache | MemoryCache | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], KVCache | MemoryCache]:
        """Attend, and return the cache too where one was given.

        Args:
            inputs_BTD: what asks.
            memory_BSD: what is attended to; None means the inputs themselves.
            earlier_BPD: P vectors before the inputs, which are attended to and do not ask (`layers.recurrence`). Places are
                indices among all P + T then, and the mask is one of T queries, P + T keys and a query_offset of P.
            mask: who may attend to whom, described or as booleans [B, 1, T, S] (`dot_product_attention`);
                `config.window` and `config.pattern` are added to it.
            positions_BT: for kinds that act here; None means 0, 1, ... (with a cache: its next slots, and nothing else).
            relative_bias: for t5, which shares one among the layers of a stack.
            cache: a `KVCache` of the tokens before these makes self-attention causal, zeros in
                `mask.query_segment_ids` being right padding; a prefix must come whole, in the first call. A `MemoryCache`
                keeps what cross-attention made of the memory: pass the memory with the first call only.
            train: drop attention weights, with the `dropout` key.

        Raises:
            ValueError: if the heads do not divide the width, or the arguments contradict each other.
        """
        config, mask = self.config, AttentionMask.of(mask)
        batch_size, num_tokens, embed_dim = inputs_BTD.shape
        cross = memory_BSD is not None or isinstance(cache, MemoryCache)
        self._check(cross, mask, positions_BT, relative_bias, cache)
        if earlier_BPD is not None and (cross or cache is not None or positions_BT is not None):
            raise ValueError(
                "Earlier vectors stand before the inputs of self-attention: without memory, cache, positions_BT."
            )
        head_dim = config.resolved_head_dim(embed_dim)

        query_BTHK = self._project("query", inputs_BTD, config.num_heads, head_dim)
        if isinstance(cache, MemoryCache) and memory_BSD is None:
            if cache.key_BSGK.shape[1] == 0:
                raise ValueError("Cross-attention needs a memory in the first call with a cache; pass memory_BSD.")
            key_BSGK, value_BSGK = cache
        else:
            source_BSD = inputs_BTD if memory_BSD is None else memory_BSD
            if earlier_BPD is not None:
                source_BSD = jnp.concatenate([earlier_BPD, inputs_BTD], axis=1)
            key_BSGK = self._project("key", source_BSD, config.kv_heads, head_dim)
            value_BSGK = self._project("value", source_BSD, config.kv_heads, head_dim, normalize=False)
        if isinstance(cache, MemoryCache):
            cache = MemoryCache(key_BSGK.astype(cache.key_BSGK.dtype), value_BSGK.astype(cache.value_BSGK.dtype))

        if config.window > 0:
            window = min(config.window, mask.window or config.window)
            mask = dataclasses.replace(mask, window=window)
        if config.pattern != "dense" and not cross:
            pattern = BlockPattern(config.pattern, config.pattern_block, config.pattern_stride, config.pattern_summary)
            mask = dataclasses.replace(mask, pattern=pattern)
        bias = None
        if self.positions.kind == "rotary":
            places_BT = positions_BT
            if isinstance(cache, KVCache):
                places_BT = next_slots(cache.lengths_B, num_tokens)
            elif places_BT is None:
                places_BT = jnp.arange(key_BSGK.shape[1], dtype=jnp.int32)[None]
            query_BTHK = self._rotate(query_BTHK, places_BT[:, -num_tokens:])
            key_BSGK = self._rotate(key_BSGK, places_BT)
        elif self.positions.kind in ("alibi", "t5"):
            bias = AlibiBias.for_heads(config.num_heads) if self.positions.kind == "alibi" else relative_bias
        if positions_BT is not None and not cross and (bias is not None or mask.pattern is not None):
            # A bias and a pattern see what the mask compares: in a packed row, places within each document. Without given
            # positions these stay the indices, from which a backend knows while tracing which blocks to skip.
            places_BT = jnp.broadcast_to(positions_BT, (batch_size, num_tokens))
            mask = dataclasses.replace(mask, query_positions=places_BT, key_positions=places_BT)

        if isinstance(cache, KVCache):
            valid_BT = None if mask.query_segment_ids is None else mask.query_segment_ids != 0
            offset_B = cache.lengths_B
            cache = write_cache(cache, key_BSGK, value_BSGK, valid_BT)
            key_BSGK, value_BSGK = jnp.swapaxes(cache.key_BGPK, 1, 2), jnp.swapaxes(cache.value_BGPK, 1, 2)
            prefix_BT, capacity = mask.key_prefix, key_BSGK.shape[1]
            mask = AttentionMask(
                causal=True,
                window=mask.window,
                pattern=mask.pattern,
                key_prefix=None if prefix_BT is None else mark_slots(offset_B, prefix_BT, capacity),
                query_offset=offset_B,
                key_lengths=cache.lengths_B,
            )

        key_BSGK = key_BSGK.astype(self.dtype)
        if self.positions.kind == "transformer_xl":
            relative = RelativePosition(
                embed_dim, self.positions.theta, self.init_std, self.dtype, self.param_dtype, name="relative_position"
            )
            given = positions_BT is not None
            query_places_BT = positions_BT if given else mask.query_places(0, num_tokens)
            key_places_BS = positions_BT if given else mask.key_places(0, key_BSGK.shape[1])
            query_BTHK, key_BSGK = relative(query_BTHK, key_BSGK, query_places_BT, key_places_BS)
        dropout_rate, implementation = config.dropout if train else 0.0, config.implementation
        if isinstance(cache, KVCache) and implementation in ("splash", "cudnn"):
            implementation = "auto"  # where a row begins is data then, and these kernels know while compiling
        out_BTHK = spread_attention(
            query_BTHK,
            key_BSGK,
            value_BSGK.astype(self.dtype),
            mask=mask,
            bias=bias,
            scale=1 / math.sqrt(head_dim),
            logits_soft_cap=config.logits_soft_cap,
            dropout_rate=dropout_rate,
            dropout_key=self.make_rng("dropout") if dropout_rate > 0 else None,
            implementation=implementation,
        )
        out_BTD = Linear(
            features=(embed_dim,),
            axes=("heads", "head_dim", "embed"),
            use_bias=config.use_bias,
            init_std=self.init_std,
            init_scale=self.residual_init_scale,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=self.dot_general,
            name="out",
        )(out_BTHK)
        return out_BTD if cache is None else (out_BTD, cache)

    def _project(self, role: str, inputs: Array, heads: int, head_dim: int, *, normalize: bool = True) -> Array:
        """Queries, keys or values, with QK-norm where it applies."""
        projected = Linear(
            features=(heads, head_dim),
            axes=("embed", "heads" if role == "query" else "kv_heads", "head_dim"),
            use_bias=self.config.use_bias,
            init_std=self.init_std,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=self.dot_general,
            name=role,
        )(inputs)
        if self.config.qk_norm and normalize:
            projected = RMSNorm(
                epsilon=self.norm_epsilon,
                axis="head_dim",
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"{role}_norm",
            )(projected)
        return constrain(projected, "batch", "length", "heads" if role == "query" else "kv_heads", None)

    def _rotate(self, x_BTHK: Array, places_BT: Array) -> Array:
        return rotary(
            x_BTHK,
            places_BT,
            theta=self.positions.theta,
            scaling=self.positions.scaling,
            scaling_factor=self.positions.scaling_factor,
            original_length=self.positions.original_length,
        )

    def _check(self, cross: bool, mask: AttentionMask, positions_BT: Any, relative_bias: Any, cache: Any) -> None:
        if (self.positions.kind == "t5") != (relative_bias is not None):
            raise ValueError(
                f"Positions of kind t5, and no others, need a relative_bias, got kind={self.positions.kind!r} and "
                f"{type(relative_bias).__name__}; a `Stack` makes one, `RelativeBias` too."
            )
        if positions_BT is None and context_size() > 1:
            raise ValueError(
                "Over a context axis, where a row's places are dealt to devices out of order, attention needs positions_BT."
            )
        if cross and self.positions.kind in ("rotary", "alibi", "t5", "transformer_xl"):
            raise ValueError(
                f"Cross-attention has no common positions with its memory, got kind={self.positions.kind!r}; "
                "use PositionConfig(kind='none')."
            )
        if cross and isinstance(cache, KVCache):
            raise ValueError("Cross-attention needs a MemoryCache, got a KVCache; a memory does not grow.")
        if isinstance(cache, KVCache) and positions_BT is not None:
            raise ValueError("With a cache, positions are its next slots; leave positions_BT out.")
        given = [
            n
            for n in ("query_positions", "key_positions", "key_lengths", "query_offset", "visible")
            if getattr(mask, n) is not None
        ]
        if isinstance(cache, KVCache) and given:
            raise ValueError(f"With a cache, mask.{given[0]} follows from it; leave it out.")
