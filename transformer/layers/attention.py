"""Multi-head attention: projections, positions and cache around `ops.dot_product_attention`."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.kinds import switch
from transformer.layers.cache import NO_CACHE, Cache
from transformer.layers.linear import Linear
from transformer.layers.norm import Normalize
from transformer.layers.positions import RelativePosition
from transformer.layers.runtime import Runtime
from transformer.layers.spread_attention import context_size, spread_attention
from transformer.model_config import AttentionConfig
from transformer.model_kinds import Norm, Positions
from transformer.ops.backends.xla import attention_weights
from transformer.ops.bias import BiasDescription
from transformer.ops.masks import AttentionMask
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.none import NoPositions


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), to itself or to a memory.

    An `apply` with `mutable=["attention"]` returns the weights too, float32 [B, H, T, S] before dropout, under `weights`:
    whatever the backend, those that the reference (`xla`) computes.

    Attributes:
        config: heads, norms, window, soft cap, dropout, backend.
        positions: rotary, alibi, t5 and transformer_xl act here, other kinds on the embeddings.
        norm: the block's norm, whose epsilon and unit offset QK-norm has too.
        runtime: types, initialisation, the product and sharding.

    Example:
        >>> import jax
        >>> layer = Attention(AttentionConfig(num_heads=2, num_kv_heads=1))
        >>> x = jnp.ones((1, 3, 8))
        >>> y, variables = layer.init_with_output(jax.random.key(0), x, mask=AttentionMask(causal=True))
        >>> y.shape
        (1, 3, 8)
    """

    config: AttentionConfig
    positions: Positions = NoPositions()
    norm: Norm = RMSNorm()
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(
        self,
        inputs_BTD: Float[Array, "B T D"],
        *,
        memory_BSD: Float[Array, "B S M"] | None = None,
        mask: AttentionMask | Array = AttentionMask(),  # noqa: B008 (frozen)
        positions_BT: Int[Array, "#B T"] | None = None,
        relative_bias: BiasDescription | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Cache]:
        """Attend, and return the cache too where one was given.

        Args:
            inputs_BTD: the queries' hidden states, and without a memory those of keys and values.
            memory_BSD: hidden states of the keys and values of cross-attention.
            mask: who may attend to whom, described or as booleans [B, 1, T, S] (`dot_product_attention`);
                `config.window` and `config.pattern` are added to it.
            positions_BT: for kinds that act here; None means 0, 1, ... (with a `KVCache`: its next slots, and nothing else).
            relative_bias: for t5, which shares one among the layers of a stack.
            cache: what earlier calls left (`layers.cache`). A `KVCache` makes self-attention causal, zeros in
                `mask.query_segment_ids` being right padding; a prefix must come whole, in the first call. A `MemoryCache`
                keeps keys and values of the memory: pass that with the first call only.
            train: drop attention weights, with the `dropout` key.

        Raises:
            ValueError: if the heads do not divide the width, or the arguments contradict each other.
        """
        state = cache or NO_CACHE
        self._check(memory_BSD, positions_BT, state)
        query_BTHK, key_BSGK, value_BSGK = self._project(inputs_BTD, state.key_inputs(inputs_BTD, memory_BSD))
        query_BTHK, key_BSGK = self._rotate(query_BTHK, key_BSGK, state, positions_BT)
        bias = self.positions.bias(self.config.num_heads, relative_bias)
        mask = self._restrict(AttentionMask.of(mask), bias, positions_BT, inputs_BTD.shape[:2])
        key_BSGK, value_BSGK, mask, updated = state.extend(key_BSGK, value_BSGK, mask)
        key_BSGK, value_BSGK = (x_BSGK.astype(self.runtime.dtype) for x_BSGK in (key_BSGK, value_BSGK))
        query_BTHK, key_BSGK = self._relate(query_BTHK, key_BSGK, mask, positions_BT, inputs_BTD.shape[-1])
        backend = state.implementation(self.config.implementation)
        out_BTHK = self._attend(query_BTHK, key_BSGK, value_BSGK, mask, bias, backend, train)
        out_BTD = self._merge(out_BTHK, inputs_BTD.shape[-1])
        return out_BTD if cache is None else (out_BTD, updated)

    def _project(self, inputs_BTD: Array, source_BSD: Array | None) -> tuple[Array, Any, Any]:
        """Queries, keys and values; without hidden states to compute keys from, none of the two."""
        config, head_dim = self.config, self.config.resolved_head_dim(inputs_BTD.shape[-1])
        query_BTHK = self._heads("query", inputs_BTD, config.num_heads, head_dim)
        if source_BSD is None:
            return query_BTHK, None, None
        key_BSGK = self._heads("key", source_BSD, config.kv_heads, head_dim)
        return query_BTHK, key_BSGK, self._heads("value", source_BSD, config.kv_heads, head_dim, normalize=False)

    def _heads(self, role: str, inputs: Array, heads: int, head_dim: int, *, normalize: bool = True) -> Array:
        """Queries, keys or values, with QK-norm where it applies."""
        heads_axis = "heads" if role == "query" else "kv_heads"
        projected = Linear(
            features=(heads, head_dim),
            axes=("embed", heads_axis, "head_dim"),
            use_bias=self.config.use_bias,
            runtime=self.runtime,
            name=role,
        )(inputs)
        if self.config.qk_norm and normalize:
            axes = (heads_axis, "head_dim") if self.config.qk_norm_scope == "all" else ("head_dim",)
            norm: Any = switch(self.norm, RMSNorm.kind)
            projected = Normalize(norm, axes=axes, runtime=self.runtime, name=f"{role}_norm")(projected)
        return self.runtime.constrain(projected, "batch", "length", heads_axis, None)

    def _rotate(self, query_BTHK: Array, key_BSGK: Any, state: Cache, positions_BT: Any) -> tuple[Array, Any]:
        """Queries and new keys with their positions, where these are rotated."""
        num_tokens = query_BTHK.shape[1]

        def positions() -> tuple[Array, Array]:
            places_BS = state.positions(num_tokens, positions_BT)
            if places_BS is None:
                places_BS = jnp.arange(key_BSGK.shape[1], dtype=jnp.int32)[None]
            return places_BS[:, -num_tokens:], places_BS

        return self.positions.rotate(query_BTHK, key_BSGK, positions)

    def _restrict(self, mask: AttentionMask, bias: Any, positions_BT: Any, shape: tuple[int, ...]) -> AttentionMask:
        """A mask with the window and the pattern of the config too, and with positions where more than indices count."""
        if self.config.window > 0:
            window = min(self.config.window, mask.window or self.config.window)
            mask = dataclasses.replace(mask, window=window)
        mask = self.config.pattern.restrict(mask)
        if positions_BT is not None and (bias is not None or mask.pattern is not None):
            # A bias and a pattern see what the mask compares: in a packed row, places within each document. Without given
            # positions these stay the indices, from which a backend knows while tracing which blocks to skip.
            places_BT = jnp.broadcast_to(positions_BT, shape)
            mask = dataclasses.replace(mask, query_positions=places_BT, key_positions=places_BT)
        return mask

    def _relate(
        self, query_BTHK: Array, key_BSGK: Array, mask: AttentionMask, positions_BT: Any, embed_dim: int
    ) -> tuple[Array, Array]:
        """Queries and all keys, those of a cache included, with what their positions add."""

        def positions() -> tuple[Array, Array]:
            if positions_BT is not None:
                return positions_BT, positions_BT
            return mask.query_places(0, query_BTHK.shape[1]), mask.key_places(0, key_BSGK.shape[1])

        relative = RelativePosition(self.positions, embed_dim, self.runtime, name="relative_position")
        return relative(query_BTHK, key_BSGK, positions)

    def _attend(
        self, query: Array, key: Array, value_BSGK: Array, mask: AttentionMask, bias: Any, backend: str, train: bool
    ) -> Array:
        """Means of values [B, T, H, K]; queries and keys may be wider, the scale stays the config's or that of the heads."""
        request: dict[str, Any] = {
            "mask": mask,
            "bias": bias,
            "scale": self.config.query_scale or 1 / math.sqrt(value_BSGK.shape[-1]),
            "logits_soft_cap": self.config.logits_soft_cap,
        }
        if self.is_mutable_collection("attention") and not self.is_initializing():
            if context_size(self.runtime.sharding) > 1:
                raise ValueError(
                    "Attention weights need all keys of a row on one device, got a mesh with a context axis; set none."
                )
            self.sow("attention", "weights", attention_weights(query, key, **request))
        dropout_rate = self.config.dropout if train else 0.0
        return spread_attention(
            query,
            key,
            value_BSGK,
            **request,
            dropout_rate=dropout_rate,
            dropout_key=self.make_rng("dropout") if dropout_rate > 0 else None,
            implementation=backend,
            sharding=self.runtime.sharding,
        )

    def _merge(self, out_BTHK: Array, embed_dim: int) -> Array:
        """The heads as one vector of the stream."""
        out = Linear(
            (embed_dim,),
            ("heads", "head_dim", "embed"),
            use_bias=self.config.use_bias and self.config.out_bias,
            init_scale=self.runtime.residual_init_scale,
            runtime=self.runtime,
            name="out",
        )
        return out(out_BTHK)

    def _check(self, memory_BSD: Any, positions_BT: Any, state: Cache) -> None:
        if positions_BT is not None and not state.takes_positions:
            raise ValueError("With a cache, positions are its next slots; leave positions_BT out.")
        if positions_BT is None and context_size(self.runtime.sharding) > 1:
            raise ValueError(
                "Over a context axis, where a row's places are dealt to devices out of order, attention needs positions_BT."
            )
        if memory_BSD is not None and self.positions.between_tokens:
            raise ValueError(
                f"Cross-attention has no common positions with its memory, got kind={self.positions.kind!r}; "
                "use NoPositions()."
            )
        if memory_BSD is not None and not self.config.pattern.sees_all:
            raise ValueError(
                f"Cross-attention has no blocks in common with its memory, got pattern={self.config.pattern}; "
                "use DensePattern()."
            )
