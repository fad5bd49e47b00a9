"""Splash attention: JAX's fused kernel for TPUs, built from the description of a mask."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    Mask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jaxtyping import Float

from transformer.model_kinds import BACKENDS, AttentionCall
from transformer.ops.backends.fused import FusedBackend, by_platform
from transformer.ops.masks import AttentionMask

# The kernel needs blocks of whole vector registers of 128 lanes.
_LANES = 128
# A block of logits then has 1 MiB in float32, and occupies the matrix unit for longer than one step of the grid costs.
_LARGEST_BLOCK = 512
# The largest width of key and value together, by bytes per element. Within it, masks and blocks of every kind compile on a v4,
# the TPU with the least memory for a kernel (16 MiB).
_WIDEST_HEADS = {2: 768, 4: 512}
# The logit of an extra key, visible to every query, with value zero: no weight beside other keys, all weight where there is none.
_SINK = -1e30
# Segment ids of hidden queries and keys; they equal no other id and not each other.
_HIDDEN_QUERY, _HIDDEN_KEY = np.iinfo(np.int32).min, np.iinfo(np.int32).min + 1


@BACKENDS.register
@dataclasses.dataclass(frozen=True)
class SplashBackend(FusedBackend):
    """The kernel on a TPU; interpreted, and slow, on a CPU."""

    kind = "splash"
    platform = "tpu"
    takes = frozenset(
        {"causal", "window", "pattern", "query_segment_ids", "key_segment_ids", "key_lengths", "logits_soft_cap"}
    )
    dtypes = ("float32", "bfloat16")

    interpret: bool = False
    """Run the kernel's steps as ordinary operations."""

    def refusal(self, call: AttentionCall) -> str:
        """Also heads that are too wide, patterns whose blocks do not fit the kernel's, and meshes partitioned by XLA."""
        if reason := super().refusal(call):
            return reason
        query, value, pattern = call.query_BTHK, call.value_BSGK, call.mask.pattern
        block, widest = block_size(query.shape[1]), _WIDEST_HEADS[query.dtype.itemsize]
        mesh = jax.sharding.get_abstract_mesh()
        automatic = sorted(set(mesh.axis_names) - set(mesh.manual_axes))
        if query.shape[3] + value.shape[3] > widest:
            return (
                f"heads of {query.shape[3]} and values of {value.shape[3]} (together up to {widest} in {query.dtype})"
            )
        if pattern is not None and block % pattern.block_size and pattern.block_size % block:
            return f"a pattern of blocks of {pattern.block_size} among its own of {block} (one must divide the other)"
        if mesh.size > 1 and automatic:
            return f"mesh axes that XLA partitions, {', '.join(automatic)} (call it inside jax.shard_map over all axes)"
        return ""

    def kernel(self, call: AttentionCall) -> jax.Array:
        """One kernel for each pass over the layer."""
        settings: dict[str, Any] = {"scale": call.scale, "logits_soft_cap": call.logits_soft_cap}
        return splash_attention(*call[:3], mask=call.mask, interpret=self.interpret, **settings)

    def attend(self, call: AttentionCall) -> jax.Array:
        """In programs for TPUs and CPUs only."""
        return by_platform(call, tpu=self, cpu=SplashBackend(interpret=True))


