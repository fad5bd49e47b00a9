"""Segment-level recurrence: what each layer keeps of the rows before, for the rows that continue them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.ops.masks import AttentionMask


def remember(earlier_BPD: Float[Array, "B P D"], inputs_BTD: Float[Array, "B T D"]) -> Float[Array, "B P D"]:
    """The last P of a layer's inputs up to now, without a gradient (Dai et al. 2019, section 3.2)."""
    both = jnp.concatenate([earlier_BPD, inputs_BTD.astype(earlier_BPD.dtype)], axis=1)
    return jax.lax.stop_gradient(both[:, inputs_BTD.shape[1] :])


def recurrent_mask(
    mask: AttentionMask, positions_BT: Int[Array, "#B T"], batch_size: int, num_earlier: int
) -> AttentionMask:
    """The mask of rows with `num_earlier` vectors before them.

    A row's first position p says that it continues a document of which p tokens came before: the last p vectors, as far
    as there are so many, are of its first segment, the others of none. With 4 remembered and p = 2, causal:

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
    )


def by_layer(recurrence_BLPD: Float[Array, "B L P D"], periods: int, scanned: bool) -> tuple[Array, ...]:
    """An array for each block of a loop, or for each of a period, with a leading axis of periods, of a scan."""
    layers_LBPD = jnp.moveaxis(recurrence_BLPD, 1, 0)
    if not scanned:
        return tuple(layers_LBPD)
    return tuple(layers_LBPD[block :: len(layers_LBPD) // periods] for block in range(len(layers_LBPD) // periods))


def by_row(layers: tuple[Array, ...], scanned: bool) -> Float[Array, "B L P D"]:
    """The inverse of `by_layer`."""
    stacked = jnp.stack(layers, axis=1 if scanned else 0)
    return jnp.moveaxis(stacked.reshape(-1, *stacked.shape[-3:]), 0, 1)
