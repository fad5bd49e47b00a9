"""Attention one block of queries and keys at a time: memory linear in the sequence, in plain JAX."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from transformer.model_kinds import BACKENDS, AttentionBackend, AttentionCall
from transformer.ops.backends.xla import LOWEST, XLABackend
from transformer.ops.bias import Bias, BiasDescription, bias_block, check_bias
from transformer.ops.masks import AttentionMask, BlockPattern
from transformer.types import Array, PyTree

# Up to this many queries the blocks are unrolled. Beyond it, the program and its memory would grow with the number of blocks.
_UNROLLED_QUERIES = 512
# Smaller blocks cost more in overhead than they skip.
_SMALLEST = 64
# From this many pairs of a query and a key on, `auto` avoids [T, S] arrays: self-attention of 256 tokens.
_LARGE = 256 * 256


@BACKENDS.register
@dataclasses.dataclass(frozen=True)
class BlockwiseBackend(AttentionBackend):
    """Memory linear in the sequence, on any platform."""

    kind = "blockwise"
    takes = XLABackend.takes - {"visible", "dropout_rate"}

    def compute(self, call: AttentionCall) -> Float[jax.Array, "B T H W"]:
        """`blockwise_attention`."""
        settings: dict[str, Any] = {"scale": call.scale, "logits_soft_cap": call.logits_soft_cap}
        return blockwise_attention(*call[:3], mask=call.mask, bias=call.bias, **settings)

    def preferred(self, call: AttentionCall, platform: str) -> bool:
        """True where the reference's [T, S] arrays dominate the cost: many pairs, and no bias that is such an array itself."""
        del platform
        described = call.bias is None or isinstance(call.bias, BiasDescription)
        return described and call.query_BTHK.shape[1] * call.key_BSGK.shape[1] >= _LARGE


class Blocks(NamedTuple):
    """How the [T, S] matrix of logits is divided."""

    query_size: int
    key_size: int
    """Block of keys; ignored if unrolled."""
    unrolled: bool
    """True: each block of queries is unrolled and reads all its visible keys at once. False: two nested loops."""


def choose_blocks(num_queries: int, num_keys: int, pattern: BlockPattern | None = None) -> Blocks:
    """Block sizes for plain XLA; with a pattern, its own block size, which allows skipping every hidden block.

    A compiler that orders unrolled blocks freely may keep all of them alive; they therefore serve short sequences only.
    """
    if num_queries <= _UNROLLED_QUERIES:
        return Blocks(min(128, num_queries), num_keys, unrolled=True)
    size = 256 if pattern is None else min(max(pattern.block_size, _SMALLEST), 512)
    return Blocks(size, min(size, num_keys), unrolled=False)


