"""cuDNN's fused attention for NVIDIA GPUs, fed from the description of a mask."""

import dataclasses
import functools
import importlib.util
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from transformer.model_kinds import BACKENDS, AttentionCall
from transformer.ops.backends import cudnn_packed
from transformer.ops.backends.cudnn_packed import HOPPER, find_runs, find_target, packed_attention, traced_for
from transformer.ops.backends.fused import FusedBackend, by_platform
from transformer.ops.ids import are_in_order
from transformer.ops.masks import AttentionMask

# JAX checks for cuDNN while tracing, even if the program will run elsewhere.
_INSTALLED = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
# Widest head on GPUs of every generation, and on Hopper and later ones.
_WIDEST_HEAD, _WIDEST_ON_HOPPER = 128, 256
_PROMISE = "a promise of how many there are: data.max_segments in training, AttentionMask(max_segments=) in Python"


@BACKENDS.register
@dataclasses.dataclass(frozen=True)
class CudnnBackend(FusedBackend):
    """cuDNN's kernels on an NVIDIA GPU; rows of several documents need one of Hopper's generation or later."""

    kind = "cudnn"
    platform = "cuda"
    takes = frozenset({"causal", "window", "key_lengths", "query_segment_ids", "key_segment_ids"})
    dtypes = ("bfloat16", "float16")

    def refusal(self, call: AttentionCall) -> str:
        """Also unsupported widths, and unsupported combinations of lengths, segments and windows."""
        if call.dropout_rate > 0:
            return f"dropout_rate={call.dropout_rate} (JAX fixes the seed, so that every step would drop the same)"
        if reason := super().refusal(call):
            return reason
        mask, (T, K), (S, W) = call.mask, call.query_BTHK.shape[1::2], call.value_BSGK.shape[1::2]
        widest = _WIDEST_ON_HOPPER if find_target().capability >= HOPPER else _WIDEST_HEAD
        if K % 8 or not K == W <= widest:
            return (
                f"heads of {K} and values of {W} (one width, a multiple of 8 up to {_WIDEST_HEAD}, or {_WIDEST_ON_HOPPER} on an "
                "H100 or later)"
            )
        # A model is initialised with one token, without a gradient.
        if max(T, S) > 1 and (T % 2 or S % 2):
            return f"{T} queries and {S} keys (even numbers only: for others JAX has no gradient)"
        if mask.causal and T != S:
            return f"causal attention of {T} queries to {S} keys (as many only)"
        if reason := self._refused_segments(call):
            return reason
        hidden = mask.key_lengths is not None or mask.key_segment_ids is not None
        if mask.window > 0 and (not mask.causal or hidden):
            return f"mask.window={mask.window} (with causal=True and without segment ids and key_lengths only)"
        if not _INSTALLED:
            return "a program made without JAX's CUDA plugin (pip install 'jax[cuda12]')"
        return ""

    def _refused_segments(self, call: AttentionCall) -> str:
        """The unsupported part of a call's segment ids, in words; empty if they are supported."""
        mask = call.mask
        given = [name for name in ("query_segment_ids", "key_segment_ids") if getattr(mask, name) is not None]
        if not given:
            return ""
        if mask.max_segments == 0:
            return f"mask.{given[0]} without {_PROMISE}"
        if mask.key_lengths is not None:
            return f"mask.key_lengths beside mask.{given[0]}"
        if mask.max_segments == 1:
            return ""
        if len(given) < 2 or call.query_BTHK.shape[1] != call.key_BSGK.shape[1]:
            return f"mask.{given[0]} with max_segments={mask.max_segments} (1, or self-attention with the ids of both sides)"
        if find_target().capability < HOPPER:
            return (
                f"mask.max_segments={mask.max_segments} for a GPU that is unknown or older than an H100 (with 1, or rows without "
                "segment ids as data.pack=False gives them, for any)"
            )
        # Offsets are int32. They count array elements, not tokens.
        if call.query_BTHK.size >= 2**31:
            return f"packed queries of {call.query_BTHK.size:,} numbers (below 2^31 on a device: fewer rows)"
        return cudnn_packed.unavailable()

    def kernel(self, call: AttentionCall) -> jax.Array:
        """By JAX."""
        with traced_for(find_target()):
            return cudnn_attention(*call[:3], mask=call.mask, scale=call.scale)

    def attend(self, call: AttentionCall) -> jax.Array:
        """In programs for NVIDIA GPUs only."""
        return by_platform(call, cuda=self)


def cudnn_attention(
    query_BTHK: Float[jax.Array, "B T H K"],
    key_BSGK: Float[jax.Array, "B S G K"],
    value_BSGK: Float[jax.Array, "B S G K"],
    *,
    mask: AttentionMask,
    scale: float,
) -> Float[jax.Array, "B T H K"]:
    """The same as the reference in cuDNN's kernels, for a call that `CudnnBackend` does not refuse.

    A row whose segment ids are not as the mask promises becomes NaN.
    """
    rows, arrays = query_BTHK.shape[0], (query_BTHK, key_BSGK, value_BSGK)
    query_ids, key_ids = (
        None if ids is None else jnp.broadcast_to(ids, (rows, ids.shape[1]))
        for ids in (mask.query_segment_ids, mask.key_segment_ids)
    )
    if query_ids is None and key_ids is None:
        return _attend_up_to(mask.key_lengths, *arrays, mask=mask, scale=scale)
    if mask.max_segments > 1:
        assert query_ids is not None and key_ids is not None
        runs = find_runs(query_ids, min(mask.max_segments, query_ids.shape[1]))
        out_BTHK = packed_attention(*arrays, runs, causal=mask.causal, scale=scale)
        kept_B = runs.kept_B & jnp.all(query_ids == key_ids, axis=1)
    else:
        lengths_B = None if key_ids is None else jnp.sum(key_ids != 0, axis=1, dtype=jnp.int32)
        out_BTHK = _attend_up_to(lengths_B, *arrays, mask=mask, scale=scale)
        kept_B = functools.reduce(operator.and_, (are_in_order(x, 1) for x in (query_ids, key_ids) if x is not None))
    if query_ids is not None:
        out_BTHK = jnp.where((query_ids != 0)[:, :, None, None], out_BTHK, 0)
    return jnp.where(kept_B[:, None, None, None], out_BTHK, jnp.nan)


def _attend_up_to(lengths_B: Any, *arrays: jax.Array, mask: AttentionMask, scale: float) -> jax.Array:
    """By `jax.nn`, to the first keys of each row, or to all; a row without any gives zeros."""
    rows, num_keys = arrays[1].shape[:2]
    lengths_B = None if lengths_B is None else jnp.broadcast_to(lengths_B, (rows,)).astype(jnp.int32)
    out_BTHK = jax.nn.dot_product_attention(
        *arrays,
        scale=scale,
        is_causal=mask.causal,
        # A query that sees no key gives an average there: it sees one, and what it says is dropped.
        key_value_seq_lengths=None if lengths_B is None else jnp.clip(lengths_B, 1, num_keys),
        local_window_size=(mask.window - 1, 0) if mask.window > 0 else None,
        implementation="cudnn",
    )
    return out_BTHK if lengths_B is None else jnp.where((lengths_B > 0)[:, None, None, None], out_BTHK, 0)
