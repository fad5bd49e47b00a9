"""A stack of blocks on embedded tokens: positions and dropout before it, the final norm after it."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.block import Block, BlockCache
from transformer.layers.cache import cache_lengths, init_cache, init_memory_cache, next_slots
from transformer.layers.embedding import PositionEmbedding, RelativeBias, check_learned_length
from transformer.layers.linear import DotGeneral
from transformer.layers.norm import make_norm
from transformer.layers.recurrence import by_layer, by_row, recurrent_mask, remember
from transformer.model_config import BlockConfig, ModelConfig
from transformer.ops import dense_cpu, experts
from transformer.ops.masks import AttentionMask
from transformer.parallel.rules import constrain

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
"""One entry a block; with `scan_layers` one a block of the pattern, with a leading axis of periods."""


class Blocks(nn.Module):
    """Blocks one after another: the whole depth of a loop, or the one period that a scan repeats."""

    config: ModelConfig
    blocks: tuple[BlockConfig, ...]
    cross_attention: bool = False
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        caches: StackCache | tuple[Array, ...] | None,
        *,
        train: bool = False,
        **context: Any,
    ) -> tuple[Float[Array, "B T D"], StackCache | tuple[Array, ...] | None]:
        """The stream after every block, and their caches, or for vectors before the inputs of each, those before the next."""
        config = self.config
        updated = []
        for index, block_config in enumerate(self.blocks):
            block = Block(
                block_config,
                positions=config.positions,
                cross_attention=self.cross_attention,
                dropout=config.dropout,
                init_std=config.init_std,
                residual_init_scale=1 / math.sqrt(2 * config.num_layers),
                dtype=jnp.dtype(config.dtype),
                param_dtype=jnp.dtype(config.param_dtype),
                dot_general=self.dot_general,
                name=f"block_{index}",
            )

            def run(block: Block, x_BTD: Array, cache: BlockCache | Array | None) -> Any:
                if cache is None or isinstance(cache, BlockCache):
                    return block(x_BTD, cache=cache, train=train, **context)
                return block(x_BTD, earlier_BPD=cache, train=train, **context), remember(cache, x_BTD)

            if config.remat != "none":
                # Inside a scan the loop itself keeps XLA from merging the recomputation with the first pass.
                run = nn.remat(run, policy=_REMAT_POLICIES[config.remat], prevent_cse=not config.scan_layers)
            if caches is None:
                x_BTD = run(block, x_BTD, None)
            else:
                x_BTD, cache = run(block, x_BTD, caches[index])
                updated.append(cache)
            x_BTD = constrain(x_BTD, "batch", "length", None)
        return x_BTD, None if caches is None else tuple(updated)


class Stack(nn.Module):
    """`config.num_layers` blocks, as a loop or as one compiled period scanned over; `config.remat` applies to each.

    Attributes:
        config: the model.
        cross_attention: whether blocks attend to a memory too.
        dot_general: replaces `jax.lax.dot_general` in the linear layers.

    A scanned stack holds the same parameters as a loop under the same names, those of one period, each with a leading
    axis `layers`; `layers.scan_params` converts between the two.
    """

    config: ModelConfig
    cross_attention: bool = False
    dot_general: DotGeneral = jax.lax.dot_general

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
        config = self.config
        dtypes: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}
        add_positions = PositionEmbedding(
            config.positions,
            max_length=config.max_length,
            init_std=config.init_std,
            name="position_embedding",
            **dtypes,
        )
        x_BTD = add_positions(embedded_BTD, _resolve_positions(embedded_BTD.shape[1], positions_BT, mask, cache))
        x_BTD = constrain(nn.Dropout(config.dropout)(x_BTD, deterministic=not train), "batch", "length", None)

        relative_bias = None
        if config.positions.kind == "t5":
            heads, std = config.pattern[0].attention.num_heads, config.init_std
            relative = RelativeBias(config.positions, heads, std, dtypes["param_dtype"], name="relative_bias")
            relative_bias = relative(bidirectional=not mask.causal or config.bidirectional_prefix)
        kept: Any = cache
        num_periods = config.num_layers // len(config.pattern)
        if recurrence_BLPD is not None:
            if cache is not None or positions_BT is None:
                raise ValueError(
                    "A recurrence needs positions_BT, whose first say how much of it a row continues, and no cache; "
                    f"got {'no positions_BT' if positions_BT is None else 'a cache'}."
                )
            # Places are indices from here on: they differ as positions do, which may be too large for a float32 angle.
            mask = recurrent_mask(mask, positions_BT, embedded_BTD.shape[0], recurrence_BLPD.shape[2])
            positions_BT, kept = None, by_layer(recurrence_BLPD, num_periods, config.scan_layers)
        context = {
            "mask": mask,
            "relative_bias": relative_bias,
            "positions_BT": positions_BT,
            "memory_BSD": memory_BSD,
            "memory_mask": memory_mask,
        }
        repeats = 1 if config.scan_layers else num_periods
        blocks = Blocks(
            config,
            blocks=config.pattern * repeats,
            cross_attention=self.cross_attention,
            dot_general=self.dot_general,
            name="blocks",
        )

        def run(blocks: Blocks, x_BTD: Array, caches: Any) -> Any:
            return blocks(x_BTD, caches, train=train, **context)

        if config.scan_layers:
            run = nn.scan(
                run,
                variable_axes={"params": 0, "routing": 0},
                split_rngs={"params": True, "dropout": True},
                length=num_periods,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
        x_BTD, kept = run(blocks, x_BTD, kept)
        if recurrence_BLPD is not None:
            kept = by_row(kept, config.scan_layers)
        if config.final_norm and config.pattern[-1].norm.placement != "post":
            x_BTD = make_norm(config.pattern[-1].norm, name="final_norm", **dtypes)(x_BTD)
        return x_BTD, kept


def _resolve_positions(
    num_tokens: int, positions_BT: Any, mask: AttentionMask, cache: StackCache | None
) -> Int[Array, "B T"]:
    """Positions as given; else the cache's next slots, or indices where there is no cache."""
    if cache is None:
        return jnp.arange(num_tokens, dtype=jnp.int32)[None] if positions_BT is None else positions_BT
    if positions_BT is not None:
        raise ValueError("With a cache, positions are its next slots; leave positions_BT out.")
    valid_BT = None if mask.query_segment_ids is None else mask.query_segment_ids != 0
    return next_slots(cache_lengths(cache), num_tokens, valid_BT)


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
    if config.positions.kind == "learned":
        check_learned_length(config.max_length, capacity)
    dtype = jnp.dtype(dtype or config.dtype)

    def block_cache(block: BlockConfig) -> BlockCache:
        heads, head_dim = block.attention.kv_heads, block.attention.resolved_head_dim(config.embed_dim)
        memory = init_memory_cache(batch_size, heads, head_dim, dtype) if cross_attention else None
        return BlockCache(init_cache(batch_size, capacity, heads, head_dim, dtype), memory)

    num_periods = config.num_layers // len(config.pattern)
    if not config.scan_layers:
        return tuple(block_cache(block) for block in config.pattern * num_periods)
    period = tuple(block_cache(block) for block in config.pattern)
    return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (num_periods, *x.shape)), period)