def blockwise_attention(
    query_BTHK: Float[jax.Array, "B T H K"],
    key_BSGK: Float[jax.Array, "B S G K"],
    value_BSGK: Float[jax.Array, "B S G W"],
    *,
    mask: AttentionMask,
    bias: Bias | None,
    scale: float,
    logits_soft_cap: float = 0.0,
    blocks: Blocks | None = None,
) -> Float[jax.Array, "B T H W"]:
    """The same as the reference without its [T, S] arrays (Rabe and Staats 2021; Dao et al. 2022, algorithms 1 and 4).

    The forward pass keeps the output and, for each softmax, its maximum and its sum. The backward pass recomputes the weights
    from them, block by block. Blocks outside `mask.key_blocks` are never computed. Gradients are reverse-mode only
    (`jax.custom_vjp`).
    """
    check_bias(bias)
    B, T, H, K = query_BTHK.shape
    _, S, G, _ = key_BSGK.shape
    blocks = choose_blocks(T, S, mask.pattern) if blocks is None else blocks
    query_BGRTK = query_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    key_BGSK, value_BGSK = key_BSGK.transpose(0, 2, 1, 3), value_BSGK.transpose(0, 2, 1, 3)
    if not blocks.unrolled:
        padded_T, padded_S = _round_up(T, blocks.query_size), _round_up(S, blocks.key_size)
        query_BGRTK = _pad(query_BGRTK, 3, padded_T)
        key_BGSK, value_BGSK = _pad(key_BGSK, 2, padded_S), _pad(value_BGSK, 2, padded_S)
        mask = dataclasses.replace(
            mask,
            query_segment_ids=_pad(mask.query_segment_ids, 1, padded_T),
            key_segment_ids=_pad(mask.key_segment_ids, 1, padded_S),
            query_positions=_pad(mask.query_positions, 1, padded_T),
            key_positions=_pad(mask.key_positions, 1, padded_S),
            key_prefix=_pad(mask.key_prefix, 1, padded_S),
            # Segments would do too, but only half of the masks have them. Key lengths hide the padded keys in every case.
            key_lengths=jnp.full((1,), S, jnp.int32) if mask.key_lengths is None else jnp.minimum(mask.key_lengths, S),
        )
        bias = bias if isinstance(bias, BiasDescription) else _pad(_pad(bias, 2, padded_T), 3, padded_S)
    settings = Settings(scale, logits_soft_cap, blocks, S)
    out_BGRTK: Any = _attend(settings, query_BGRTK, key_BGSK, value_BGSK, bias, mask)
    return out_BGRTK[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


class Settings(NamedTuple):
    """Static settings, known while tracing."""

    scale: float
    soft_cap: float
    blocks: Blocks
    num_keys: int  # without padding


class Softmax(NamedTuple):
    """The normaliser of each query's softmax, `exp(peak) * total`, float32 [B, G, R, T].

    Peak and total are separate numbers: their combined logarithm loses `log(total)` where the peak is large. Next to -1e9, a
    common masked logit in other libraries, neighbouring float32 numbers are 64 apart.
    """

    peak: Array
    """The largest logit, or `LOWEST` if the query sees no key."""
    total: Array
    """The sum of `exp(logit - peak)`, 0 if the query sees no key."""

    @property
    def inverse(self) -> Array:
        """1 / total, or 0 if the query sees no key; with a last axis for keys or for the width of values."""
        return jnp.where(self.total == 0, 0.0, 1.0 / jnp.where(self.total == 0, 1.0, self.total))[..., None]


class _Block(NamedTuple):
    """The position of one block; its starts may be traced."""

    query_start: Any
    query_size: int
    key_start: Any
    key_size: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: Settings, query: Any, key: Any, value: Any, bias: Any, mask: AttentionMask) -> Any:
    return attend_forward(settings, query, key, value, bias, mask)[0]


def attend_forward(
    settings: Settings,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | BiasDescription | None,
    mask: AttentionMask,
) -> tuple[Any, Softmax]:
    """The output [B, G, R, T, W] in the query's dtype, and its softmax; the output is zero where a query sees no key."""

    def attend_keys(carry: Any, block: _Block) -> Any:
        peak, total, out = carry
        logits, _ = _logits(settings, block, query, key, bias, mask)
        new_peak = jnp.maximum(peak, logits.max(axis=-1))
        weights = jnp.exp(logits - new_peak[..., None])
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + weights.sum(axis=-1)
        value_block = _slice(value, 2, block.key_start, block.key_size)
        added = _einsum("BGRTS,BGSK->BGRTK", weights.astype(value.dtype), value_block)
        return new_peak, total, out * shrink[..., None] + added

    def attend_queries(carry: tuple[()], start: Any, size: int, key_blocks: Any) -> Any:
        shape = (*query.shape[:3], size)
        zeros = jnp.zeros(shape, jnp.float32)
        empty = (zeros + LOWEST, zeros, jnp.zeros((*shape, value.shape[-1]), jnp.float32))
        peak, total, out = key_blocks(attend_keys, empty)
        return carry, ((out * Softmax(peak, total).inverse).astype(query.dtype), peak, total)

    out, *softmax = _over_blocks(settings, mask, query.shape[3], attend_queries, ())[1]
    return out, Softmax(*softmax)


def _forward(settings: Settings, query: Any, key: Any, value: Any, bias: Any, mask: AttentionMask) -> Any:
    out, softmax = attend_forward(settings, query, key, value, bias, mask)
    return out, (query, key, value, bias, mask, out, softmax)


def _backward(settings: Settings, saved: Any, out_gradient: Any) -> Any:
    return *attend_backward(settings, saved, out_gradient), None


