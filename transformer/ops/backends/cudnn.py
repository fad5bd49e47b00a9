"""cuDNN's fused attention for NVIDIA GPUs, by way of `jax.nn`, fed from the description of a mask."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
from jaxtyping import Float

from transformer.model_kinds import BACKENDS, AttentionCall
from transformer.ops.backends.fused import FusedBackend, by_platform
from transformer.ops.masks import AttentionMask

# JAX looks for cuDNN while tracing, wherever the program will run.
_INSTALLED = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
# What GPUs of every generation take; which one it will be is unknown when tracing.
_WIDEST_HEAD = 128


@BACKENDS.register
@dataclasses.dataclass(frozen=True)
class CudnnBackend(FusedBackend):
    """cuDNN's kernels on an NVIDIA GPU; in rows of one document each."""

    kind = "cudnn"
    platform = "cuda"
    takes = frozenset({"causal", "window", "key_lengths"})
    dtypes = ("bfloat16", "float16")

    def refusal(self, call: AttentionCall) -> str:
        """Also widths, and lengths and windows that do not go together."""
        if reason := super().refusal(call):
            return reason
        mask, (T, K), (S, W) = call.mask, call.query_BTHK.shape[1::2], call.value_BSGK.shape[1::2]
        if K % 8 or K > _WIDEST_HEAD or W != K:
            return f"heads of {K} and values of {W} (one width, a multiple of 8 up to {_WIDEST_HEAD})"
        if mask.causal and T != S:
            return f"causal attention of {T} queries to {S} keys (as many only)"
        if mask.window > 0 and (not mask.causal or mask.key_lengths is not None):
            return f"mask.window={mask.window} (with causal=True and without key_lengths only)"
        if not _INSTALLED:
            return "a program made without JAX's CUDA plugin (pip install 'jax[cuda12]')"
        return ""

    def kernel(self, call: AttentionCall) -> jax.Array:
        """By `jax.nn`."""
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
    """The same as the reference in cuDNN's kernels, for a call that `CudnnBackend` does not refuse."""
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
