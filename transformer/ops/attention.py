"""Scaled dot-product attention: one function over all backends (`ops/backends`)."""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from transformer.model_kinds import BACKENDS, AttentionBackend, AttentionCall
from transformer.ops.bias import Bias, BiasDescription, check_bias
from transformer.ops.masks import AttentionMask
from transformer.ops.visible import mark_attention
from transformer.validation import require

ATTENTION_SCOPE = "dot_product_attention"
"""The `jax.named_scope` of all attention operations except the projections."""


class Request(NamedTuple):
    """One call of attention: its arguments, and the backend that its config names."""

    configured: AttentionBackend
    call: AttentionCall

    def backend(self, platform: str) -> str:
        """The name of the backend that computes this call on a platform (cpu, cuda, tpu, ...)."""
        return self.configured.on(platform, self.call).kind


_requests: contextvars.ContextVar[list[Request] | None] = contextvars.ContextVar("requests", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Request]]:
    """A list that collects the arguments of every attention call traced inside the `with` block."""
    found: list[Request] = []
    before = _requests.set(found)
    try:
        yield found
    finally:
        _requests.reset(before)


@jax.named_scope(ATTENTION_SCOPE)
def dot_product_attention(
    query_BTHK: Float[jax.Array, "B T H K"],
    key_BSGK: Float[jax.Array, "B S G K"],
    value_BSGK: Float[jax.Array, "B S G W"],
    *,
    mask: AttentionMask | jax.Array = AttentionMask(),  # noqa: B008 (frozen)
    bias: Bias | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "auto",
) -> Float[jax.Array, "B T H W"]:
    """Means of values weighted by `softmax(cap(scale * query · key) + bias)` (Vaswani et al. 2017, section 3.2.1).

    Logits and softmax are float32; the result has the dtype of the query. A query that sees no key gives zeros.

    Args:
      query_BTHK: Queries; H is a multiple of G, and query head `h` reads key/value head `h // (H / G)` (grouped-query
        attention, Ainslie et al. 2023).
      key_BSGK: Keys, of the same dtype.
      value_BSGK: Values, of the same dtype. Their width W may differ from the width K of the keys.
      mask: Which keys each query may attend to: a description, or a boolean array [B, 1, T, S]. Sizes may be 1, heads may
        differ, and True means visible, as in `nn.make_causal_mask(..., dtype=bool)`. Only xla takes booleans; auto then picks it.
      bias: Added to the logits after scale and cap: a floating-point array [B|1, H|1, T, S], or a description such as
        `AlibiBias`. A description reads the positions that the mask compares (given positions, else indices). A boolean bias is
        refused: visibility belongs to the mask.
      scale: Multiplies the logits; None means 1 / sqrt(K).
      logits_soft_cap: Bounds scaled logits by `cap * tanh(logits / cap)`; None or 0 means off.
      dropout_rate: Probability of dropping a weight; the others are divided by 1 - rate.
      dropout_key: A PRNG key, needed if dropout_rate > 0.
      implementation: xla (the reference); blockwise (memory linear in the sequence, any platform); splash (TPU; interpreted,
        and slow, on a CPU); cudnn (NVIDIA GPU); a registered backend (`BACKENDS`); or auto. Auto picks a suitable one for each
        platform. The platform is the one that a program is lowered for; it need not be present.

    Raises:
      ValueError: if shapes or dtypes do not fit, the bias does not hold floating-point numbers, or the implementation does not
        support one of the arguments.
      NotImplementedError: from JAX, if a program with splash or cudnn is lowered for a platform that has none. (One program for
        several platforms, as `jax.export` makes, needs xla or blockwise.)

    >>> x = jax.numpy.ones((1, 3, 2, 4))
    >>> dot_product_attention(x, x, x, mask=AttentionMask(causal=True)).shape
    (1, 3, 2, 4)
    """
    mask = AttentionMask.of(mask)
    _check(query_BTHK, key_BSGK, value_BSGK, mask, bias, dropout_rate, dropout_key)
    backend: AttentionBackend = BACKENDS.find(implementation)()
    scale, soft_cap = 1 / math.sqrt(query_BTHK.shape[-1]) if scale is None else scale, logits_soft_cap or 0.0
    call = AttentionCall(query_BTHK, key_BSGK, value_BSGK, mask, bias, scale, soft_cap, dropout_rate, dropout_key)
    if (found := _requests.get()) is not None:
        found.append(Request(backend, call))
    reason = backend.refusal(call)
    require(
        not reason,
        f"Attention implementation {implementation!r} cannot honour {reason}; use 'auto', or leave that out.",
    )
    # A name adds no operation. `training.flops` reads it where it counts the operations of attention.
    return checkpoint_name(backend.attend(call), mark_attention(mask, query_BTHK, key_BSGK, value_BSGK))


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
    mask.check(B, T, S, H)
    check_bias(bias)
    if bias is not None and not isinstance(bias, BiasDescription):
        fits = bias.ndim == 4 and all(size in (1, full) for size, full in zip(bias.shape[:2], (B, H), strict=True))
        if not fits or bias.shape[2:] != (T, S):
            raise ValueError(f"Attention bias must have shape [{B} or 1, {H} or 1, {T}, {S}], got {bias.shape}.")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"Attention dropout_rate must be in [0, 1), got {dropout_rate}.")
    if dropout_rate > 0 and key is None:
        raise ValueError(f"Attention dropout_rate={dropout_rate} needs a dropout_key; pass one, or rate 0 to evaluate.")
