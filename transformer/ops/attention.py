"""Scaled dot-product attention: one function over all backends, and the reference among them."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from transformer.ops.bias import BiasDescription
from transformer.ops.blockwise import blockwise_attention
from transformer.ops.masks import AttentionMask

Implementation = Literal["auto", "xla", "blockwise"]
Bias = Float[jax.Array, "#B #H T S"] | BiasDescription

# Below every logit, so that a row that sees no key subtracts something finite from its -inf.
_LOWEST = float(jnp.finfo(jnp.float32).min)

# Queries times keys from which on `auto` avoids [T, S] arrays: those of 256 tokens attending to themselves.
_LONG = 256


def dot_product_attention(
    query_BTHK: Float[jax.Array, "B T H K"],
    key_BSGK: Float[jax.Array, "B S G K"],
    value_BSGK: Float[jax.Array, "B S G W"],
    *,
    mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen)
    bias: Bias | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: str = "auto",
) -> Float[jax.Array, "B T H W"]:
    """Means of values weighted by `softmax(cap(scale * query · key) + bias)` (Vaswani et al. 2017, section 3.2.1).

    Logits and softmax are float32; the result has the dtype of the query. A query that sees no key gives zeros.

    Args:
      query_BTHK: Queries; H is a multiple of G, and query head `h` reads key/value head `h // (H / G)` (grouped-query
        attention, Ainslie et al. 2023).
      key_BSGK: Keys, of the same dtype.
      value_BSGK: Values, of the same dtype; their width W may be another than that of the keys.
      mask: Who may attend to whom.
      bias: Added to the logits after scale and cap: an array [B|1, H|1, T, S], or a description such as `AlibiBias`,
        which sees the places that the mask compares (positions where given, else indices).
      scale: Multiplies the logits; None means 1 / sqrt(K).
      logits_soft_cap: Bounds scaled logits by `cap * tanh(logits / cap)`; None or 0 means off.
      dropout_rate: Probability of dropping a weight; the others are divided by 1 - rate.
      dropout_key: A PRNG key, needed if dropout_rate > 0.
      implementation: xla (the reference), blockwise (memory linear in the sequence) or auto, which picks one.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation cannot honour what is asked.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> dot_product_attention(x, x, x, mask=AttentionMask(causal=True)).shape
    (1, 3, 2, 4)
    """
    _check(query_BTHK, key_BSGK, value_BSGK, mask, bias, dropout_rate, dropout_key)
    scale = 1 / math.sqrt(query_BTHK.shape[-1]) if scale is None else scale
    logits_soft_cap = logits_soft_cap or 0.0
    if implementation == "auto":
        implementation = select_implementation(
            query_BTHK.shape[1], key_BSGK.shape[1], bias=bias, dropout_rate=dropout_rate
        )
    if implementation == "blockwise":
        if dropout_rate > 0:
            raise ValueError(
                f"Attention implementation 'blockwise' cannot drop weights, got dropout_rate={dropout_rate}; "
                "use 'xla' or 'auto', or dropout 0."
            )
        return blockwise_attention(
            query_BTHK, key_BSGK, value_BSGK, mask=mask, bias=bias, scale=scale, logits_soft_cap=logits_soft_cap
        )
    if implementation != "xla":
        raise ValueError(f"Attention implementation must be auto, xla or blockwise, got {implementation!r}.")
    weights_BHTS = attention_weights(
        query_BTHK, key_BSGK, mask=mask, bias=bias, scale=scale, logits_soft_cap=logits_soft_cap
    )
    if dropout_rate > 0:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights_BHTS.shape)
        weights_BHTS = jnp.where(kept, weights_BHTS / (1 - dropout_rate), 0)
    B, H, T, S = weights_BHTS.shape
    G = value_BSGK.shape[2]
    weights_BGRTS = weights_BHTS.astype(value_BSGK.dtype).reshape(B, G, H // G, T, S)
    # In this order einsum emits weights @ values; the other way round it is values^T @ weights^T, for which XLA's CPU
    # backend transposes the values: the whole cache, in every step of decoding.
    out_BTGRK = jnp.einsum("BSGK,BGRTS->BTGRK", value_BSGK, weights_BGRTS, preferred_element_type=jnp.float32)
    return out_BTGRK.reshape(B, T, H, -1).astype(query_BTHK.dtype)


def attention_weights(
    query_BTHK: Float[jax.Array, "B T H K"],
    key_BSGK: Float[jax.Array, "B S G K"],
    *,
    mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen)
    bias: Bias | None = None,
    scale: float,
    logits_soft_cap: float = 0.0,
) -> Float[jax.Array, "B H T S"]:
    """The reference's float32 weights: each row sums to one, or is zeros where a query sees no key."""
    B, T, H, _ = query_BTHK.shape
    _, S, G, _ = key_BSGK.shape
    query_BTGRK = query_BTHK.reshape(B, T, G, H // G, -1)
    logits_BHTS = jnp.einsum("BTGRK,BSGK->BGRTS", query_BTGRK, key_BSGK, preferred_element_type=jnp.float32)
    logits_BHTS = logits_BHTS.reshape(B, H, T, S) * scale
    if logits_soft_cap > 0:
        logits_BHTS = logits_soft_cap * jnp.tanh(logits_BHTS / logits_soft_cap)
    if isinstance(bias, BiasDescription):
        logits_BHTS += bias.block(mask.query_places(0, T), mask.key_places(0, S))
    elif bias is not None:
        logits_BHTS += bias.astype(jnp.float32)
    logits_BHTS = jnp.where(mask.to_bool(T, S), logits_BHTS, -jnp.inf)
    peak_BHT1 = jax.lax.stop_gradient(jnp.maximum(logits_BHTS.max(axis=-1, keepdims=True), _LOWEST))
    weights_BHTS = jnp.exp(logits_BHTS - peak_BHT1)
    total_BHT1 = weights_BHTS.sum(axis=-1, keepdims=True)
    return weights_BHTS / jnp.where(total_BHT1 == 0, 1, total_BHT1)


def select_implementation(
    num_queries: int,
    num_keys: int,
    *,
    bias: Bias | None,
    dropout_rate: float,
) -> Literal["xla", "blockwise"]:
    """What `auto` runs, from what is known when tracing.

    The reference, unless its [T, S] arrays are what costs: a long sequence, of which neither the bias nor dropout
    needs such an array anyway.
    """
    dense_bias = bias is not None and not isinstance(bias, BiasDescription)
    if dropout_rate > 0 or dense_bias:
        return "xla"
    return "blockwise" if num_queries * num_keys >= _LONG * _LONG else "xla"


def _check(
    query_BTHK: Any, key_BSGK: Any, value_BSGK: Any, mask: AttentionMask, bias: Any, dropout_rate: float, key: Any
) -> None:
    B, T, H, _ = query_BTHK.shape
    _, S, G, _ = key_BSGK.shape
    if H % G != 0:
        raise ValueError(f"Query heads must be a multiple of key/value heads, got {H} and {G}.")
    if not query_BTHK.dtype == key_BSGK.dtype == value_BSGK.dtype:
        raise ValueError(
            f"Query, key and value must have one dtype, got {query_BTHK.dtype}, {key_BSGK.dtype} and "
            f"{value_BSGK.dtype}; cast them first (a cache to the dtype of the query)."
        )
    mask.check(B, T, S)
    if bias is not None and not isinstance(bias, BiasDescription):
        fits = bias.ndim == 4 and all(size in (1, full) for size, full in zip(bias.shape[:2], (B, H), strict=True))
        if not fits or bias.shape[2:] != (T, S):
            raise ValueError(f"Attention bias must have shape [{B} or 1, {H} or 1, {T}, {S}], got {bias.shape}.")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"Attention dropout_rate must be in [0, 1), got {dropout_rate}.")
    if dropout_rate > 0 and key is None:
        raise ValueError(f"Attention dropout_rate={dropout_rate} needs a dropout_key; pass one, or rate 0 to evaluate.")
