"""The parts of JAX's private cuDNN function that are used here: packed rows, and programs for absent GPUs."""

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
except ImportError:  # in another version of JAX; `unavailable` reports it
    private: Any = None

HOPPER = (9, 0)
"""Lowest compute capability for packed rows in cuDNN."""
_PARAMETERS = ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type")
# Compute capability of absent GPUs, for which only the name is known.
_CAPABILITIES = {"A100": (8, 0), "H100": HOPPER, "H200": HOPPER, "GH200": HOPPER, "B200": (10, 0)}
# Up to JAX 0.10, key offsets are multiplied by the number of query heads, which is wrong if there are fewer key heads.
_GROUPS = jax.__version_info__ >= (0, 11)
_patched = threading.Lock()


class Target(NamedTuple):
    """The GPU that a program is traced for."""

    capability: tuple[int, ...]
    """Its compute capability; () if unknown."""
    present: bool
    """Whether it is present: JAX can then query it."""


def find_target() -> Target:
    """The devices of the current mesh, or the local GPU."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    here: Any = next((device for device in jax.local_devices() if device.platform == "gpu"), None)
    if here is not None and (device is None or device.device_kind == here.device_kind):
        return Target(tuple(int(part) for part in here.compute_capability.split(".")), present=True)
    kind = "" if device is None else device.device_kind
    return Target(next((found for name, found in _CAPABILITIES.items() if name in kind), ()), present=False)


@contextlib.contextmanager
def traced_for(target: Target) -> Iterator[None]:
    """JAX queries the local GPU for its capabilities; for an absent one, `target` answers while a call is traced."""
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
    """The reason why packed rows do not work with the installed JAX; empty if they do."""
    function = getattr(private, "dot_product_attention", None)
    parameters = inspect.signature(function).parameters if function is not None else {}
    kinds = getattr(getattr(private, "MaskType", None), "__members__", {})
    known = set(_PARAMETERS) <= set(parameters) and {"PADDING", "PADDING_CAUSAL"} <= set(kinds)
    asks = hasattr(private, "check_compute_capability")
    return "" if known and asks else f"packed rows with JAX {jax.__version__} (its private function has changed)"


class Runs(NamedTuple):
    """Start and length of each document of a row, and of its padding; M is the largest number of documents, plus one."""

    starts_BM: Int[jax.Array, "B M"]
    """-1 for unused entries."""
    lengths_BM: Int[jax.Array, "B M"]
    """Likewise."""
    kept_B: Bool[jax.Array, " B"]
    """Whether the ids satisfy `AttentionMask.max_segments`."""


def find_runs(ids_BT: Int[jax.Array, "B T"], most: int) -> Runs:
    """The sequences of rows that hold at most `most` documents.

    Padding is one more sequence, which gives every position a sequence. A kernel leaves other positions uninitialised.

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
    """Attention within each sequence, padding included.

    JAX concatenates the offsets of all rows. It is given the starts only, one for each length: an end offset of one row would
    shift the offsets of all later rows.
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
