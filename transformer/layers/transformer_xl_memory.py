"""Segment-level recurrence (Transformer-XL): the mask of rows that continue the previous ones."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from transformer.ops.masks import AttentionMask


def mask_with_memory(
    mask: AttentionMask, positions_BT: Int[Array, "#B T"], batch_size: int, num_earlier: int
) -> AttentionMask:
    """The mask of rows with `num_earlier` memory vectors before them.

    The first position p of a row is the number of earlier tokens of its document. The last p memory vectors (or all, if there
    are fewer) belong to the row's first segment; the others are hidden. With a memory of 4 and p = 2, causal:

        0 0 1 1   1 0 0
        0 0 1 1   1 1 0
        0 0 1 1   1 1 1
    """
    num_tokens = positions_BT.shape[1]
    segments_BT = mask.query_segment_ids
    segments_BT = jnp.ones((batch_size, num_tokens), jnp.int32) if segments_BT is None else segments_BT
    back_P = num_earlier - jnp.arange(num_earlier, dtype=jnp.int32)
    seen_BP = back_P[None] <= positions_BT[:, :1]
    segments_BP = jnp.where(seen_BP, segments_BT[:, :1], 0)
    return dataclasses.replace(
        mask,
        query_segment_ids=segments_BT,
        key_segment_ids=jnp.concatenate([segments_BP, segments_BT], axis=1),
        query_offset=jnp.full((1,), num_earlier, jnp.int32),
        max_segments=0,  # ids of the memory may have gaps, and may be padding
    )
