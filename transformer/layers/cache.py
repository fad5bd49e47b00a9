"""Caches of attention between calls: explicit pytrees, passed in and returned, behind one protocol."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from transformer.model_kinds import BACKENDS
from transformer.ops.masks import AttentionMask
from transformer.types import Leaf, PyTree
from transformer.validation import require


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of one attention layer between calls. This base class stores nothing; subclasses override what they need."""

    takes_positions: ClassVar[bool] = True
    """Whether the caller gives positions; otherwise the cache determines them."""

    def enter(self, inputs_BTD: Array, norm: Callable[[Array], Array]) -> tuple[Array, "Cache"]:
        """The normalised inputs of a block's attention, and the cache to pass to it."""
        return norm(inputs_BTD), self

    def key_inputs(self, inputs_BTD: Array, encoded_BSD: Array | None) -> Array | None:
        """Hidden states whose keys and values this call computes; None if there are none."""
        return inputs_BTD if encoded_BSD is None else encoded_BSD

    def positions(self, num_tokens: int, given_BT: Array | None) -> Array | None:
        """Positions of these hidden states; None means their indices."""
        del num_tokens
        return given_BT

    def extend(self, key: Array, value: Array, mask: AttentionMask) -> tuple[Array, Array, AttentionMask, "Cache"]:
        """All keys and values [B, S, G, K], the mask of the queries over them, and the cache for the next call."""
        return key, value, mask, self

    def implementation(self, chosen: str) -> str:
        """The attention backend to use with this cache."""
        return chosen

    def leave(self, inputs_BTD: Array, updated: "Cache") -> "Cache":
        """The block's next cache, from its inputs and the cache returned by attention."""
        del inputs_BTD
        return updated

    def take(self, rows_R: Int[Array, " R"]) -> "Cache":
        """A cache of these rows, which may repeat. Arrays may have an axis of layers before the rows."""
        del rows_R
        return self

    def replace_rows(self, chosen_B: Bool[Array, " B"], other: PyTree) -> "Cache":
        """The cache with the chosen rows replaced by another cache's."""
        del chosen_B, other
        return self

    def shortened(self, lengths_B: Int[Array, " B"]) -> "Cache":
        """The cache with only the first tokens of each row; later calls overwrite the slots after them."""
        del lengths_B
        return self


