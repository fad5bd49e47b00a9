"""Scaled dot-product attention: one function over all backends, and the reference among them."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from transformer.ops.bias import Bias, BiasDescription, bias_block, check_bias
from transformer.ops.blockwise import blockwise_attention
from transformer.ops.cudnn import cudnn_attention, cudnn_refusal
from transformer.ops.first_order import first_order
from transformer.ops.masks import AttentionMask
from transformer.ops.splash import splash_attention, splash_refusal
from transformer.ops.visible import mark_attention

Implementation = Literal["auto", "xla", "blockwise", "splash", "cudnn"]

# Below every logit, so that a row that sees no key subtracts something finite from its -inf.
_LOWEST = float(jnp.finfo(jnp.float32).min)

# Queries times keys from which on `auto` avoids [T, S] arrays: those of 256 tokens attending to themselves.
_LONG = 256
# Queries, and keys, from which on `auto` takes the kernel made for the platform. A block of 512 by 512 keeps a TPU's matrix unit
# busy for about the 0.35 µs that a step of a kernel's grid costs beside; below, blocks are smaller and XLA's fusions as good.
_FUSED_LENGTH = 512
_FUSED = {"tpu": "splash", "cuda": "cudnn"}

ATTENTION_SCOPE = "dot_product_attention"
"""In the names of all operations of attention, projections left out."""


class Request(NamedTuple):
    """What attention was called with, as far as the choice of a backend goes by it; arrays count by shape and dtype."""

    implementation: str
    operands: tuple[Any, Any, Any]
    settings: dict[str, Any]

    def backend(self, platform: str) -> str:
        """The backend on a platform (cpu, cuda, tpu, ...)."""
        if self.implementation != "auto":
            return self.implementation
        return select_implementation(platform, *self.operands, **self.settings)


_requests: contextvars.ContextVar[list[Request] | None] = contextvars.ContextVar("requests", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Request]]:
    """A list of what attention is called with inside, once for each call that is traced."""
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
      mask: Who may attend to whom: a description, or booleans [B, 1, T, S] (sizes may be 1, heads may differ), True for what
        is seen, as `nn.make_causal_mask(..., dtype=bool)` makes them. Only xla takes booleans, and auto then picks it.
      bias: Added to the logits after scale and cap: a floating-point array [B|1, H|1, T, S], or a description such as
        `AlibiBias`, which sees the places that the mask compares (positions where given, else indices). Booleans are refused:
        who may attend to whom is the mask's affair.
      scale: Multiplies the logits; None means 1 / sqrt(K).
      logits_soft_cap: Bounds scaled logits by `cap * tanh(logits / cap)`; None or 0 means off.
      dropout_rate: Probability of dropping a weight; the others are divided by 1 - rate.
      dropout_key: A PRNG key, needed if dropout_rate > 0.
      implementation: xla (the reference); blockwise (memory linear in the sequence, any platform); splash (TPU; interpreted,
        and slow, on a CPU); cudnn (NVIDIA GPU); or auto, for each platform what `select_implementation` says. The platform is
        the one that a program is lowered for, which need not be there; others leave no trace in it.

    Raises:
      ValueError: if shapes or dtypes do not fit, the bias does not hold floating-point numbers, or the implementation cannot
        honour what is asked.
      NotImplementedError: from JAX, if a program with splash or cudnn is lowered for a platform that has none. (One program for
        several platforms, as `jax.export` makes, needs xla or blockwise.)

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> dot_product_attention(x, x, x, mask=AttentionMask(causal=True)).shape
    (1, 3, 2, 4)
    """
    mask = AttentionMask.of(mask)
    _check(query_BTHK, key_BSGK, value_BSGK, mask, bias, dropout_rate, dropout_key)
    if (found := _requests.get()) is not None:
        choice = {"mask": mask, "bias": bias, "logits_soft_cap": logits_soft_cap or 0.0, "dropout_rate": dropout_rate}
        found.append(Request(implementation, (query_BTHK, key_BSGK, value_BSGK), choice))
    out_BTHW = _attend(
        query_BTHK,
        key_BSGK,
        value_BSGK,
        mask=mask,
        bias=bias,
        scale=1 / math.sqrt(query_BTHK.shape[-1]) if scale is None else scale,
        logits_soft_cap=logits_soft_cap or 0.0,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        implementation=implementation,
    )
    # A name is no operation: it is read where those of attention are counted (`training.flops`).
    return checkpoint_name(out_BTHW, mark_attention(mask, query_BTHK, key_BSGK, value_BSGK))


