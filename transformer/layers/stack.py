"""A stack of blocks on embedded tokens: positions and dropout before it, the final norm after it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.block import Block, BlockCache
from transformer.layers.cache import (
    NO_CACHE,
    Recurrence,
    cache_lengths,
    init_cache,
    init_memory_cache,
    next_slots,
    valid_tokens,
)
from transformer.layers.norm import Normalize
from transformer.layers.positions import PositionEmbedding, RelativeBias
from transformer.layers.recurrence import recurrent_mask
from transformer.layers.runtime import Runtime
from transformer.model_config import BlockConfig, ModelConfig
from transformer.ops import dense_cpu, experts
from transformer.ops.masks import AttentionMask

# What the backward pass finds stored. Attention's own products have batch dimensions and are recomputed: kept, they
# would need memory quadratic in the sequence.
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(dense_cpu.PRODUCT, experts.PRODUCT),
    ),
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}

StackCache = tuple[BlockCache, ...]
"""One entry a block; of scanned blocks one a block of the pattern, with a leading axis of periods."""

_COLLECTIONS: Any = {"params": 0, "routing": 0, "attention": 0, "stream": 0}
"""What a scanned stack has for each layer."""


class Blocks(nn.Module):
    """Blocks one after another: the whole depth of a loop, or the one period that a scan repeats (`scanned`)."""

    config: ModelConfig
    blocks: tuple[BlockConfig, ...]
    cross_attention: bool = False
    scanned: bool = False
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], caches: StackCache | None, *, train: bool = False, **context: Any
    ) -> tuple[Float[Array, "B T D"], StackCache | None]:
        """The stream after every block, and their caches."""
        config = self.config
        updated = []

        def run(block: Block, x_BTD: Array, cache: BlockCache | None) -> Any:
            out = block(x_BTD, cache=cache, train=train, **context)
            return (out, None) if cache is None else out

        if config.remat != "none":
            # Inside a scan the loop itself keeps XLA from merging the recomputation with the first pass.
            run = nn.remat(run, policy=_REMAT_POLICIES[config.remat], prevent_cse=not self.scanned)
        for index, block_config in enumerate(self.blocks):
            block = Block(
                block_config,
                positions=config.positions,
                cross_attention=self.cross_attention,
                dropout=config.dropout,
                runtime=self.runtime,
                name=f"block_{index}",
            )
            x_BTD, cache = run(block, x_BTD, None if caches is None else caches[index])
            updated.append(cache)
            x_BTD = self.runtime.constrain(x_BTD, "batch", "length", None)
        return x_BTD, None if caches is None else tuple(updated)


class Stack(nn.Module):
    """`config.num_layers` blocks, as a loop or as one compiled period scanned over; `config.remat` applies to each.

    Attributes:
        config: the model.
        cross_attention: whether blocks attend to a memory too.
        runtime: the product and sharding; types and initialisation are the config's.
        bidirectional_prefix: whether a causal stack sees a prefix in both directions.

    A scanned stack holds the parameters of the pattern's blocks under `blocks`, each with a leading axis `layers`, and those of
    the config's first blocks and of a last, incomplete period under `first` and `last`. A looped one holds all under `blocks`;
    `layers.scan_params` converts between the two.
    """

    config: ModelConfig
    cross_attention: bool = False
    runtime: Runtime = Runtime()
    bidirectional_prefix: bool = False

    @nn.compact
    def __call__(
        self,
        embedded_BTD: Float[Array, "B T D"],
        *,
        positions_BT: Int[Array, "#B T"] | None = None,
        mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen)
        memory_BSD: Float[Array, "B S M"] | None = None,
        memory_mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen)
        cache: StackCache | None = None,
        recurrence_BLPD: Float[Array, "B L P D"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The hidden states after the last block (normalised), and the cache or recurrence, None if none was given.

        Args:
            embedded_BTD: token vectors.
            positions_BT: of the tokens; None means 0, 1, ... (with a cache: its next slots, and nothing else).
            mask: of self-attention.
            memory_BSD: what cross-attention attends to; with a cache, needed in the first call only.
            memory_mask: of cross-attention.
            cache: what earlier calls left.
            recurrence_BLPD: what each layer remembers of the rows before (`layers.recurrence`); with it, the first of a row's
                positions says how much of that belongs to its first segment.
            train: apply dropout, with the `dropout` key.
        """
        config, runtime = self.config, self.runtime.of(self.config)
        x_BTD = self._embed(embedded_BTD, _resolve_positions(embedded_BTD.shape[1], positions_BT, mask, cache), train)
        relative = RelativeBias(config.positions, config.blocks[0].attention.num_heads, runtime, name="relative_bias")
        relative_bias = relative(bidirectional=not mask.causal or self.bidirectional_prefix)
        caches = cache
        if recurrence_BLPD is not None:
            mask = _remember(mask, positions_BT, embedded_BTD.shape[0], recurrence_BLPD.shape[2], cache)
            # Places are indices from here on: they differ as positions do, which may be too large for a float32 angle.
            positions_BT, caches = None, _by_block(recurrence_BLPD, config)
        context = {
            "mask": mask,
            "relative_bias": relative_bias,
            "positions_BT": positions_BT,
            "memory_BSD": memory_BSD,
            "memory_mask": memory_mask,
            "train": train,
        }
        kept: Any = () if caches is not None else None
        for name, blocks in _parts(config).items():
            x_BTD, updated = self._run(name, blocks, x_BTD, caches, context, runtime)
            if caches is not None:
                kept, caches = (*kept, *updated), caches[len(blocks) :]
        if config.final_norm and config.blocks[-1].norm.placement != "post":
            x_BTD = Normalize(config.blocks[-1].norm, runtime=runtime, name="final_norm")(x_BTD)
        return x_BTD, kept if recurrence_BLPD is None else _by_row(kept, config)

    def _embed(self, embedded_BTD: Array, positions_BT: Array, train: bool) -> Array:
        """The stream before the first block: token vectors with those of positions, a norm where there is one, and dropout."""
        config, runtime = self.config, self.runtime.of(self.config)
        add_positions = PositionEmbedding(config.positions, config.max_length, runtime, name="position_embedding")
        x_BTD = add_positions(embedded_BTD, positions_BT)
        if config.embedding_norm:
            x_BTD = Normalize(config.blocks[0].norm, runtime=runtime, name="embedding_norm")(x_BTD)
        x_BTD = nn.Dropout(config.dropout)(x_BTD, deterministic=not train)
        return self.runtime.constrain(x_BTD, "batch", "length", None)

    def _run(
        self, name: str, blocks: tuple[BlockConfig, ...], x_BTD: Array, caches: Any, context: Any, runtime: Runtime
    ) -> Any:
        """The stream after a part of the blocks, and its caches; `caches` begin with those of this part."""
        config, scanned = self.config, self.config.scan_layers and name == "blocks"
        part = Blocks(config, blocks, self.cross_attention, scanned, runtime, name=name)

        def run(part: Blocks, x_BTD: Array, caches: Any) -> Any:
            return part(x_BTD, caches, **context)

        if scanned:
            run = nn.scan(
                run,
                variable_axes=_COLLECTIONS,
                split_rngs={"params": True, "dropout": True},
                length=config.num_periods,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
        return run(part, x_BTD, None if caches is None else caches[: len(blocks)])


def _parts(config: ModelConfig) -> dict[str, tuple[BlockConfig, ...]]:
    """The blocks of each part of a stack, by its name: all in one loop, or those around a scanned pattern apart."""
    if not config.scan_layers:
        return {"blocks": config.blocks}
    parts = {"first": config.first, "blocks": config.pattern, "last": config.remainder}
    return {name: blocks for name, blocks in parts.items() if blocks}


def _remember(mask: AttentionMask, positions_BT: Any, rows: int, length: int, cache: Any) -> AttentionMask:
    """The mask over the memory of a recurrence too."""
    if cache is not None or positions_BT is None:
        raise ValueError(
            "A recurrence needs positions_BT, whose first say how much of it a row continues, and no cache; "
            f"got {'no positions_BT' if positions_BT is None else 'a cache'}."
        )
    return recurrent_mask(mask, positions_BT, rows, length)


def _by_block(recurrence_BLPD: Float[Array, "B L P D"], config: ModelConfig) -> StackCache:
    """A cache for each block; for each of a scanned pattern one with a leading axis of periods."""
    layers_LBPD = list(jnp.moveaxis(recurrence_BLPD, 1, 0))
    if config.scan_layers:
        first, period, end = len(config.first), len(config.pattern), config.num_layers - len(config.remainder)
        scanned = [jnp.stack(layers_LBPD[first + index : end : period]) for index in range(period)]
        layers_LBPD = [*layers_LBPD[:first], *scanned, *layers_LBPD[end:]]
    return tuple(BlockCache(Recurrence(layer)) for layer in layers_LBPD)


def _by_row(caches: Any, config: ModelConfig) -> Float[Array, "B L P D"]:
    """The inverse of `_by_block`."""
    layers = [cache.attention.hidden_BPD for cache in caches]
    if config.scan_layers:
        first, period = len(config.first), len(config.pattern)
        scanned = jnp.stack(layers[first : first + period], axis=1)
        layers = [*layers[:first], *scanned.reshape(-1, *scanned.shape[2:]), *layers[first + period :]]
    return jnp.stack(layers, axis=1)


def _resolve_positions(
    num_tokens: int, positions_BT: Any, mask: AttentionMask, cache: StackCache | None
) -> Int[Array, "B T"]:
    """Positions as given; else the cache's next slots, or indices where there is no cache."""
    if cache is None:
        return jnp.arange(num_tokens, dtype=jnp.int32)[None] if positions_BT is None else positions_BT
    if positions_BT is not None:
        raise ValueError("With a cache, positions are its next slots; leave positions_BT out.")
    return next_slots(cache_lengths(cache), num_tokens, valid_tokens(mask))


def init_stack_cache(
    config: ModelConfig, batch_size: int, capacity: int, *, dtype: Any = None, cross_attention: bool = False
) -> StackCache:
    """An empty cache for a `Stack`, with room for `capacity` tokens a row.

    Args:
        config: the model.
        batch_size: rows.
        capacity: tokens a row, at most max_length where positions are learned.
        dtype: of keys and values; None means the model's.
        cross_attention: whether blocks have it.
    """
    config.positions.check_length(config.max_length, capacity)
    dtype = jnp.dtype(dtype or config.dtype)

    def block_cache(block: BlockConfig) -> BlockCache:
        heads, head_dim = block.attention.kv_heads, block.attention.resolved_head_dim(config.embed_dim)
        memory = init_memory_cache(batch_size, heads, head_dim, dtype) if cross_attention else NO_CACHE
        return BlockCache(init_cache(batch_size, capacity, heads, head_dim, dtype), memory)

    caches = {name: tuple(map(block_cache, blocks)) for name, blocks in _parts(config).items()}
    if config.scan_layers:
        scanned = (config.num_periods,)
        caches["blocks"] = jax.tree.map(lambda x: jnp.broadcast_to(x[None], scanned + x.shape), caches["blocks"])
    return tuple(cache for part in caches.values() for cache in part)