NO_CACHE = Cache()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(Cache):
    """Keys and values of self-attention for P tokens a row; a slot's index is its token's position.

    A call with T tokens writes token `t` of row `b` to slot `lengths_B[b] + t`. Only valid tokens are written; the others must
    be right padding. A query sees the slots up to its own. Tokens beyond the capacity are dropped and set `overflow`; nothing is
    overwritten. The axis of heads precedes the axis of slots, as attention reads them: in the other order, XLA's CPU backend
    copies the whole cache in every step of decoding.
    """

    takes_positions = False

    key_BGPK: Leaf  # [B, G, P, K]
    value_BGPK: Leaf  # [B, G, P, K]
    lengths_B: Leaf  # int32 [B]
    overflow: Leaf  # bool []

    def key_inputs(self, inputs_BTD: Array, encoded_BSD: Array | None) -> Array:
        """The new tokens."""
        if encoded_BSD is not None:
            raise ValueError(
                "Cross-attention needs a CrossAttentionCache, got a KVCache; encoder output does not grow."
            )
        return inputs_BTD

    def positions(self, num_tokens: int, given_BT: Array | None) -> Array:
        """The next slots."""
        return next_slots(self.lengths_B, num_tokens)

    def extend(self, key: Array, value: Array, mask: AttentionMask) -> tuple[Array, Array, AttentionMask, Cache]:
        """Keys and values of all slots; zeros in the queries' segment ids are right padding."""
        follow = ("query_positions", "key_positions", "key_lengths", "query_offset", "visible")
        given = [name for name in follow if getattr(mask, name) is not None]
        if given:
            raise ValueError(f"With a cache, mask.{given[0]} follows from it; leave it out.")
        cache = write_cache(self, key, value, valid_tokens(mask))
        key_BPGK, value_BPGK = jnp.swapaxes(cache.key_BGPK, 1, 2), jnp.swapaxes(cache.value_BGPK, 1, 2)
        prefix_BT, capacity = mask.key_prefix, key_BPGK.shape[1]
        mask = AttentionMask(
            causal=True,
            window=mask.window,
            pattern=mask.pattern,
            key_prefix=None if prefix_BT is None else mark_slots(self.lengths_B, prefix_BT, capacity),
            query_offset=self.lengths_B,
            key_lengths=cache.lengths_B,
        )
        return key_BPGK, value_BPGK, mask, cache

    def take(self, rows_R: Int[Array, " R"]) -> Cache:
        """Keys, values and lengths of these rows."""
        key, value = (jnp.take(x, rows_R, axis=x.ndim - 4) for x in (self.key_BGPK, self.value_BGPK))
        return KVCache(key, value, jnp.take(self.lengths_B, rows_R, axis=self.lengths_B.ndim - 1), self.overflow)

    def replace_rows(self, chosen_B: Bool[Array, " B"], other: PyTree) -> Cache:
        """Keys, values and lengths."""

        def choose(new: Array, old: Array, axis: int) -> Array:
            shape = [1] * old.ndim
            shape[axis] = len(chosen_B)
            return jnp.where(chosen_B.reshape(shape), new, old)

        key, value = (
            choose(new, old, old.ndim - 4)
            for new, old in zip((other.key_BGPK, other.value_BGPK), (self.key_BGPK, self.value_BGPK), strict=True)
        )
        lengths_B = choose(other.lengths_B, self.lengths_B, self.lengths_B.ndim - 1)
        return KVCache(key, value, lengths_B, self.overflow | other.overflow)

    def shortened(self, lengths_B: Int[Array, " B"]) -> Cache:
        """Only the lengths change."""
        lengths = lengths_B.reshape((1,) * (self.lengths_B.ndim - 1) + lengths_B.shape)
        return dataclasses.replace(self, lengths_B=jnp.broadcast_to(lengths, self.lengths_B.shape))

    def implementation(self, chosen: str) -> str:
        """The offset of a row is data here. A backend that must know it at compile time is replaced by auto."""
        return chosen if {"query_offset", "key_lengths"} <= BACKENDS.find(chosen).takes else "auto"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossAttentionCache(Cache):
    """Keys and values of the encoder output for cross-attention, computed once (S is 0 before the first call)."""

    key_BSGK: Leaf  # [B, S, G, K]
    value_BSGK: Leaf  # [B, S, G, K]

    def key_inputs(self, inputs_BTD: Array, encoded_BSD: Array | None) -> Array | None:
        """The encoder output, in the first call."""
        if encoded_BSD is None and self.key_BSGK.shape[1] == 0:
            raise ValueError(
                "Cross-attention needs the encoder output in the first call with a cache; pass encoded_BSD."
            )
        return encoded_BSD

    def extend(
        self, key: Array | None, value: Array | None, mask: AttentionMask
    ) -> tuple[Array, Array, AttentionMask, Cache]:
        """Keys and values of the encoder output: new ones, or the cached ones."""
        if key is None or value is None:
            return self.key_BSGK, self.value_BSGK, mask, self
        cache = CrossAttentionCache(key.astype(self.key_BSGK.dtype), value.astype(self.value_BSGK.dtype))
        return cache.key_BSGK, cache.value_BSGK, mask, cache

    def take(self, rows_R: Int[Array, " R"]) -> Cache:
        """Keys and values of these rows."""
        return CrossAttentionCache(*(jnp.take(x, rows_R, axis=x.ndim - 4) for x in (self.key_BSGK, self.value_BSGK)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransformerXLMemory(Cache):
    """P earlier hidden states of a block (Transformer-XL memory): keys and values only, no queries (Dai et al. 2019).

    They are the block's inputs at the P positions before this call's, without a gradient. The mask must cover T queries and
    P + T keys (`mask_with_memory`). Positions are indices among the P + T keys.
    """

    takes_positions = False

    hidden_BPD: Leaf  # [B, P, D]

    def enter(self, inputs_BTD: Array, norm: Callable[[Array], Array]) -> tuple[Array, Cache]:
        """The memory and the inputs, normalised by the same norm."""
        both = norm(jnp.concatenate([self.hidden_BPD.astype(inputs_BTD.dtype), inputs_BTD], axis=1))
        hidden_BPD, inputs_BTD = jnp.split(both, [self.hidden_BPD.shape[1]], axis=1)
        return inputs_BTD, TransformerXLMemory(hidden_BPD)

    def key_inputs(self, inputs_BTD: Array, encoded_BSD: Array | None) -> Array:
        """The memory, followed by the inputs."""
        if encoded_BSD is not None:
            raise ValueError(
                "The Transformer-XL memory is for self-attention, got encoder output too; leave one of them out."
            )
        return jnp.concatenate([self.hidden_BPD, inputs_BTD], axis=1)

    def leave(self, inputs_BTD: Array, updated: Cache) -> Cache:
        """The last P inputs so far (Dai et al. 2019, section 3.2)."""
        both = jnp.concatenate([self.hidden_BPD, inputs_BTD.astype(self.hidden_BPD.dtype)], axis=1)
        return TransformerXLMemory(jax.lax.stop_gradient(both[:, inputs_BTD.shape[1] :]))


def valid_tokens(mask: AttentionMask) -> Bool[Array, "B T"] | None:
    """Which queries of a mask are not padding; None if all are valid."""
    return None if mask.query_segment_ids is None else mask.query_segment_ids != 0


def init_cache(
    batch_size: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> KVCache:
    """An empty cache with room for `capacity` tokens a row.

    >>> init_cache(2, 8, num_kv_heads=1, head_dim=4).lengths_B.tolist()
    [0, 0]
    """
    slots = jnp.zeros((batch_size, num_kv_heads, capacity, head_dim), dtype)
    return KVCache(slots, slots, jnp.zeros((batch_size,), jnp.int32), jnp.zeros((), bool))


def init_cross_attention_cache(
    batch_size: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> CrossAttentionCache:
    """An empty cache of cross-attention; the first call fills it from the encoder output."""
    empty = jnp.zeros((batch_size, 0, num_kv_heads, head_dim), dtype)
    return CrossAttentionCache(empty, empty)


def check_right_padded(valid_BT: Bool[Array, "B T"]) -> Bool[Array, " B"]:
    """Which rows have padding before a token, where a cache has no slot for it; UserError if one is known to."""
    padded_first_B = jnp.any(valid_BT[:, 1:] & ~valid_BT[:, :-1], axis=1)
    if not isinstance(padded_first_B, Tracer) and padded_first_B.is_fully_addressable:
        rule = "With a cache, padding (segment ids of 0) must follow the tokens of a row"
        row = int(np.argmax(padded_first_B))
        require(not padded_first_B[row], f"{rule}; row {row} has padding before a token: pad prompts on the right.")
    return padded_first_B


def next_slots(
    lengths_B: Int[Array, " B"], num_tokens: int, valid_BT: Bool[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Slots, and thereby positions, of the next tokens of each row; 0 for padding, whose slot may exceed the capacity."""
    if valid_BT is not None:
        check_right_padded(valid_BT)
    slots_BT = lengths_B[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None]
    return slots_BT if valid_BT is None else jnp.where(valid_BT, slots_BT, 0)


def mark_slots(lengths_B: Int[Array, " B"], marked_BT: Bool[Array, "#B T"], capacity: int) -> Bool[Array, "B P"]:
    """Which slots hold the marked tokens among the next tokens of each row."""
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
        cache: the cache so far.
        key_BTGK: keys of the new tokens.
        value_BTGK: values of the new tokens.
        valid_BT: False for padding, which must come last in each row (else UserError, or in compiled code NaN in all keys of the
            row). None means that all tokens are valid.
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

    def scatter(slots_BGPK: Array, new_BTGK: Array) -> Array:
        return slots_BGPK.at[rows_B1, :, slots_BT].set(new_BTGK, mode="drop")

    def one(slots_BGPK: Array, new_BTGK: Array) -> Array:
        # XLA's CPU backend fuses a scatter of one token twice, into the cache and into attention, and then copies the cache
        # four times in every step. A branch is not fused, and writes in place.
        def put(slots_BGPK: Array) -> Array:
            start = (0, 0, slots_BT[0, 0], 0)
            return jax.lax.dynamic_update_slice(slots_BGPK, jnp.swapaxes(new_BTGK, 1, 2), start)

        return jax.lax.cond(slots_BT[0, 0] < capacity, put, lambda slots_BGPK: slots_BGPK, slots_BGPK)

    def write(slots_BGPK: Array, new_BTGK: Array) -> Array:
        on_cpu = one if slots_BT.size == 1 else scatter
        new_BTGK = new_BTGK.astype(slots_BGPK.dtype)
        return jax.lax.platform_dependent(slots_BGPK, new_BTGK, cpu=on_cpu, default=scatter)

    return KVCache(
        key_BGPK=write(cache.key_BGPK, key_BTGK),
        value_BGPK=write(cache.value_BGPK, value_BTGK),
        lengths_B=jnp.minimum(wanted_B, capacity),
        overflow=cache.overflow | jnp.any(wanted_B > capacity),
    )


def check_capacity(capacity: int, prompt: int, new: int) -> None:
    """Raise ValueError unless a cache holds a prompt and the new tokens after it; for the host, before a run."""
    if prompt + new > capacity:
        raise ValueError(
            f"The cache must hold prompt and new tokens, {prompt} + {new}, but its capacity is {capacity}; "
            f"raise the capacity to {prompt + new}, shorten the prompt or ask for fewer tokens."
        )


def cache_overflow(caches: PyTree) -> Bool[Array, ""]:
    """Whether any layer of a model's cache dropped a token."""
    return jnp.any(jnp.stack([jnp.any(block.attention.overflow) for block in caches]))


def take_rows(caches: PyTree, rows_R: Int[Array, " R"], *, keep_encoded: bool = False) -> PyTree:
    """A model's cache with these rows; `keep_encoded` leaves cross-attention's cache as it is, for equal rows."""

    def take(cache: Cache) -> Cache:
        return cache if keep_encoded and isinstance(cache, CrossAttentionCache) else cache.take(rows_R)

    return jax.tree.map(take, caches, is_leaf=lambda part: isinstance(part, Cache))


def replace_rows(caches: PyTree, chosen_B: Bool[Array, " B"], others: PyTree) -> PyTree:
    """A model's cache with the chosen rows replaced by another's."""
    return jax.tree.map(
        lambda cache, other: cache.replace_rows(chosen_B, other), caches, others, is_leaf=lambda x: isinstance(x, Cache)
    )


def shorten(caches: PyTree, lengths_B: Int[Array, " B"]) -> PyTree:
    """A model's cache with only the first `lengths_B` tokens of each row."""
    return jax.tree.map(lambda cache: cache.shortened(lengths_B), caches, is_leaf=lambda x: isinstance(x, Cache))


def cache_lengths(caches: PyTree) -> Int[Array, " B"]:
    """Tokens held in each row of a model's cache; every layer holds the same."""
    lengths = caches[0].attention.lengths_B
    return lengths if lengths.ndim == 1 else lengths[0]
