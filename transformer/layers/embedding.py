"""Vectors for tokens and for positions, and the token vectors again as output projection."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.linear import DotGeneral, kernel_product, normal_initializer, stored, with_axes
from transformer.model_config import PositionConfig
from transformer.ops.bias import T5Bias
from transformer.ops.ids import check_ids, look_up
from transformer.ops.panels import Panels, cut_panels, panel_columns
from transformer.ops.positions import sinusoidal


class Embed(nn.Module):
    """A table of vectors: looked up for tokens, and multiplied with for tied logits (Press and Wolf 2017).

    Attributes:
        num_embeddings: rows of the table.
        embed_dim: their width.
        scale: multiply what is looked up by sqrt(embed_dim) (Vaswani et al. 2017, section 3.4).
        init_std: standard deviation of the initial table; 0 means 1 / sqrt(embed_dim).
    """

    num_embeddings: int
    embed_dim: int
    scale: bool = False
    init_std: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    dot_general: DotGeneral = jax.lax.dot_general

    def setup(self) -> None:
        """Make the table."""
        init = normal_initializer(self.init_std, self.embed_dim)
        shape = (self.num_embeddings, self.embed_dim)
        self.embedding = stored(self, "embedding", with_axes(init, ("vocab", "embed")), shape)

    def __call__(self, indices: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The rows at `indices`; of one outside the table NaN, or UserError where it is known (`ops.ids`)."""
        check_ids(indices, self.num_embeddings)
        find: Any = panel_columns if isinstance(self.embedding, Panels) else look_up
        # Rows are cast after the look-up: less to cast, and the gradient adds up in the parameter's dtype.
        rows = find(self.embedding, indices).astype(self.dtype)
        return rows * math.sqrt(self.embed_dim) if self.scale else rows

    def attend(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The product of each vector with every row, accumulated and returned in float32."""
        kernel = self.embedding if isinstance(self.embedding, Panels) else self.embedding.T
        return kernel_product(self, hidden.astype(self.dtype), kernel, 1, jnp.float32)

    @nn.nowrap
    def cut(self, table: Float[Array, "V D"], width: int) -> Panels:
        """The table in panels of so many rows, from which they are looked up and multiplied."""
        return Panels(cut_panels(table.astype(self.dtype).T, width), (self.num_embeddings,))


class PositionEmbedding(nn.Module):
    """Vectors added to the embeddings: a learned table, sinusoids, or (for kinds that live in attention) nothing.

    Attributes:
        config: which kind.
        max_length: rows of a learned table.
        init_std: standard deviation of a learned table; 0 means 1 / sqrt(embed_dim).
    """

    config: PositionConfig
    max_length: int
    init_std: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "#B T"]) -> Float[Array, "B T D"]:
        """The embeddings with their positions' vectors added; NaN at a position beyond a learned table."""
        embed_dim = inputs_BTD.shape[-1]
        if self.config.kind == "learned":
            check_learned_length(self.max_length, positions_BT.shape[1])
            init = normal_initializer(self.init_std, embed_dim)
            table = self.param(
                "embedding",
                with_axes(init, ("position", "embed")),
                (self.max_length, embed_dim),
                self.param_dtype,
            )
            vectors = look_up(table, positions_BT).astype(self.dtype)
        elif self.config.kind == "sinusoidal":
            vectors = sinusoidal(positions_BT, embed_dim, theta=self.config.theta).astype(self.dtype)
        else:
            return inputs_BTD
        return inputs_BTD + jnp.broadcast_to(vectors, inputs_BTD.shape)


def check_learned_length(max_length: int, length: int) -> None:
    """Raise ValueError unless learned positions reach `length` tokens."""
    if length > max_length:
        raise ValueError(
            f"Learned positions reach max_length={max_length} tokens, got {length}; raise max_length, shorten the "
            "sequence, or choose another kind of positions."
        )


class RelativeBias(nn.Module):
    """The learned bias of T5, one for all layers of a stack; its gradient is that of all of them.

    Attributes:
        config: number of buckets, and the distance that the last one begins at.
        num_heads: of every attention layer.
        init_std: standard deviation of the table; 0 means 1 / sqrt(num_heads).
    """

    config: PositionConfig
    num_heads: int
    init_std: float = 0.0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, *, bidirectional: bool) -> T5Bias:
        """The description that attention takes as `bias`; an encoder's tells the two directions apart."""
        init = normal_initializer(self.init_std, self.num_heads)
        shape = (self.config.num_buckets, self.num_heads)
        table = self.param("embedding", with_axes(init, (None, "heads")), shape, self.param_dtype)
        return T5Bias(table, bidirectional=bidirectional, max_distance=self.config.max_distance)
