"""Attention over a mesh: each device its rows and heads, and around a ring where the places of a row are spread too."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from transformer.ops.attention import ATTENTION_SCOPE, dot_product_attention
from transformer.ops.bias import BiasDescription
from transformer.ops.masks import AttentionMask
from transformer.ops.ring import ring_attention
from transformer.parallel.rules import Sharding, axes_in


def context_size(sharding: Sharding) -> int:
    """How many devices of the mesh that is set share the positions of a row."""
    spread = sharding.spread()
    return math.prod(spread.get(axis, 1) for axis in sharding.axes("length")) if spread else 1


class _Axes(NamedTuple):
    """Axes of the mesh over which parts of attention are cut; None where they are not."""

    rows: Any = None
    places: Any = None
    heads: Any = None

    def divide(self, rows: int, heads: int, spread: Any) -> bool:
        """Whether so many rows and key/value heads can be cut."""
        cut = ((rows, self.rows), (heads, self.heads))
        return all(size % math.prod(spread[axis] for axis in axes_in(axes)) == 0 for size, axes in cut)

    def of_mask(self, mask: AttentionMask) -> Any:
        """How each array of a mask is cut."""

        def spec(array: Any) -> PartitionSpec:
            return PartitionSpec(None if array.shape[0] == 1 else self.rows, *(self.places,) * (array.ndim - 1))

        return jax.tree.map(spec, mask)

    def of_bias(self, bias: Any) -> Any:
        """How each array of a description is cut: its last axis are heads."""
        return jax.tree.map(lambda leaf: PartitionSpec(*(None,) * (leaf.ndim - 1), self.heads), bias)


def spread_attention(
    query_BTHK: Float[Array, "B T H K"],
    key_BSGK: Float[Array, "B S G K"],
    value_BSGK: Float[Array, "B S G W"],
    *,
    mask: AttentionMask,
    bias: Any,
    scale: float,
    logits_soft_cap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    implementation: str = "auto",
    sharding: Sharding = Sharding(),  # noqa: B008 (frozen)
) -> Float[Array, "B T H W"]:
    """`ops.dot_product_attention`, under the mesh that is set (`jax.set_mesh`) in `jax.shard_map`.

    Rows and heads are cut as `sharding` has it: a kernel sees one device's part, and no exchange is needed. Where the positions
    of a row are spread too, dealt out by `ops.places.balanced_order`, keys go round a ring. Where rows or heads cannot be cut
    (one row to decode), and for dropout and dense biases, XLA spreads the reference.
    """
    settings: dict[str, Any] = {"scale": scale, "logits_soft_cap": logits_soft_cap}
    spread = sharding.spread()
    axes = _Axes(*sharding.spec(("batch", "length", "heads"), spread)) if spread else _Axes()
    dense = dropout_rate > 0 or mask.visible is not None or not (bias is None or isinstance(bias, BiasDescription))
    fits = axes.divide(query_BTHK.shape[0], key_BSGK.shape[2], spread)
    ring = axes.places is not None
    if ring and (dense or not fits):
        raise ValueError(
            "Over a context axis, attention needs rows and heads that the mesh divides, no dropout, no array as bias or mask; "
            f"got {query_BTHK.shape[0]} rows, {key_BSGK.shape[2]} key/value heads, dropout {dropout_rate} and a mesh of {spread}."
        )
    if not spread or dense or not fits:
        settings |= {"dropout_rate": dropout_rate, "dropout_key": dropout_key, "implementation": implementation}
        return dot_product_attention(query_BTHK, key_BSGK, value_BSGK, mask=mask, bias=bias, **settings)

    def attend(query: Any, key: Any, value: Any, mask: AttentionMask, bias: Any) -> Any:
        if ring:
            return ring_attention(query, key, value, mask=mask, bias=bias, axis_name=axes.places, **settings)
        return dot_product_attention(query, key, value, mask=mask, bias=bias, implementation=implementation, **settings)

    whole = PartitionSpec(*axes)
    spread_attend = jax.shard_map(
        attend,
        in_specs=(whole, whole, whole, axes.of_mask(mask), axes.of_bias(bias)),
        out_specs=whole,
        check_vma=False,
    )
    with jax.named_scope(ATTENTION_SCOPE):
        return spread_attend(query_BTHK, key_BSGK, value_BSGK, mask, bias)
