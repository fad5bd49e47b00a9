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

    With `apply(..., mutable=["attention"])`, the collection `attention` holds the attention weights before dropout, as `weights`,
    float32 [B, H, T, S]. The reference backend `xla` computes them; the output comes from the chosen backend.

    The suffix of an array names its axes: batch B, query positions T, key positions S, query heads H, key/value heads G, width
    of a head K, widths of hidden states D and M (docs/glossary.md).

    Attributes:
        config: number of heads, QK-norm, window, block pattern, soft cap, dropout and backend.
        positions: the position kind. Only rotary, alibi, t5 and transformer_xl act in this layer; learned and sinusoidal
            positions are added to the embeddings.
        norm: the norm of the block. QK-norm is an `RMSNorm` with the same epsilon and unit offset.
        runtime: dtypes, initialisation, `dot_general` and sharding.

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
        """Compute attention.

        Args:
            inputs_BTD: hidden states of the queries; in self-attention, also of the keys and values.
            encoded_BSD: in cross-attention, the encoder output, from which keys and values are computed.
            mask: the keys that each query may attend to, as an `AttentionMask` or booleans [B, 1, T, S]. `config.window` and
                `config.pattern` restrict it further.
            positions_BT: positions of the tokens, for the position kinds that act in this layer. None means 0, 1, ... or, with a
                `KVCache`, its next slots; positions must not be given then.
            relative_bias: the bias of the kind t5, which all layers of a stack share.
            cache: an empty cache in the first call, then the cache returned by the previous call (`layers.cache`). With a
                `KVCache`, self-attention is causal, zeros in `mask.query_segment_ids` mark right padding, and a prefix must be
                complete in the first call. With a `CrossAttentionCache`, give `encoded_BSD` in the first call only.
            train: apply dropout to the attention weights. This needs the random key `dropout`.

        Returns:
            The output [B, T, D]; with a cache, the output and the cache for the next call.

        Raises:
            ValueError: if the heads do not divide the width, or the arguments contradict each other.
        """
        active_cache = cache or NO_CACHE
        self._check(encoded_BSD, positions_BT, active_cache)
        query_BTHK, key_BSGK, value_BSGK = self._project(inputs_BTD, active_cache.key_inputs(inputs_BTD, encoded_BSD))
        query_BTHK, key_BSGK = self._rotate(query_BTHK, key_BSGK, active_cache, positions_BT)
        bias = self.positions.bias(self.config.num_heads, relative_bias)
        mask = self._restrict(AttentionMask.of(mask), bias, positions_BT, inputs_BTD.shape[:2])
        key_BSGK, value_BSGK, mask, next_cache = active_cache.extend(key_BSGK, value_BSGK, mask)
        key_BSGK, value_BSGK = (x_BSGK.astype(self.runtime.dtype) for x_BSGK in (key_BSGK, value_BSGK))
        query_BTHK, key_BSGK = self._add_relative(query_BTHK, key_BSGK, mask, positions_BT, inputs_BTD.shape[-1])
        backend = active_cache.implementation(self.config.implementation)
        out_BTHK = self._attend(query_BTHK, key_BSGK, value_BSGK, mask, bias, backend, train)
        out_BTD = self._project_output(out_BTHK, inputs_BTD.shape[-1])
        return out_BTD if cache is None else (out_BTD, next_cache)

    def _project(self, inputs_BTD: Array, source_BSD: Array | None) -> tuple[Array, Any, Any]:
        """Queries, keys and values. Without `source_BSD`, keys and values are None: the cache has them already."""
        config, head_dim = self.config, self.config.resolved_head_dim(inputs_BTD.shape[-1])
        query_BTHK = self._heads("query", inputs_BTD, config.num_heads, head_dim)
        if source_BSD is None:
            return query_BTHK, None, None
        key_BSGK = self._heads("key", source_BSD, config.kv_heads, head_dim)
        return query_BTHK, key_BSGK, self._heads("value", source_BSD, config.kv_heads, head_dim, normalize=False)

    def _heads(self, role: str, inputs: Array, heads: int, head_dim: int, *, normalize: bool = True) -> Array:
        """The queries, keys or values of all heads: a linear layer, then QK-norm if it is configured."""
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

    def _rotate(self, query_BTHK: Array, key_BSGK: Any, active_cache: Cache, positions_BT: Any) -> tuple[Array, Any]:
        """Queries and new keys. A position kind such as `rotary` rotates them; others change nothing."""
        num_tokens = query_BTHK.shape[1]

        def positions() -> tuple[Array, Array]:
            key_positions_BS = active_cache.positions(num_tokens, positions_BT)
            if key_positions_BS is None:
                key_positions_BS = jnp.arange(key_BSGK.shape[1], dtype=jnp.int32)[None]
            return key_positions_BS[:, -num_tokens:], key_positions_BS

        return self.positions.rotate(query_BTHK, key_BSGK, positions)

    def _restrict(self, mask: AttentionMask, bias: Any, positions_BT: Any, shape: tuple[int, ...]) -> AttentionMask:
        """The mask restricted by the config's window and pattern, with positions if the pattern or a bias needs them."""
        if self.config.window > 0:
            window = min(self.config.window, mask.window or self.config.window)
            mask = dataclasses.replace(mask, window=window)
        mask = self.config.pattern.restrict(mask)
        if positions_BT is not None and (bias is not None or mask.pattern is not None):
            # The mask's positions are also used by biases and patterns. In a packed row they restart in each document.
            # Without given positions the mask keeps indices, which are constants: a backend can skip hidden blocks of keys.
            whole_BT = jnp.broadcast_to(positions_BT, shape)
            mask = dataclasses.replace(mask, query_positions=whole_BT, key_positions=whole_BT)
        return mask

    def _add_relative(
        self, query_BTHK: Array, key_BSGK: Array, mask: AttentionMask, positions_BT: Any, embed_dim: int
    ) -> tuple[Array, Array]:
        """Queries and all keys, also cached ones. A position kind such as `transformer_xl` appends elements to both."""

        def positions() -> tuple[Array, Array]:
            if positions_BT is not None:
                return positions_BT, positions_BT
            return mask.positions_of_queries(0, query_BTHK.shape[1]), mask.positions_of_keys(0, key_BSGK.shape[1])

        relative = RelativePosition(self.positions, embed_dim, self.runtime, name="relative_position")
        return relative(query_BTHK, key_BSGK, positions)

    def _attend(
        self, query: Array, key: Array, value_BSGK: Array, mask: AttentionMask, bias: Any, backend: str, train: bool
    ) -> Array:
        """Outputs [B, T, H, K] of the backend.

        Queries and keys may be wider than K, the width of the values. Without `config.query_scale`, the scale is 1 / sqrt(K).
        """
        arguments: dict[str, Any] = {
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
            self.sow("attention", "weights", attention_weights(query, key, **arguments))
        dropout_rate = self.config.dropout if train else 0.0
        return sharded_attention(
            query,
            key,
            value_BSGK,
            **arguments,
            dropout_rate=dropout_rate,
            dropout_key=self.make_rng("dropout") if dropout_rate > 0 else None,
            implementation=backend,
            sharding=self.runtime.sharding,
        )

    def _project_output(self, out_BTHK: Array, embed_dim: int) -> Array:
        """The output projection, from all heads of a token to one vector."""
        out = Linear(
            (embed_dim,),
            ("heads", "head_dim", "embed"),
            use_bias=self.config.use_bias and self.config.out_bias,
            init_scale=self.runtime.residual_init_scale,
            runtime=self.runtime,
            name="out",
        )
        return out(out_BTHK)

    def _check(self, encoded_BSD: Any, positions_BT: Any, active_cache: Cache) -> None:
        """Raise ValueError if arguments or settings contradict each other."""
        if positions_BT is not None and not active_cache.takes_positions:
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
