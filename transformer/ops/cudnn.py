"""cuDNN's fused attention for NVIDIA GPUs, by way of `jax.nn`, fed from the description of a mask."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from transformer.ops.masks import AttentionMask

# JAX looks for cuDNN while tracing, wherever the program will run.
_INSTALLED = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
# What GPUs of every generation take; which one it will be is unknown when tracing.
_WIDEST_HEAD = 128


def cudnn_refusal(query: Any, key: Any, value: Any, *, mask: AttentionMask, logits_soft_cap: float) -> str:
    """What cuDNN cannot honour, in words, or nothing; from what is known when tracing."""
    given = [
        name
        for name in (
            "query_segment_ids",
            "key_segment_ids",
            "query_positions",
            "key_positions",
            "key_prefix",
            "query_offset",
            "pattern",
        )
        if getattr(mask, name) is not None
    ]
    T, K, S, W = query.shape[1], query.shape[3], key.shape[1], value.shape[3]
    if given:
        return f"mask.{given[0]}"
    if logits_soft_cap > 0:
        return f"logits_soft_cap={logits_soft_cap}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"inputs of {query.dtype} (bfloat16 and float16 only)"
    if K % 8 or K > _WIDEST_HEAD or W != K:
        return f"heads of {K} and values of {W} (one width, a multiple of 8 up to {_WIDEST_HEAD})"
    if mask.causal and T != S:
        return f"causal attention of {T} queries to {S} keys (as many only)"
    if mask.window > 0 and (not mask.causal or mask.key_lengths is not None):
        return f"mask.window={mask.window} (with causal=True and without key_lengths only)"
    if not _INSTALLED:
        return "a program made without JAX's CUDA plugin (pip install 'jax[cuda12]')"
    return ""


def cudnn_attention(
    query_BTHK: Float[jax.Array, "B T H K"],
    key_BSGK: Float[jax.Array, "B S G K"],
    value_BSGK: Float[jax.Array, "B S G K"],
    *,
    mask: AttentionMask,
    scale: float,
) -> Float[jax.Array, "B T H K"]:
    """The same as the reference in cuDNN's kernels, for a request that `cudnn_refusal` does not name."""
    B, lengths_B = query_BTHK.shape[0], None
    if mask.key_lengths is not None:
        lengths_B = jnp.broadcast_to(mask.key_lengths, (B,)).astype(jnp.int32)
    out_BTHK = jax.nn.dot_product_attention(
        query_BTHK,
        key_BSGK,
        value_BSGK,
        scale=scale,
        is_causal=mask.causal,
        # A query that sees no key gives an average there: it sees one, and what it says is dropped.
        key_value_seq_lengths=None if lengths_B is None else jnp.clip(lengths_B, 1, key_BSGK.shape[1]),
        local_window_size=(mask.window - 1, 0) if mask.window > 0 else None,
        implementation="cudnn",
    )
    return out_BTHK if lengths_B is None else jnp.where((lengths_B > 0)[:, None, None, None], out_BTHK, 0)
