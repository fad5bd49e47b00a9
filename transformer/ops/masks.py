"""Attention masks as descriptions: which keys each query sees, without a [T, S] array until a backend needs one."""

import dataclasses
import functools
import operator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from transformer.types import Array, Leaf


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@runtime_checkable
class BlockPattern(Protocol):
    """The blocks of keys that a block of queries sees (`ops/patterns`); frozen and hashable."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...

    def sees(self, query_blocks: Array, key_blocks: Array) -> Array:
        """Whether blocks with these numbers see these blocks; numpy or JAX integers that broadcast."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may attend to. All given conditions must hold.

    Rows are queries, columns are keys, and `1` means visible. With four tokens:

        causal=True        window=2           causal, window=2   segments [1 1 2 0]  key_lengths=[2]
        1 0 0 0            1 1 0 0            1 0 0 0            1 1 0 0             1 1 0 0
        1 1 0 0            1 1 1 0            1 1 0 0            1 1 0 0             1 1 0 0
        1 1 1 0            0 1 1 1            0 1 1 0            0 0 1 0             1 1 0 0
        1 1 1 1            0 0 1 1            0 0 1 1            0 0 0 0             1 1 0 0

    `causal`, `window` and `pattern` compare positions if they are given, else indices. The index of a query is
    `query_offset + row` (two new tokens after two cached ones: `causal=True, query_offset=[2]`):

        1 1 1 0
        1 1 1 1

    `key_prefix` exempts the keys that it marks from `causal`, and from nothing else: a prefix is visible to all of its segment
    (Liu et al. 2018; Raffel et al. 2020, figure 4). With `causal=True, key_prefix=[1 1 0 0]`:

        1 1 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1

    Segment 0 is padding: it attends to nothing and nothing attends to it. If only one side's segments are given, only their
    zeros are used. A query may see no key; its output is then zeros.

    Arrays may have a batch dimension of 1, which is broadcast to every row.
    """

    causal: bool = _static(False)
    """Hide keys later than the query."""
    window: int = _static(0)
    """Hide keys at a distance of this many positions or more, on either side; 0 means any distance."""
    pattern: BlockPattern | None = _static(None)
    """Hide keys outside the blocks that the query's block sees."""
    query_segment_ids: Leaf = None  # int [B, T]
    key_segment_ids: Leaf = None  # int [B, S]
    query_positions: Leaf = None  # int [B, T]
    key_positions: Leaf = None  # int [B, S]
    key_prefix: Leaf = None  # bool [B, S]; keys that earlier queries see too
    key_lengths: Leaf = None  # int [B]; keys from this index on are hidden
    query_offset: Leaf = None  # int [B]; the index of the first query among the keys
    visible: Leaf = None  # bool [B|1, H|1, T|1, S|1]; any other condition; only the reference supports it
    max_segments: int = dataclasses.field(default=0, metadata={"static": True, "promise": True})
    """A promise about segment ids: they count up along each row without gaps, `1 1 2 2 2 3 0 0`, with padding at its end and at
    most this many segments. With more than one, queries and keys have the same ids. 0 promises nothing. The promise changes no
    mask. Kernels that need it return NaN for a row that breaks it; others ignore it."""

    @classmethod
    def of(cls, mask: "AttentionMask | Array") -> "AttentionMask":
        """A description unchanged; a boolean array, such as `nn.make_attention_mask(..., dtype=bool)`, as `visible`."""
        if isinstance(mask, AttentionMask):
            return mask
        array, form = jnp.asarray(mask), "[B, 1, T, S] (or with sizes of 1 or H for B, 1, T and S)"
        if array.dtype != bool:
            raise ValueError(
                f"An attention mask must be an AttentionMask or booleans {form}, got an array of {array.dtype}; "
                "make it with dtype=bool, or pass numbers to add to the logits as the bias."
            )
        if array.ndim != 4:
            raise ValueError(f"An array as attention mask must have shape {form}, got {array.shape}.")
        return cls(visible=array)

    @classmethod
    def packed(
        cls, segment_ids: Int[jax.Array, "B T"] | None, *, causal: bool = False, window: int = 0, max_segments: int = 0
    ) -> "AttentionMask":
        """Self-attention within each segment of packed rows; None means one segment per row.

        Positions are not needed. A segment is contiguous: distances are the same between indices as between positions, and
        comparing indices lets a backend skip blocks that are hidden in every row.
        """
        return cls(
            causal=causal,
            window=window,
            query_segment_ids=segment_ids,
            key_segment_ids=segment_ids,
            max_segments=max_segments,
        )

    @property
    def compares_indices(self) -> bool:
        """Whether `causal`, `window` and `pattern` are known while tracing: neither positions nor an offset are given."""
        return self.query_positions is None and self.key_positions is None and self.query_offset is None

    def key_range(self, query_start: int, query_size: int, num_keys: int) -> tuple[int, int]:
        """The range `[low, high)` of keys that these queries may see, from static information."""
        low, high = 0, num_keys
        if self.compares_indices:
            query_last = query_start + query_size - 1
            if self.causal and self.key_prefix is None:
                high = min(high, query_last + 1)
            if self.window > 0:
                low = max(low, query_start - self.window + 1)
                high = min(high, query_last + self.window)
        return low, max(low, high)

    def key_blocks(self, query_start: int, query_size: int, key_size: int, num_keys: int) -> list[int]:
        """The blocks of `key_size` keys that these queries may see, from static information."""
        low, high = self.key_range(query_start, query_size, num_keys)
        blocks = np.arange(low // key_size, -(-high // key_size))
        if self.pattern is None or not self.compares_indices:
            return blocks.tolist()
        unit = self.pattern.block_size
        queries = np.arange(query_start // unit, (query_start + query_size - 1) // unit + 1)
        keys = np.arange(-(-num_keys // unit))
        seen = keys[self.pattern.sees(queries[:, None], keys).any(axis=0)]
        # A pattern's block may overlap several of these blocks, and the reverse.
        first, last = seen * unit // key_size, ((seen + 1) * unit - 1) // key_size
        return [b for b in blocks.tolist() if np.any((first <= b) & (b <= last))]

    def positions_of_queries(self, start: Array, size: int) -> Int[jax.Array, "B t"]:
        """Positions (or indices) of queries `start` to `start + size`, as `causal`, `window` and biases use them; B may be 1."""
        if self.query_positions is not None:
            return _columns(self.query_positions, start, size)
        indices_T = jnp.arange(size, dtype=jnp.int32)[None] + start
        return indices_T if self.query_offset is None else indices_T + self.query_offset[:, None]

    def positions_of_keys(self, start: Array, size: int) -> Int[jax.Array, "B s"]:
        """Positions (or indices) of keys `start` to `start + size`, as `causal`, `window` and biases use them; B may be 1."""
        if self.key_positions is not None:
            return _columns(self.key_positions, start, size)
        return jnp.arange(size, dtype=jnp.int32)[None] + start

    def to_bool(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "B H T S"]:
        """The whole mask as booleans; B is 1 if all rows agree, H is 1 if all heads do."""
        visible = self.block(0, num_queries, 0, num_keys)
        return visible if self.visible is None else visible & self.visible

    def sees(self, queries: Array, keys: Array, prefix: Array | None = None) -> Array:
        """Whether queries see keys at these positions by `causal`, `window` and `pattern`; numpy or JAX integers.

        `prefix` marks keys that `causal` does not hide.
        """
        conditions = []
        if self.causal:
            conditions.append(keys <= queries if prefix is None else (keys <= queries) | prefix)
        if self.window > 0:
            conditions.append(abs(queries - keys) < self.window)
        if self.pattern is not None:
            unit = self.pattern.block_size
            conditions.append(self.pattern.sees(queries // unit, keys // unit))
        return functools.reduce(operator.and_, conditions, True)

    def block(
        self, query_start: Array, query_size: int, key_start: Array, key_size: int
    ) -> Bool[jax.Array, "B 1 query_size key_size"]:
        """The mask of some queries and some keys; starts may be traced, sizes may not."""
        visible = jnp.ones((1, query_size, key_size), bool)
        if self.causal or self.window > 0 or self.pattern is not None:
            queries = self.positions_of_queries(query_start, query_size)[:, :, None]
            keys = self.positions_of_keys(key_start, key_size)[:, None, :]
            prefix = self.key_prefix
            visible &= self.sees(
                queries, keys, None if prefix is None else _columns(prefix, key_start, key_size)[:, None, :]
            )
        query_segments = key_segments = None
        if self.query_segment_ids is not None:
            query_segments = _columns(self.query_segment_ids, query_start, query_size)[:, :, None]
            visible &= query_segments != 0
        if self.key_segment_ids is not None:
            key_segments = _columns(self.key_segment_ids, key_start, key_size)[:, None, :]
            visible &= key_segments != 0
        if query_segments is not None and key_segments is not None:
            visible &= query_segments == key_segments
        if self.key_lengths is not None:
            indices_S = jnp.arange(key_size, dtype=jnp.int32) + key_start
            visible &= indices_S[None, None, :] < self.key_lengths[:, None, None]
        return visible[:, None]

    def check(self, batch: int, num_queries: int, num_keys: int, num_heads: int = 1) -> None:
        """Raise ValueError unless every array fits queries of [batch, num_queries] and keys of [batch, num_keys]."""
        wanted = (batch, num_heads, num_queries, num_keys)
        given = wanted if self.visible is None else jnp.shape(self.visible)
        if len(given) != 4 or any(size not in (1, full) for size, full in zip(given, wanted, strict=True)):
            raise ValueError(
                f"An array as attention mask must have shape [{batch}, 1, {num_queries}, {num_keys}] (or sizes of 1, or "
                f"{num_heads} for the heads), got {given}."
            )
        if self.window < 0:
            raise ValueError(f"AttentionMask.window must be 0 (any distance) or positive, got {self.window}.")
        if self.max_segments < 0:
            raise ValueError(f"AttentionMask.max_segments must be 0 (no promise) or positive, got {self.max_segments}.")
        sizes = {"query": num_queries, "key": num_keys}
        for name in ("query_segment_ids", "key_segment_ids", "query_positions", "key_positions", "key_prefix"):
            _check_shape(name, getattr(self, name), (batch, sizes[name.split("_")[0]]))
        for name in ("key_lengths", "query_offset"):
            _check_shape(name, getattr(self, name), (batch,))


def _check_shape(name: str, array: Any, expected: tuple[int, ...]) -> None:
    if array is not None and jnp.shape(array) not in (expected, (1, *expected[1:])):
        raise ValueError(
            f"AttentionMask.{name} must have shape {expected} (or a batch of 1) to fit query and key, "
            f"got {jnp.shape(array)}."
        )


def _columns(array: Any, start: Any, size: int) -> jax.Array:
    if isinstance(start, int):
        return jnp.asarray(array[:, start : start + size])
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)
