"""The reference: attention in plain JAX with [T, S] arrays of logits and weights, for every kind of call."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from transformer.model_kinds import BACKENDS, AttentionBackend, AttentionCall
from transformer.ops.bias import Bias, BiasDescription, bias_block, check_bias
from transformer.ops.masks import AttentionMask

LOWEST = float(jnp.finfo(jnp.float32).min)
"""Less than every logit: in a row without a visible key, it keeps the maximum finite."""


@BACKENDS.register
@dataclasses.dataclass(frozen=True)
class XLABackend(AttentionBackend):
    """The definition of correct."""

    kind = "xla"
    takes = frozenset(x.name for x in dataclasses.fields(AttentionMask) if not x.metadata.get("promise")) | {
        "bias",
        "logits_soft_cap",
        "dropout_rate",
    }

    def compute(self, call: AttentionCall) -> Float[jax.Array, "B T H W"]:
        """`attention_weights`, after dropout, times the values."""
        weights_BHTS = attention_weights(
            call.query_BTHK,
            call.key_BSGK,
            mask=call.mask,
            bias=call.bias,
            scale=call.scale,
            logits_soft_cap=call.logits_soft_cap,
        )
        if call.dropout_rate > 0:
            kept = jax.random.bernoulli(call.dropout_key, 1 - call.dropout_rate, weights_BHTS.shape)
            weights_BHTS = jnp.where(kept, weights_BHTS / (1 - call.dropout_rate), 0)
        value_BSGK, (B, H, T, S) = call.value_BSGK, weights_BHTS.shape
        G = value_BSGK.shape[2]
        weights_BGRTS = weights_BHTS.astype(value_BSGK.dtype).reshape(B, G, H // G, T, S)
        # In this order, einsum emits weights @ values. The other order gives values^T @ weights^T, for which XLA's CPU backend
        # transposes the values: the whole cache, in every step of decoding.
        out_BTGRK = jnp.einsum("BSGK,BGRTS->BTGRK", value_BSGK, weights_BGRTS, preferred_element_type=jnp.float32)
        return out_BTGRK.reshape(B, T, H, -1).astype(call.query_BTHK.dtype)

    def preferred(self, call: AttentionCall, platform: str) -> bool:
        """True where no other backend is preferred."""
        del call, platform
        return True


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
    check_bias(bias)
    B, T, H, _ = query_BTHK.shape
    _, S, G, _ = key_BSGK.shape
    query_BTGRK = query_BTHK.reshape(B, T, G, H // G, -1)
    logits_BHTS = jnp.einsum("BTGRK,BSGK->BGRTS", query_BTGRK, key_BSGK, preferred_element_type=jnp.float32)
    logits_BHTS = logits_BHTS.reshape(B, H, T, S) * scale
    if logits_soft_cap > 0:
        logits_BHTS = logits_soft_cap * jnp.tanh(logits_BHTS / logits_soft_cap)
    if isinstance(bias, BiasDescription):
        logits_BHTS += bias_block(bias, mask.positions_of_queries(0, T), mask.positions_of_keys(0, S))
    elif bias is not None:
        logits_BHTS += bias.astype(jnp.float32)
    logits_BHTS = jnp.where(mask.to_bool(T, S), logits_BHTS, -jnp.inf)
    peak_BHT1 = jax.lax.stop_gradient(jnp.maximum(logits_BHTS.max(axis=-1, keepdims=True), LOWEST))
    weights_BHTS = jnp.exp(logits_BHTS - peak_BHT1)
    total_BHT1 = weights_BHTS.sum(axis=-1, keepdims=True)
    return weights_BHTS / jnp.where(total_BHT1 == 0, 1, total_BHT1)
