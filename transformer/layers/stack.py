"""A stack of blocks on embedded tokens: positions and dropout before it, the final norm after it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.block import Block, BlockCache
from transformer.layers.cache import (
    NO_CACHE,
    TransformerXLMemory,
    cache_lengths,
    init_cache,
    init_cross_attention_cache,
    next_slots,
    valid_tokens,
)
from transformer.layers.norm import Normalize
from transformer.layers.positions import PositionEmbedding, RelativeBias
from transformer.layers.runtime import Runtime
from transformer.layers.transformer_xl_memory import mask_with_memory
from transformer.model_config import BlockConfig, ModelConfig
from transformer.ops import dense_cpu, experts
from transformer.ops.masks import AttentionMask

# Results stored for the backward pass. Attention's own products have batch dimensions and are recomputed: storing them would
# need memory quadratic in the sequence.
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(dense_cpu.PRODUCT, experts.PRODUCT),
    ),
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}

StackCache = tuple[BlockCache, ...]
"""One entry per block; for scanned blocks, one per block of the pattern, with a leading axis of periods."""

_COLLECTIONS: Any = {"params": 0, "routing": 0, "attention": 0, "stream": 0}
"""Variable collections with one entry per layer in a scanned stack."""


class Blocks(nn.Module):
    """Consecutive blocks: the whole depth in a loop, or the one period that a scan repeats (`scanned`)."""

    config: ModelConfig
    blocks: tuple[BlockConfig, ...]
    cross_attention: bool = False
    scanned: bool = False
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], caches: StackCache | None, *, train: bool = False, **context: Any
    ) -> tuple[Float[Array, "B T D"], StackCache | None]:
        """The stream after the last block, and the blocks' caches."""
        config = self.config
        updated = []

        def run(block: Block, x_BTD: Array, cache: BlockCache | None) -> Any:
            out = block(x_BTD, cache=cache, train=train, **context)
            return (out, None) if cache is None else out

        if config.remat != "none":
            # Inside a scan, the loop itself keeps XLA from merging the recomputation with the forward pass.
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
        cross_attention: whether blocks have cross-attention.
        runtime: `dot_general` and sharding; types and initialisation are the config's.
        bidirectional_prefix: whether a causal stack sees a prefix in both directions.

    A scanned stack holds the parameters of the pattern's blocks under `blocks`, each with a leading axis `layers`. Blocks before
    the pattern are under `first`, blocks of a last, incomplete period under `last`. A looped stack holds all under `blocks`;
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
        encoded_BSD: Float[Array, "B S M"] | None = None,
        encoder_mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen)
        cache: StackCache | None = None,
        memory_BLPD: Float[Array, "B L P D"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The normalised hidden states after the last block, and the cache or memory (None if neither was given).

        Args:
            embedded_BTD: token vectors.
            positions_BT: of the tokens; None means 0, 1, ... Must be None with a cache, which uses its next slots.
            mask: of self-attention.
            encoded_BSD: the encoder output, for cross-attention; with a cache, needed in the first call only.
            encoder_mask: mask of cross-attention.
            cache: the cache returned by the previous call.
            memory_BLPD: Transformer-XL memory of each layer (`layers.transformer_xl_memory`). The first position of a row is
                then the number of memory vectors that belong to its first segment.
            train: apply dropout, with the `dropout` key.
        """
        config, runtime = self.config, self.runtime.of(self.config)
        x_BTD = self._embed(embedded_BTD, _resolve_positions(embedded_BTD.shape[1], positions_BT, mask, cache), train)
        relative = RelativeBias(config.positions, config.blocks[0].attention.num_heads, runtime, name="relative_bias")
        relative_bias = relative(bidirectional=not mask.causal or self.bidirectional_prefix)
        caches = cache
        if memory_BLPD is not None:
            mask = _remember(mask, positions_BT, embedded_BTD.shape[0], memory_BLPD.shape[2], cache)
            # Positions are indices from here on. Distances stay the same; document positions may be too large for float32 angles.
            positions_BT, caches = None, _by_block(memory_BLPD, config)
        context = {
            "mask": mask,
            "relative_bias": relative_bias,
            "positions_BT": positions_BT,
            "encoded_BSD": encoded_BSD,
            "encoder_mask": encoder_mask,
            "train": train,
        }
        kept: Any = () if caches is not None else None
        for name, blocks in _parts(config).items():
            x_BTD, updated = self._run(name, blocks, x_BTD, caches, context, runtime)
            if caches is not None:
                kept, caches = (*kept, *updated), caches[len(blocks) :]
        if config.final_norm and config.blocks[-1].norm.placement != "post":
            x_BTD = Normalize(config.blocks[-1].norm, runtime=runtime, name="final_norm")(x_BTD)
        return x_BTD, kept if memory_BLPD is None else _by_row(kept, config)

    def _embed(self, embedded_BTD: Array, positions_BT: Array, train: bool) -> Array:
        """The stream before the first block: token vectors plus position vectors, with the configured norm and dropout."""
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
        """The stream after one part of the stack, and its caches; `caches` starts with the caches of this part."""
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
    """The blocks of each part of a stack, by its name: all in one loop, or separately for a scanned pattern."""
    if not config.scan_layers:
        return {"blocks": config.blocks}
    parts = {"first": config.first, "blocks": config.pattern, "last": config.remainder}
    return {name: blocks for name, blocks in parts.items() if blocks}


def _remember(mask: AttentionMask, positions_BT: Any, rows: int, length: int, cache: Any) -> AttentionMask:
    """The mask extended to the Transformer-XL memory."""
    if cache is not None or positions_BT is None:
        raise ValueError(
            "A Transformer-XL memory needs positions_BT (the first counts the document's earlier tokens) and no "
            f"cache, got {'no positions_BT' if positions_BT is None else 'a cache'}."
        )
    return mask_with_memory(mask, positions_BT, rows, length)


def _by_block(memory_BLPD: Float[Array, "B L P D"], config: ModelConfig) -> StackCache:
    """One cache per block; for a scanned pattern, one per block of the pattern with a leading axis of periods."""
    layers_LBPD = list(jnp.moveaxis(memory_BLPD, 1, 0))
    if config.scan_layers:
        first, period, end = len(config.first), len(config.pattern), config.num_layers - len(config.remainder)
        scanned = [jnp.stack(layers_LBPD[first + index : end : period]) for index in range(period)]
        layers_LBPD = [*layers_LBPD[:first], *scanned, *layers_LBPD[end:]]
    return tuple(BlockCache(TransformerXLMemory(layer)) for layer in layers_LBPD)


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
    """The given positions, else the cache's next slots, else indices."""
    if cache is None:
        return jnp.arange(num_tokens, dtype=jnp.int32)[None] if positions_BT is None else positions_BT
    if positions_BT is not None:
        raise ValueError("With a cache, positions are its next slots; leave positions_BT out.")
    return next_slots(cache_lengths(cache), num_tokens, valid_tokens(mask))


def init_stack_cache(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    cross_attention: bool = False,
) -> StackCache:
    """An empty cache for a `Stack`, with room for `capacity` tokens a row.

    Args:
        config: the model.
        batch_size: rows.
        capacity: tokens per row, at most max_length with learned positions.
        dtype: of keys and values; None means the model's.
        cross_attention: whether blocks have cross-attention.
    """
    config.positions.check_length(config.max_length, capacity)
    dtype = jnp.dtype(dtype or config.dtype)

    def block_cache(block: BlockConfig) -> BlockCache:
        heads, head_dim = block.attention.kv_heads, block.attention.resolved_head_dim(config.embed_dim)
        encoded = init_cross_attention_cache(batch_size, heads, head_dim, dtype) if cross_attention else NO_CACHE
        return BlockCache(init_cache(batch_size, capacity, heads, head_dim, dtype), encoded)

    caches = {name: tuple(map(block_cache, blocks)) for name, blocks in _parts(config).items()}
    if config.scan_layers:
        scanned = (config.num_periods,)
        caches["blocks"] = jax.tree.map(lambda x: jnp.broadcast_to(x[None], scanned + x.shape), caches["blocks"])
    return tuple(cache for part in caches.values() for cache in part)
