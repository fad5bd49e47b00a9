"""Attention over a mesh: each device computes its rows and heads; a ring of devices shares the positions of a row."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from transformer.ops.attention import ATTENTION_SCOPE, Bias, dot_product_attention
from transformer.ops.bias import BiasDescription
from transformer.ops.masks import AttentionMask
from transformer.ops.ring import ring_attention
from transformer.parallel.rules import Sharding, axes_in


def context_size(sharding: Sharding) -> int:
    """Number of devices in the current mesh that share the positions of a row."""
    mesh_axes = sharding.sharded_axes()
    return math.prod(mesh_axes.get(axis, 1) for axis in sharding.axes("length")) if mesh_axes else 1


class _Axes(NamedTuple):
    """Mesh axes over which the dimensions of attention are sharded; None for unsharded ones."""

    rows: Any = None
    positions: Any = None
    heads: Any = None

    def divide(self, rows: int, heads: int, mesh_axes: Any) -> bool:
        """Whether these numbers of rows and key/value heads are divisible."""
        cut = ((rows, self.rows), (heads, self.heads))
        return all(size % math.prod(mesh_axes[axis] for axis in axes_in(axes)) == 0 for size, axes in cut)

    def of_mask(self, mask: AttentionMask) -> Any:
        """The sharding of each array of a mask."""

        def spec(array: Any) -> PartitionSpec:
            return PartitionSpec(None if array.shape[0] == 1 else self.rows, *(self.positions,) * (array.ndim - 1))

        return jax.tree.map(spec, mask)

    def of_bias(self, bias: Any) -> Any:
        """The sharding of each array of a description, whose last axis is heads."""
        return jax.tree.map(lambda leaf: PartitionSpec(*(None,) * (leaf.ndim - 1), self.heads), bias)


def sharded_attention(
    query_BTHK: Float[Array, "B T H K"],
    key_BSGK: Float[Array, "B S G K"],
    value_BSGK: Float[Array, "B S G W"],
    *,
    mask: AttentionMask,
    bias: Bias | None,
    scale: float,
    logits_soft_cap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str = "auto",
    sharding: Sharding = Sharding(),  # noqa: B008 (frozen)
) -> Float[Array, "B T H W"]:
    """`ops.dot_product_attention`, inside `jax.shard_map` under the current mesh (`jax.set_mesh`).

    Rows and heads are sharded by `sharding`: a kernel sees one device's part, without communication. If the positions of a row
    are sharded too (`ops.zigzag.balanced_order`), keys and values pass around a ring. If rows or heads are not divisible (one
    row in decoding), and for dropout and dense biases, XLA partitions the reference.
    """
    settings: dict[str, Any] = {"scale": scale, "logits_soft_cap": logits_soft_cap}
    mesh_axes = sharding.sharded_axes()
    axes = _Axes(*sharding.spec(("batch", "length", "heads"), mesh_axes)) if mesh_axes else _Axes()
    dense = dropout_rate > 0 or mask.visible is not None or not (bias is None or isinstance(bias, BiasDescription))
    fits = axes.divide(query_BTHK.shape[0], key_BSGK.shape[2], mesh_axes)
    ring = axes.positions is not None
    if ring and (dense or not fits):
        raise ValueError(
            "Over a context axis, the mesh must divide rows and heads, without dropout and without an array as bias or mask; got "
            f"{query_BTHK.shape[0]} rows, {key_BSGK.shape[2]} key/value heads, dropout {dropout_rate} and a mesh of {mesh_axes}."
        )
    if not mesh_axes or dense or not fits:
        settings |= {"dropout_rate": dropout_rate, "dropout_key": dropout_key, "implementation": implementation}
        return dot_product_attention(query_BTHK, key_BSGK, value_BSGK, mask=mask, bias=bias, **settings)

    def attend(query: Any, key: Any, value: Any, mask: AttentionMask, bias: Any) -> Any:
        if ring:
            return ring_attention(query, key, value, mask=mask, bias=bias, axis_name=axes.positions, **settings)
        return dot_product_attention(query, key, value, mask=mask, bias=bias, implementation=implementation, **settings)

    whole = PartitionSpec(*axes)
    sharded = jax.shard_map(
        attend,
        in_specs=(whole, whole, whole, axes.of_mask(mask), axes.of_bias(bias)),
        out_specs=whole,
        check_vma=False,
    )
    with jax.named_scope(ATTENTION_SCOPE):
        return sharded(query_BTHK, key_BSGK, value_BSGK, mask, bias)
