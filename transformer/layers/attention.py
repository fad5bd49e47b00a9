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
from transformer.layers.sharded_attention import context_size, sharded_attention
from transformer.model_config import AttentionConfig
from transformer.model_kinds import Norm, Positions
from transformer.ops.backends.xla import attention_weights
from transformer.ops.bias import BiasDescription
from transformer.ops.masks import AttentionMask
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.none import NoPositions


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2): self-attention or cross-attention.

    An `apply` with `mutable=["attention"]` also returns the weights, float32 [B, H, T, S] before dropout, under `weights`. They
    are computed by the reference (`xla`), whatever the backend.

    Attributes:
        config: heads, norms, window, soft cap, dropout, backend.
        positions: rotary, alibi, t5 and transformer_xl act here; other kinds act on the embeddings.
        norm: the block's norm; QK-norm takes its epsilon and its unit offset.
        runtime: types, initialisation, `dot_general` and sharding.

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
        encoded_BSD: Float[Array, "B S M"] | None = None,
        mask: AttentionMask | Array = AttentionMask(),  # noqa: B008 (frozen)
        positions_BT: Int[Array, "#B T"] | None = None,
        relative_bias: BiasDescription | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Cache]:
        """Attend, and also return the cache if one was given.

        Args:
            inputs_BTD: hidden states of the queries; in self-attention, also of keys and values.
            encoded_BSD: hidden states of the keys and values of cross-attention (the encoder output).
            mask: which keys each query may attend to, a description or booleans [B, 1, T, S] (`dot_product_attention`);
                `config.window` and `config.pattern` are added to it.
            positions_BT: for position kinds that act here; None means 0, 1, ... Must be None with a `KVCache`, which uses its
                next slots.
            relative_bias: for t5, whose bias is shared by the layers of a stack.
            cache: the cache returned by the previous call (`layers.cache`). A `KVCache` makes self-attention causal; zeros in
                `mask.query_segment_ids` mark right padding, and the first call must contain a whole prefix. A
                `CrossAttentionCache` keeps keys and values of the encoder output: pass `encoded_BSD` in the first call only.
            train: apply dropout to attention weights, with the `dropout` key.

        Raises:
            ValueError: if the heads do not divide the width, or the arguments contradict each other.
        """
        state = cache or NO_CACHE
        self._check(encoded_BSD, positions_BT, state)
        query_BTHK, key_BSGK, value_BSGK = self._project(inputs_BTD, state.key_inputs(inputs_BTD, encoded_BSD))
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
        """Queries, keys and values; keys and values are None if there are no hidden states to compute them from."""
        config, head_dim = self.config, self.config.resolved_head_dim(inputs_BTD.shape[-1])
        query_BTHK = self._heads("query", inputs_BTD, config.num_heads, head_dim)
        if source_BSD is None:
            return query_BTHK, None, None
        key_BSGK = self._heads("key", source_BSD, config.kv_heads, head_dim)
        return query_BTHK, key_BSGK, self._heads("value", source_BSD, config.kv_heads, head_dim, normalize=False)

    def _heads(self, role: str, inputs: Array, heads: int, head_dim: int, *, normalize: bool = True) -> Array:
        """Queries, keys or values, with QK-norm if configured."""
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
        """Queries and new keys, rotated by their positions where the kind does so."""
        num_tokens = query_BTHK.shape[1]

        def positions() -> tuple[Array, Array]:
            places_BS = state.positions(num_tokens, positions_BT)
            if places_BS is None:
                places_BS = jnp.arange(key_BSGK.shape[1], dtype=jnp.int32)[None]
            return places_BS[:, -num_tokens:], places_BS

        return self.positions.rotate(query_BTHK, key_BSGK, positions)

    def _restrict(self, mask: AttentionMask, bias: Any, positions_BT: Any, shape: tuple[int, ...]) -> AttentionMask:
        """The mask with the config's window and pattern, and with positions where these or a bias need them."""
        if self.config.window > 0:
            window = min(self.config.window, mask.window or self.config.window)
            mask = dataclasses.replace(mask, window=window)
        mask = self.config.pattern.restrict(mask)
        if positions_BT is not None and (bias is not None or mask.pattern is not None):
            # Biases and patterns compare what the mask compares: in a packed row, positions within each document. If no
            # positions are given, they stay indices: from these a backend knows while tracing which blocks to skip.
            places_BT = jnp.broadcast_to(positions_BT, shape)
            mask = dataclasses.replace(mask, query_positions=places_BT, key_positions=places_BT)
        return mask

    def _relate(
        self, query_BTHK: Array, key_BSGK: Array, mask: AttentionMask, positions_BT: Any, embed_dim: int
    ) -> tuple[Array, Array]:
        """Queries and all keys, cached ones included, extended by the position kind."""

        def positions() -> tuple[Array, Array]:
            if positions_BT is not None:
                return positions_BT, positions_BT
            return mask.positions_of_queries(0, query_BTHK.shape[1]), mask.positions_of_keys(0, key_BSGK.shape[1])

        relative = RelativePosition(self.positions, embed_dim, self.runtime, name="relative_position")
        return relative(query_BTHK, key_BSGK, positions)

    def _attend(
        self, query: Array, key: Array, value_BSGK: Array, mask: AttentionMask, bias: Any, backend: str, train: bool
    ) -> Array:
        """Outputs [B, T, H, K]. Queries and keys may be wider than K; the scale is the config's, or computed from K."""
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
        return sharded_attention(
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
        """The output projection: all heads to one vector per token."""
        out = Linear(
            (embed_dim,),
            ("heads", "head_dim", "embed"),
            use_bias=self.config.use_bias and self.config.out_bias,
            init_scale=self.runtime.residual_init_scale,
            runtime=self.runtime,
            name="out",
        )
        return out(out_BTHK)

    def _check(self, encoded_BSD: Any, positions_BT: Any, state: Cache) -> None:
        if positions_BT is not None and not state.takes_positions:
            raise ValueError("With a cache, positions are its next slots; leave positions_BT out.")
        if positions_BT is None and context_size(self.runtime.sharding) > 1:
            raise ValueError(
                "Over a context axis, devices hold positions out of order: attention needs positions_BT; pass it."
            )
        if encoded_BSD is not None and self.positions.between_tokens:
            raise ValueError(
                f"Cross-attention compares no positions of its two sequences, got kind={self.positions.kind!r}; "
                "use NoPositions()."
            )
        if encoded_BSD is not None and not self.config.pattern.sees_all:
            raise ValueError(
                f"Cross-attention has no block pattern across its two sequences, got pattern={self.config.pattern}; "
                "use DensePattern()."
            )