# Compiled as one function: the layers of a model call it with the same shapes and trace it once.
@functools.partial(jax.jit, static_argnames=("scale", "logits_soft_cap", "interpret"))
def splash_attention(
    query_BTHK: Float[jax.Array, "B T H K"],
    key_BSGK: Float[jax.Array, "B S G K"],
    value_BSGK: Float[jax.Array, "B S G W"],
    *,
    mask: AttentionMask,
    scale: float,
    logits_soft_cap: float = 0.0,
    interpret: bool = False,
) -> Float[jax.Array, "B T H W"]:
    """The reference's result from one kernel per pass, which skips blocks of keys that no query of a block sees.

    Grouped heads share their keys without a copy. Queries and keys are padded to whole blocks; gradients are reverse-mode only.
    The scale multiplies the queries, in their own dtype.

    Args:
        query_BTHK: queries, float32 or bfloat16.
        key_BSGK: keys, of the same dtype.
        value_BSGK: values, of the same dtype, of any width.
        mask: supported by `SplashBackend`.
        scale: multiplies the logits.
        logits_soft_cap: bounds the scaled logits; 0 means off.
        interpret: run the kernel's steps as ordinary operations, on any platform and slowly: for tests.
    """
    B, T, H, _ = query_BTHK.shape
    S = key_BSGK.shape[1]
    block_T, block_S = block_size(T), block_size(S)
    query_BHTK = _heads_first(query_BTHK * scale, block_T)
    key_BGSK, value_BGSK = _heads_first(key_BSGK, block_S), _heads_first(value_BSGK, block_S)
    padded = (query_BHTK.shape[2], key_BGSK.shape[2])
    kernel = make_splash_mha(
        MultiHeadMask([_known_mask(mask, S, padded)] * H),
        block_sizes=BlockSizes(
            block_q=block_T,
            block_kv=block_S,
            block_q_dkv=block_T,
            block_kv_dkv=block_S,
            block_q_dq=block_T,
            block_kv_dq=block_S,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=logits_soft_cap or None,
        interpret=interpret,
    )
    sinks_H = jnp.full((H,), _SINK, jnp.float32)
    segments = _segments(mask, B, (T, S), padded)
    out_BHTW: Any = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(query_BHTK, key_BGSK, value_BGSK, segments, sinks_H)
    return jnp.swapaxes(out_BHTW[:, :, :T], 1, 2)


def block_size(length: int) -> int:
    """Number of tokens in a block of queries or keys: the fewest blocks, filled as evenly as possible.

    >>> [block_size(length) for length in (1, 300, 512, 700, 8192)]
    [128, 384, 512, 384, 512]
    """
    blocks = -(-length // _LARGEST_BLOCK)
    return _round_up(-(-length // blocks), _LANES)


@dataclasses.dataclass(frozen=True)
class _StoredMask(Mask):
    """The static part of a mask, read one block at a time; distinct, partly visible blocks become constants."""

    mask: AttentionMask  # without arrays
    num_keys: int  # without padding
    padded: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.padded

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (np.arange(size)[part] for size, part in zip(self.padded, block, strict=True))
        return self.visible(queries[:, None], keys[None, :])

    def visible(self, queries: Any, keys: Any) -> Any:
        visible = self.mask.sees(queries, keys)
        return visible if self.num_keys == self.padded[1] else visible & (keys < self.num_keys)


@dataclasses.dataclass(frozen=True)
class _ComputedMask(_StoredMask):
    """The same mask, computed by the kernel from indices instead of stored; the kernel recognises it by these attributes."""

    @property
    def q_sequence(self) -> np.ndarray:
        return np.arange(self.padded[0], dtype=np.int32)

    @property
    def mask_function(self) -> "_ComputedMask":
        # Not a method: JAX caches compiled programs by this function, and two equal masks must be one cache key.
        return self

    def __call__(self, queries: Any, keys: Any) -> Any:
        return self.visible(queries, keys)


def _known_mask(mask: AttentionMask, num_keys: int, padded: tuple[int, int]) -> Mask:
    known = AttentionMask(causal=mask.causal, window=mask.window, pattern=mask.pattern)
    if known == AttentionMask() and num_keys == padded[1]:
        return FullMask(padded)
    # A pattern divides indices, which a TPU does slowly for every pair. Its blocks repeat: few are distinct, and they are stored.
    return (_ComputedMask if mask.pattern is None else _StoredMask)(known, num_keys, padded)


def _segments(mask: AttentionMask, batch: int, lengths: tuple[int, int], padded: tuple[int, int]) -> SegmentIds | None:
    """Ids of queries and keys, equal where the data allow attention; None if they always do."""
    query_BT, key_BS = mask.query_segment_ids, mask.key_segment_ids
    if query_BT is None and key_BS is None and mask.key_lengths is None:
        return None
    if query_BT is None or key_BS is None:  # with ids of one side, only the zeros matter
        query_BT = jnp.ones((1, lengths[0]), jnp.int32) if query_BT is None else query_BT != 0
        key_BS = jnp.ones((1, lengths[1]), jnp.int32) if key_BS is None else key_BS != 0
    query_BT, key_BS = query_BT.astype(jnp.int32), key_BS.astype(jnp.int32)
    query_BT = jnp.where(query_BT == 0, _HIDDEN_QUERY, query_BT)
    key_BS = jnp.where(key_BS == 0, _HIDDEN_KEY, key_BS)
    if mask.key_lengths is not None:
        inside_BS = jnp.arange(lengths[1], dtype=jnp.int32)[None] < mask.key_lengths[:, None]
        key_BS = jnp.where(inside_BS, key_BS, _HIDDEN_KEY)
        # The static mask hides the padded keys, and padded queries are cut off: the id of either is irrelevant.
    return SegmentIds(
        *(
            jnp.broadcast_to(jnp.pad(ids, ((0, 0), (0, size - ids.shape[1]))), (batch, size))
            for ids, size in zip((query_BT, key_BS), padded, strict=True)
        )
    )


def _heads_first(array_BTHK: jax.Array, block: int) -> jax.Array:
    """[B, T, H, K] -> [B, H, T, K], with T a multiple of `block`."""
    length = array_BTHK.shape[1]
    return jnp.pad(jnp.swapaxes(array_BTHK, 1, 2), ((0, 0), (0, 0), (0, _round_up(length, block) - length), (0, 0)))


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