def _attend(
    query_BTHK: Any,
    key_BSGK: Any,
    value_BSGK: Any,
    *,
    mask: AttentionMask,
    bias: Any,
    scale: float,
    logits_soft_cap: float,
    dropout_rate: float,
    dropout_key: Any,
    implementation: str,
) -> Float[jax.Array, "B T H W"]:
    request: dict[str, Any] = {"logits_soft_cap": logits_soft_cap, "dropout_rate": dropout_rate}
    operands = (query_BTHK, key_BSGK, value_BSGK, mask, bias)

    def backend(name: str, *, interpret: bool = False) -> Callable[..., Any]:
        def attend(query: Any, key: Any, value: Any, mask: AttentionMask, bias: Any) -> Any:
            settings: dict[str, Any] = {"mask": mask, "scale": scale}
            if name == "cudnn":
                return first_order(lambda *given: cudnn_attention(*given[:3], mask=given[3], scale=scale))(
                    query, key, value, mask
                )
            settings["logits_soft_cap"] = logits_soft_cap
            if name == "splash":
                fixed = {"scale": scale, "logits_soft_cap": logits_soft_cap, "interpret": interpret}
                return first_order(lambda *given: splash_attention(*given[:3], mask=given[3], **fixed))(
                    query, key, value, mask
                )
            if name == "blockwise":
                return blockwise_attention(query, key, value, bias=bias, **settings)
            dropout = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
            return _reference(query, key, value, bias=bias, **dropout, **settings)

        return attend

    if implementation == "auto":
        names = {
            platform: select_implementation(platform, *operands[:3], mask=mask, bias=bias, **request)
            for platform in ("cpu", *_FUSED)
        }
        default = names.pop("cpu")
        fused = {platform: backend(name) for platform, name in names.items() if name != default}
        # A switch in which the others leave their marks (residuals, time to trace) only where there is something to choose.
        attend = backend(default)
        return jax.lax.platform_dependent(*operands, default=attend, **fused) if fused else attend(*operands)
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"Attention implementation must be {', '.join(get_args(Implementation)[:-1])} or cudnn, got {implementation!r}."
        )
    reason = _refusal(implementation, *operands[:3], mask=mask, bias=bias, **request)
    if reason:
        raise ValueError(
            f"Attention implementation {implementation!r} cannot honour {reason}; use 'auto', or leave that out."
        )
    if implementation == "splash":
        interpreted = backend("splash", interpret=True)
        return jax.lax.platform_dependent(*operands, tpu=backend("splash"), cpu=interpreted)
    if implementation == "cudnn":
        return jax.lax.platform_dependent(*operands, cuda=backend("cudnn"))
    return backend(implementation)(*operands)


def _reference(
    query_BTHK: Any,
    key_BSGK: Any,
    value_BSGK: Any,
    *,
    mask: AttentionMask,
    bias: Any,
    scale: float,
    logits_soft_cap: float,
    dropout_rate: float,
    dropout_key: Any,
) -> Float[jax.Array, "B T H W"]:
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
    check_bias(bias)
    B, T, H, _ = query_BTHK.shape
    _, S, G, _ = key_BSGK.shape
    query_BTGRK = query_BTHK.reshape(B, T, G, H // G, -1)
    logits_BHTS = jnp.einsum("BTGRK,BSGK->BGRTS", query_BTGRK, key_BSGK, preferred_element_type=jnp.float32)
    logits_BHTS = logits_BHTS.reshape(B, H, T, S) * scale
    if logits_soft_cap > 0:
        logits_BHTS = logits_soft_cap * jnp.tanh(logits_BHTS / logits_soft_cap)
    if isinstance(bias, BiasDescription):
        logits_BHTS += bias_block(bias, mask.query_places(0, T), mask.key_places(0, S))
    elif bias is not None:
        logits_BHTS += bias.astype(jnp.float32)
    logits_BHTS = jnp.where(mask.to_bool(T, S), logits_BHTS, -jnp.inf)
    peak_BHT1 = jax.lax.stop_gradient(jnp.maximum(logits_BHTS.max(axis=-1, keepdims=True), _LOWEST))
    weights_BHTS = jnp.exp(logits_BHTS - peak_BHT1)
    total_BHT1 = weights_BHTS.sum(axis=-1, keepdims=True)
    return weights_BHTS / jnp.where(total_BHT1 == 0, 1, total_BHT1)


def select_implementation(
    platform: str,
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: AttentionMask,
    bias: Bias | None = None,
    logits_soft_cap: float = 0.0,
    dropout_rate: float = 0.0,
) -> str:
    """What `auto` runs on a platform (cpu, cuda, tpu, ...), from what is known when tracing: arrays count by shape and dtype.

    The kernel made for the platform, for sequences long enough, if it can honour all that is asked. Otherwise the reference,
    unless its [T, S] arrays are what costs: a long sequence, of which neither the bias nor dropout needs such an array anyway.
    """
    T, S = query.shape[1], key.shape[1]
    request: dict[str, Any] = {"mask": mask, "bias": bias, "dropout_rate": dropout_rate}
    if platform in _FUSED and min(T, S) >= _FUSED_LENGTH:
        fused = _FUSED[platform]
        if not _refusal(fused, query, key, value, logits_soft_cap=logits_soft_cap, **request):
            return fused
    dense_bias = bias is not None and not isinstance(bias, BiasDescription)
    if dropout_rate > 0 or dense_bias or mask.visible is not None:
        return "xla"
    return "blockwise" if T * S >= _LONG * _LONG else "xla"


def _refusal(
    implementation: str,
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: AttentionMask,
    bias: Any,
    logits_soft_cap: float,
    dropout_rate: float,
) -> str:
    """What an implementation cannot honour, in words, or nothing."""
    if implementation != "xla" and dropout_rate > 0:
        return f"dropout_rate={dropout_rate}"
    if implementation != "xla" and mask.visible is not None:
        return "an array as mask (an AttentionMask describes causal masks, windows, segments and lengths)"
    if implementation not in _FUSED.values():
        return ""
    if bias is not None:
        return "a bias"
    if isinstance(query, jax.Array) and jax.typeof(query).manual_axis_type.varying:
        return "arrays that jax.shard_map follows over the mesh (give it check_vma=False)"
    if implementation == "splash":
        return splash_refusal(query, value, mask=mask)
    return cudnn_refusal(query, key, value, mask=mask, logits_soft_cap=logits_soft_cap)


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