def attend_backward(settings: Settings, saved: PyTree, out_gradient: Array) -> tuple[Any, Any, Any, Any]:
    """Gradients of query, key, value and bias.

    The saved output and softmax may cover more keys than the ones given here, which a query then sees all of (`ops.ring`).

    Args:
        settings: the same as in the forward pass.
        saved: query, key, value, bias, mask, and both results of `attend_forward`.
        out_gradient: gradient of the output.
    """
    query, key, value, bias, mask, out, softmax = saved
    # Mean of the gradients of the weights, under the weights themselves (Dao et al. 2022, equation 4).
    mean = _einsum("BGRTK,BGRTK->BGRT", out_gradient.astype(jnp.float32), out.astype(jnp.float32))

    def attend_keys(carry: Any, block: _Block) -> Any:
        query_gradient, (key_gradient, value_gradient, bias_gradient) = carry
        rows = functools.partial(_slice, axis=3, start=block.query_start, size=block.query_size)
        columns = functools.partial(_slice, axis=2, start=block.key_start, size=block.key_size)
        logits, cap_slope = _logits(settings, block, query, key, bias, mask)
        rows_softmax = Softmax(*(rows(x) for x in softmax))
        weights = jnp.exp(logits - rows_softmax.peak[..., None]) * rows_softmax.inverse
        out_gradient_rows = rows(out_gradient)
        value_added = _einsum("BGRTS,BGRTK->BGSK", weights.astype(value.dtype), out_gradient_rows)
        weights_gradient = _einsum("BGRTK,BGSK->BGRTS", out_gradient_rows, columns(value))
        logits_gradient = weights * (weights_gradient - rows(mean)[..., None])
        bias_gradient = _add_bias_gradient(bias_gradient, logits_gradient, bias, mask, block)
        products_gradient = (logits_gradient * cap_slope * settings.scale).astype(query.dtype)
        query_gradient += _einsum("BGRTS,BGSK->BGRTK", products_gradient, columns(key))
        key_added = _einsum("BGRTS,BGRTK->BGSK", products_gradient, rows(query))
        key_gradient = _add_slice(key_gradient, key_added, (0, 0, block.key_start, 0))
        value_gradient = _add_slice(value_gradient, value_added, (0, 0, block.key_start, 0))
        return query_gradient, (key_gradient, value_gradient, bias_gradient)

    def attend_queries(carry: Any, start: Any, size: int, key_blocks: Any) -> Any:
        query_gradient = jnp.zeros((*query.shape[:3], size, query.shape[-1]), jnp.float32)
        query_gradient, carry = key_blocks(attend_keys, (query_gradient, carry))
        return carry, (query_gradient.astype(query.dtype),)

    gradients = jax.tree.map(_zeros_float32, (key, value, bias))
    gradients, (query_gradient,) = _over_blocks(settings, mask, query.shape[3], attend_queries, gradients)
    key_gradient, value_gradient, bias_gradient = gradients
    bias_gradient = jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), bias_gradient, bias)
    return query_gradient, key_gradient.astype(key.dtype), value_gradient.astype(value.dtype), bias_gradient


_attend.defvjp(_forward, _backward)


def _logits(
    settings: Settings, block: _Block, query: Any, key: Any, bias: Any, mask: AttentionMask
) -> tuple[jax.Array, Any]:
    """Masked float32 logits [B, G, R, t, s], and the derivative of the soft cap."""
    query_rows = _slice(query, 3, block.query_start, block.query_size)
    key_columns = _slice(key, 2, block.key_start, block.key_size)
    logits = _einsum("BGRTK,BGSK->BGRTS", query_rows, key_columns) * settings.scale
    cap_slope = 1.0
    if settings.soft_cap > 0:
        bounded = jnp.tanh(logits / settings.soft_cap)
        logits, cap_slope = settings.soft_cap * bounded, 1 - bounded * bounded
    if bias is not None:
        logits += _split_heads(_bias_block(bias, mask, block), query.shape[1])
    visible = mask.block(*block)
    return jnp.where(visible[:, :, None], logits, -jnp.inf), cap_slope


def _bias_block(bias: Any, mask: AttentionMask, block: _Block) -> jax.Array:
    if isinstance(bias, BiasDescription):
        query_positions = mask.positions_of_queries(block.query_start, block.query_size)
        return bias_block(bias, query_positions, mask.positions_of_keys(block.key_start, block.key_size))
    rows = _slice(bias, 2, block.query_start, block.query_size)
    return _slice(rows, 3, block.key_start, block.key_size).astype(jnp.float32)


