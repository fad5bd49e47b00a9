"""Ring attention: each device keeps its queries, and keys and values pass from device to device."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.ops.backends.blockwise import Blocks, Settings, Softmax, attend_backward, attend_forward
from transformer.ops.backends.xla import LOWEST
from transformer.ops.bias import Bias, BiasDescription, check_bias
from transformer.ops.masks import AttentionMask
from transformer.ops.zigzag import balanced_order
from transformer.validation import require

# Up to this many local queries, blocks are unrolled, as in `ops.backends.blockwise`.
_UNROLLED_QUERIES = 512
# Block size for more queries. The late half of the queries meets whole pieces of keys: both must be multiples of it.
_SMALLEST_BLOCK = 64


def ring_attention(
    query_BTHK: Float[Array, "B T H K"],
    key_BSGK: Float[Array, "B S G K"],
    value_BSGK: Float[Array, "B S G W"],
    *,
    mask: AttentionMask,
    axis_name: str,
    bias: Bias | None = None,
    scale: float,
    logits_soft_cap: float = 0.0,
) -> Float[Array, "B T H W"]:
    """The reference's result for rows whose positions are assigned by `balanced_order` (Liu et al. 2023).

    Call it inside `jax.shard_map`, with this device's T of the n * T positions of each row. In n - 1 communication steps every
    device receives the keys of every other; in the backward pass, the gradients of keys and values travel with them. In causal
    attention, each device computes half of the pairs in every step: the visible ones.

    Args:
        query_BTHK: queries of this device.
        key_BSGK: keys at the same positions; S = T.
        value_BSGK: values at the same positions.
        mask: its arrays are this device's part. Given positions must increase along each visible part of a row. Patterns,
            prefixes, lengths and offsets are refused.
        axis_name: the mesh axis of the ring.
        bias: a description; a dense bias is refused.
        scale: multiplies the logits.
        logits_soft_cap: bounds scaled logits; 0 means off.
    """
    B, T, H, K = query_BTHK.shape
    G = key_BSGK.shape[2]
    _check(mask, bias, T, key_BSGK.shape[1])
    devices, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    table = jnp.asarray(balanced_order(T * devices, devices).reshape(devices, 1, T), jnp.int32)
    if mask.query_positions is None and (mask.window > 0 or bias is not None):
        mask = dataclasses.replace(mask, query_positions=table[index], key_positions=table[index])
    ring = _Ring(axis_name, devices, scale, logits_soft_cap, mask.causal)
    query_BGRTK = query_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    key_BGSK, value_BGSK = key_BSGK.transpose(0, 2, 1, 3), value_BSGK.transpose(0, 2, 1, 3)
    out_BGRTW: Any = _attend(ring, query_BGRTK, key_BGSK, value_BGSK, bias, mask)
    return out_BGRTW.transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


def check_blocks(length: int, devices: int) -> None:
    """Raise UserError unless rows of a length divide into blocks that are large enough to be efficient."""
    whole = 4 * _SMALLEST_BLOCK * devices
    require(
        length <= _UNROLLED_QUERIES * devices or length % whole == 0,
        f"data.sequence_length must be a multiple of {whole} with parallel.context={devices}, got {length}; "
        f"the next one is {-(-length // whole) * whole}.",
    )


def _check(mask: AttentionMask, bias: Any, num_queries: int, num_keys: int) -> None:
    check_bias(bias)
    refused = {
        "mask.pattern": mask.pattern,
        "mask.key_prefix": mask.key_prefix,
        "mask.key_lengths": mask.key_lengths,
        "mask.query_offset": mask.query_offset,
        "a dense bias": None if isinstance(bias, BiasDescription) else bias,
    }
    given = [name for name, value in refused.items() if value is not None]
    if given:
        raise ValueError(f"Ring attention cannot honour {given[0]}; use parallel.context=1.")
    if (mask.query_positions is None) != (mask.key_positions is None):
        raise ValueError("Ring attention needs positions of queries and keys, or of neither; got one of them.")
    if num_queries != num_keys:
        raise ValueError(f"Ring attention is self-attention, got {num_queries} queries and {num_keys} keys a device.")


class _Ring(NamedTuple):
    axis_name: str
    devices: int
    scale: float
    soft_cap: float
    causal: bool

    def settings(self, num_queries: int, num_keys: int) -> Settings:
        size = math.gcd(256, num_queries // 2, num_keys // 2)
        unrolled = num_queries <= _UNROLLED_QUERIES
        blocks = Blocks(min(128, num_queries), num_keys, True) if unrolled else Blocks(size, size, False)
        return Settings(self.scale, self.soft_cap, blocks, num_keys)

    def pass_on(self, tree: Any) -> Any:
        """Send a pytree to the next device, and receive from the previous one."""
        around = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis_name, around), tree)


class _Keys(NamedTuple):
    """The data that passes around the ring."""

    key: Any
    value: Any
    segment_ids: Any
    positions: Any


def _own_keys(key: Any, value: Any, mask: AttentionMask) -> _Keys:
    return _Keys(key, value, mask.key_segment_ids, mask.key_positions)


def _part(
    query: Any, keys: _Keys, mask: AttentionMask, *, late_queries: bool = False, early_keys: bool = False
) -> tuple[Any, Any, Any, AttentionMask]:
    """Queries, keys, values and mask of all positions here, of the late half of the queries, or of the early half of the keys."""
    start, stop = query.shape[3] // 2 if late_queries else 0, keys.key.shape[2] // (2 if early_keys else 1)

    def columns(array: Any, low: int, high: int | None) -> Any:
        return None if array is None else array[:, low:high]

    mask = dataclasses.replace(
        mask,
        query_segment_ids=columns(mask.query_segment_ids, start, None),
        query_positions=columns(mask.query_positions, start, None),
        key_segment_ids=columns(keys.segment_ids, 0, stop),
        key_positions=columns(keys.positions, 0, stop),
    )
    return query[:, :, :, start:], keys.key[:, :, :stop], keys.value[:, :, :stop], mask


def _seen_whole(mask: AttentionMask) -> AttentionMask:
    """The mask between positions where all keys precede all queries."""
    return mask if mask.query_positions is not None else dataclasses.replace(mask, causal=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, query: Any, key: Any, value: Any, bias: Any, mask: AttentionMask) -> Any:
    return _forward(ring, query, key, value, bias, mask)[0]


def _forward(ring: _Ring, query: Any, key: Any, value: Any, bias: Any, mask: AttentionMask) -> Any:
    index, half = jax.lax.axis_index(ring.axis_name), query.shape[3] // 2

    def attend(part: tuple[Any, Any, Any, AttentionMask]) -> tuple[Any, Softmax]:
        rows, columns, values, part_mask = part
        settings = ring.settings(rows.shape[3], columns.shape[2])
        out, softmax = attend_forward(settings, rows, columns, values, bias, part_mask)
        return out.astype(jnp.float32), softmax

    def early_keys(keys: _Keys) -> tuple[Any, Softmax]:
        return attend(_part(query, keys, _seen_whole(mask), early_keys=True))

    def late_queries(keys: _Keys) -> tuple[Any, Softmax]:
        out, softmax = attend(_part(query, keys, _seen_whole(mask), late_queries=True))

        def behind(early: float, late: Any) -> Any:
            return jnp.concatenate(
                [jnp.full((*late.shape[:3], half, *late.shape[4:]), early, jnp.float32), late], axis=3
            )

        return behind(0, out), Softmax(behind(LOWEST, softmax.peak), behind(0, softmax.total))

    keys = _own_keys(key, value, mask)
    out, softmax = attend(_part(query, keys, mask))
    for exchange in range(1, ring.devices):
        keys = ring.pass_on(keys)
        if ring.causal:
            # The early half of a previous device precedes all queries here. All keys of a later device precede the late half.
            added, added_softmax = jax.lax.cond(index >= exchange, early_keys, late_queries, keys)
        else:
            added, added_softmax = attend(_part(query, keys, mask))
        peak = jnp.maximum(softmax.peak, added_softmax.peak)
        share, added_share = (part.total * jnp.exp(part.peak - peak) for part in (softmax, added_softmax))
        softmax = Softmax(peak, share + added_share)
        out = (out * share[..., None] + added * added_share[..., None]) * softmax.inverse
    out = out.astype(query.dtype)
    return out, (query, key, value, bias, mask, out, softmax)


def _backward(ring: _Ring, saved: Any, out_gradient: Any) -> Any:
    query, key, value, bias, mask, out, softmax = saved
    index, half = jax.lax.axis_index(ring.axis_name), query.shape[3] // 2

    def pull_back(part: tuple[Any, Any, Any, AttentionMask]) -> Any:
        rows, columns, values, part_mask = part
        last = slice(query.shape[3] - rows.shape[3], None)
        part_softmax = Softmax(*(x[:, :, :, last] for x in softmax))
        kept = (rows, columns, values, bias, part_mask, out[:, :, :, last], part_softmax)
        settings = ring.settings(rows.shape[3], columns.shape[2])
        gradients = attend_backward(settings, kept, out_gradient[:, :, :, last])
        return jax.tree.map(lambda x: x.astype(jnp.float32), gradients)

    def early_keys(keys: _Keys) -> Any:
        query_part, key_part, value_part, bias_part = pull_back(_part(query, keys, _seen_whole(mask), early_keys=True))
        rest = ((0, 0), (0, 0), (0, half), (0, 0))
        return query_part, jnp.pad(key_part, rest), jnp.pad(value_part, rest), bias_part

    def late_queries(keys: _Keys) -> Any:
        query_part, *others = pull_back(_part(query, keys, _seen_whole(mask), late_queries=True))
        return jnp.pad(query_part, ((0, 0), (0, 0), (0, 0), (half, 0), (0, 0))), *others

    keys = _own_keys(key, value, mask)
    query_gradient, *of_keys, bias_gradient = pull_back(_part(query, keys, mask))
    for exchange in range(1, ring.devices):
        keys, of_keys = ring.pass_on((keys, of_keys))
        if ring.causal:
            gradients = jax.lax.cond(index >= exchange, early_keys, late_queries, keys)
        else:
            gradients = pull_back(_part(query, keys, mask))
        query_added, *keys_added, bias_added = gradients
        query_gradient += query_added
        of_keys = jax.tree.map(jnp.add, of_keys, keys_added)
        bias_gradient = jax.tree.map(jnp.add, bias_gradient, bias_added)
    # One more step returns the gradients to the devices of their keys.
    key_gradient, value_gradient = ring.pass_on(of_keys) if ring.devices > 1 else of_keys
    bias_gradient = jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), bias_gradient, bias)
    return (
        query_gradient.astype(query.dtype),
        key_gradient.astype(key.dtype),
        value_gradient.astype(value.dtype),
        bias_gradient,
        None,
    )


_attend.defvjp(_forward, _backward)
