"""Keys and values of the tokens read so far, as an explicit pytree that goes into attention and comes out again."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from transformer.validation import require


class KVCache(NamedTuple):
    """What self-attention remembers of P tokens a row; a slot's index is its token's position.

    A call with T tokens writes token `t` of row `b` to slot `lengths_B[b] + t`, its valid tokens (a prefix: the rest
    is right padding) only. A query sees the slots up to its own. What does not fit is dropped and sets `overflow`:
    nothing is ever overwritten. Heads come before slots, which is how attention reads them: the other way round, XLA's
    CPU backend copies the whole cache in every step of decoding.
    """

    key_BGPK: Float[Array, "B G P K"]
    value_BGPK: Float[Array, "B G P K"]
    lengths_B: Int[Array, " B"]
    overflow: Bool[Array, ""]


class MemoryCache(NamedTuple):
    """What cross-attention remembers: keys and values of the encoder's output, computed once (S is 0 before)."""

    key_BSGK: Float[Array, "B S G K"]
    value_BSGK: Float[Array, "B S G K"]


def init_cache(batch_size: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: Any = jnp.float32) -> KVCache:
    """An empty cache with room for `capacity` tokens a row.

    >>> init_cache(2, 8, num_kv_heads=1, head_dim=4).lengths_B.tolist()
    [0, 0]
    """
    slots = jnp.zeros((batch_size, num_kv_heads, capacity, head_dim), dtype)
    return KVCache(slots, slots, jnp.zeros((batch_size,), jnp.int32), jnp.zeros((), bool))


def init_memory_cache(batch_size: int, num_kv_heads: int, head_dim: int, dtype: Any = jnp.float32) -> MemoryCache:
    """A cache that waits for the encoder's output, which the first call brings."""
    empty = jnp.zeros((batch_size, 0, num_kv_heads, head_dim), dtype)
    return MemoryCache(empty, empty)


def check_right_padded(valid_BT: Bool[Array, "B T"]) -> Bool[Array, " B"]:
    """Which rows have padding before a token, for which a cache has no slot; UserError if there is one, and it is known."""
    padded_first_B = jnp.any(valid_BT[:, 1:] & ~valid_BT[:, :-1], axis=1)
    if not isinstance(padded_first_B, Tracer) and padded_first_B.is_fully_addressable:
        rule = "With a cache, padding (segment ids of 0) must follow the tokens of a row"
        row = int(np.argmax(padded_first_B))
        require(not padded_first_B[row], f"{rule}; row {row} has padding before a token: pad prompts on the right.")
    return padded_first_B


def next_slots(
    lengths_B: Int[Array, " B"], num_tokens: int, valid_BT: Bool[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Slots, and so positions, of the next tokens of each row; 0 for padding, whose own may lie beyond the capacity."""
    if valid_BT is not None:
        check_right_padded(valid_BT)
    slots_BT = lengths_B[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None]
    return slots_BT if valid_BT is None else jnp.where(valid_BT, slots_BT, 0)


def mark_slots(lengths_B: Int[Array, " B"], marked_BT: Bool[Array, "#B T"], capacity: int) -> Bool[Array, "B P"]:
    """Which slots hold the marked ones of the next tokens of each row."""
    slots_BT = next_slots(lengths_B, marked_BT.shape[1])
    unmarked_BP = jnp.zeros((len(lengths_B), capacity), bool)
    return unmarked_BP.at[jnp.arange(len(lengths_B))[:, None], slots_BT].set(marked_BT, mode="drop")


def write_cache(
    cache: KVCache,
    key_BTGK: Float[Array, "B T G K"],
    value_BTGK: Float[Array, "B T G K"],
    valid_BT: Bool[Array, "B T"] | None = None,
) -> KVCache:
    """The cache with the valid tokens appended to each row, in the cache's dtype.

    Args:
        cache: what was there.
        key_BTGK: keys of the new tokens.
        value_BTGK: their values.
        valid_BT: which tokens count; those that do not must come last in their row (else UserError, or in compiled code NaN in
            all keys of the row). None means all.
    """
    B, T = key_BTGK.shape[:2]
    capacity = cache.key_BGPK.shape[2]
    slots_BT = next_slots(cache.lengths_B, T)
    added_B = jnp.full((B,), T, jnp.int32)
    if valid_BT is not None:
        refused_B = check_right_padded(valid_BT)
        key_BTGK = jnp.where(refused_B[:, None, None, None], jnp.nan, key_BTGK)
        slots_BT = jnp.where(valid_BT | refused_B[:, None], slots_BT, capacity)
        added_B = jnp.sum(valid_BT, axis=1, dtype=jnp.int32)
    wanted_B = cache.lengths_B + added_B
    rows_B1 = jnp.arange(B)[:, None]

    def write(slots_BGPK: Array, new_BTGK: Array) -> Array:
        return slots_BGPK.at[rows_B1, :, slots_BT].set(new_BTGK.astype(slots_BGPK.dtype), mode="drop")

    return KVCache(
        key_BGPK=write(cache.key_BGPK, key_BTGK),
        value_BGPK=write(cache.value_BGPK, value_BTGK),
        lengths_B=jnp.minimum(wanted_B, capacity),
        overflow=cache.overflow | jnp.any(wanted_B > capacity),
    )


def check_capacity(capacity: int, prompt: int, new: int) -> None:
    """Raise ValueError unless a cache holds a prompt and the tokens that will follow it; for the host, before a run."""
    if prompt + new > capacity:
        raise ValueError(
            f"The cache must hold prompt and new tokens, {prompt} + {new}, but its capacity is {capacity}; "
            f"raise the capacity to {prompt + new}, shorten the prompt or ask for fewer tokens."
        )


def cache_overflow(caches: Any) -> Bool[Array, ""]:
    """Whether any layer of a model's cache dropped a token."""
    flags = [c.overflow for c in jax.tree.leaves(caches, is_leaf=_is_kv_cache) if _is_kv_cache(c)]
    return jnp.any(jnp.stack([jnp.any(flag) for flag in flags]))


def cache_lengths(caches: Any) -> Int[Array, " B"]:
    """Tokens held in each row of a model's cache; every layer holds the same."""
    cache = next(c for c in jax.tree.leaves(caches, is_leaf=_is_kv_cache) if _is_kv_cache(c))
    return cache.lengths_B if cache.lengths_B.ndim == 1 else cache.lengths_B[0]


def _is_kv_cache(node: Any) -> bool:
    return isinstance(node, KVCache)