def _add_bias_gradient(gradient: Any, logits_gradient: jax.Array, bias: Any, mask: AttentionMask, block: _Block) -> Any:
    """Add the contribution of one block to the gradient of a bias."""
    if bias is None:
        return None
    B, G, R, T, S = logits_gradient.shape
    logits_gradient = logits_gradient.reshape(B, G * R, T, S)
    if isinstance(bias, BiasDescription):
        value, pull_back = jax.vjp(lambda leaves: _bias_block(leaves, mask, block), bias)
        (added,) = pull_back(_sum_to(logits_gradient, value.shape))
        return jax.tree.map(lambda total, leaf: total + leaf.astype(jnp.float32), gradient, added)
    added = _sum_to(logits_gradient, (*bias.shape[:2], T, S))
    return _add_slice(gradient, added, (0, 0, block.query_start, block.key_start))


def _over_blocks(settings: Settings, mask: AttentionMask, num_queries: int, attend_queries: Any, carry: Any) -> Any:
    """Call `attend_queries(carry, start, size, key_blocks)` for each block of queries; join its outputs on axis 3.

    `key_blocks(step, initial)` folds `step` over the blocks of keys that are visible to these queries.
    """
    query_size, key_size, unrolled = settings.blocks
    starts = range(0, num_queries, query_size)
    if unrolled:
        outputs = []
        for start in starts:
            size = min(query_size, num_queries - start)
            low, high = mask.key_range(start, size, settings.num_keys)
            key_blocks = functools.partial(_fold_one, _Block(start, size, low, high - low))
            carry, output = attend_queries(carry, start, size, key_blocks)
            outputs.append(output)
        return carry, tuple(jnp.concatenate(pieces, axis=3) for pieces in zip(*outputs, strict=True))

    visited = [mask.key_blocks(start, query_size, key_size, settings.num_keys) for start in starts]
    counts = np.asarray([len(indices) for indices in visited], np.int32)
    # The visible blocks are mostly contiguous. Only a pattern needs a table of them.
    first = np.asarray([indices[0] if indices else 0 for indices in visited], np.int32)
    contiguous = all(
        indices == list(range(start, start + len(indices)))
        for indices, start in zip(visited, first.tolist(), strict=True)
    )
    table = np.zeros((len(visited), 0 if contiguous else counts.max()), np.int32)
    for row, indices in zip(table, visited, strict=True):
        if not contiguous:
            row[: len(indices)] = indices

    def attend_one(carry: Any, block: Any) -> Any:
        start, first, count, indices = block

        def key_blocks(step: Any, initial: Any) -> Any:
            def body(number: Any, carry: Any) -> Any:
                index = first + number if contiguous else indices[number]
                return step(carry, _Block(start, query_size, index * key_size, key_size))

            return jax.lax.fori_loop(0, count, body, initial)

        return attend_queries(carry, start, query_size, key_blocks)

    carry, outputs = jax.lax.scan(attend_one, carry, (np.asarray(starts, np.int32), first, counts, table))
    return carry, tuple(_join(output) for output in outputs)


def _fold_one(block: _Block, step: Any, initial: Any) -> Any:
    return step(initial, block) if block.key_size > 0 else initial


def _join(stacked: jax.Array) -> jax.Array:
    """[blocks, B, G, R, t, ...] -> [B, G, R, blocks * t, ...]."""
    blocks, B, G, R, size, *rest = stacked.shape
    return jnp.moveaxis(stacked, 0, 3).reshape(B, G, R, blocks * size, *rest)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _pad(array: Any, axis: int, length: int) -> Any:
    if array is None:
        return None
    return jnp.pad(array, [(0, length - size if i == axis else 0) for i, size in enumerate(array.shape)])


def _slice(array: jax.Array, axis: int, start: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def _add_slice(total: jax.Array, added: jax.Array, starts: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, starts, added.shape) + added, starts)


def _sum_to(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo broadcasting from `shape`."""
    axes = tuple(axis for axis, size in enumerate(shape) if size != array.shape[axis])
    return array.sum(axis=axes, keepdims=True)


def _split_heads(bias: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, H, t, s] -> [B, G, R, t, s], or 1 for both if H is 1."""
    batch, heads, *rest = bias.shape
    groups = 1 if heads == 1 else num_kv_heads
    return bias.reshape(batch, groups, heads // groups, *rest)


def _zeros_float32(leaf: jax.Array) -> jax.Array:
    return jnp.zeros(leaf.shape, jnp.float32)


def _einsum(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
