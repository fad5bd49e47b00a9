"""What is used of JAX's own function for cuDNN, which is private: packed rows, and GPUs that are not there."""

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from transformer.ops.ids import are_in_order, number_runs

try:
    from jax._src.cudnn import fused_attention_stablehlo as private
except ImportError:  # of another JAX; `unavailable` says so
    private: Any = None

HOPPER = (9, 0)
"""Compute capability from which on cuDNN takes packed rows."""
_PARAMETERS = ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type")
# Of GPUs that are not there, whose names are all that is known.
_CAPABILITIES = {"A100": (8, 0), "H100": HOPPER, "H200": HOPPER, "GH200": HOPPER, "B200": (10, 0)}
# Up to JAX 0.10, offsets of keys are multiplied by the number of query heads, which moves them where there are fewer key heads.
_GROUPS = jax.__version_info__ >= (0, 11)
_patched = threading.Lock()


class Target(NamedTuple):
    """The GPU that a program is traced for."""

    capability: tuple[int, ...]
    """Its compute capability; () if it is unknown."""
    present: bool
    """Whether it is here, so that JAX can ask it."""


def find_target() -> Target:
    """The devices of the mesh that is set, or the GPU at hand."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    here: Any = next((device for device in jax.local_devices() if device.platform == "gpu"), None)
    if here is not None and (device is None or device.device_kind == here.device_kind):
        return Target(tuple(int(part) for part in here.compute_capability.split(".")), present=True)
    kind = "" if device is None else device.device_kind
    return Target(next((found for name, found in _CAPABILITIES.items() if name in kind), ()), present=False)


@contextlib.contextmanager
def traced_for(target: Target) -> Iterator[None]:
    """JAX asks the GPU at hand what it can do; for one that is not there, `target` answers while a call is traced."""
    if target.present or private is None:
        yield
        return

    def capable(wanted: str) -> bool:
        return target.capability >= tuple(int(part) for part in wanted.split("."))

    with _patched:
        asked, private.check_compute_capability = private.check_compute_capability, capable
        try:
            yield
        finally:
            private.check_compute_capability = asked


@functools.cache
def unavailable() -> str:
    """What this version of JAX lacks for packed rows, in words, or nothing."""
    function = getattr(private, "dot_product_attention", None)
    parameters = inspect.signature(function).parameters if function is not None else {}
    kinds = getattr(getattr(private, "MaskType", None), "__members__", {})
    known = set(_PARAMETERS) <= set(parameters) and {"PADDING", "PADDING_CAUSAL"} <= set(kinds)
    asks = hasattr(private, "check_compute_capability")
    return "" if known and asks else f"packed rows with JAX {jax.__version__} (its private function has changed)"


class Runs(NamedTuple):
    """Documents, and the padding behind them, as sequences of each row: M is one more than there may be documents."""

    starts_BM: Int[jax.Array, "B M"]
    """-1 where a row has fewer."""
    lengths_BM: Int[jax.Array, "B M"]
    """Likewise."""
    kept_B: Bool[jax.Array, " B"]
    """Whether the ids are as `AttentionMask.max_segments` promises."""


def find_runs(ids_BT: Int[jax.Array, "B T"], most: int) -> Runs:
    """The sequences of rows of at most `most` documents.

    Padding is one more sequence, so that every position has one: what a kernel does not write is not zero but whatever was there.

    >>> runs = find_runs(jnp.array([[1, 1, 2, 0, 0]]), 3)
    >>> runs.starts_BM.tolist(), runs.lengths_BM.tolist(), runs.kept_B.tolist()
    ([[0, 2, 3, -1]], [[2, 1, 2, -1]], [True])
    """
    numbers_BT = number_runs(ids_BT)
    numbers_M = jnp.arange(1, most + 2, dtype=ids_BT.dtype)
    lengths_BM = jnp.sum(numbers_BT[:, :, None] == numbers_M[None, None], axis=1, dtype=jnp.int32)
    starts_BM = jnp.cumsum(lengths_BM, axis=1, dtype=jnp.int32) - lengths_BM
    there_BM = lengths_BM > 0
    return Runs(
        jnp.where(there_BM, starts_BM, -1),
        jnp.where(there_BM, lengths_BM, -1),
        are_in_order(ids_BT, most),
    )


def packed_attention(
    query_BTHK: Float[jax.Array, "B T H K"],
    key_BTGK: Float[jax.Array, "B T G K"],
    value_BTGK: Float[jax.Array, "B T G K"],
    runs: Runs,
    *,
    causal: bool,
    scale: float,
) -> Float[jax.Array, "B T H K"]:
    """Attention within each of the sequences, padding too.

    JAX joins the offsets of all rows. It is given the starts alone, as many as there are lengths: the end of a row among them
    would shift those of the rows behind it.
    """
    if not _GROUPS and query_BTHK.shape[2] != key_BTGK.shape[2]:
        repeats = query_BTHK.shape[2] // key_BTGK.shape[2]
        key_BTGK, value_BTGK = (jnp.repeat(x, repeats, axis=2) for x in (key_BTGK, value_BTGK))
    offsets = jnp.pad(runs.starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    return private.dot_product_attention(
        query_BTHK,
        key_BTGK,
        value_BTGK,
        q_seqlen=runs.lengths_BM,
        kv_seqlen=runs.lengths_BM,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scale,
        mask_type=private.MaskType["PADDING_CAUSAL" if causal else "PADDING"],
    )
