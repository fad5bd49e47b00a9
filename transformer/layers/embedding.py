"""Token embeddings, also used as output projection."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.linear import kernel_product, stored
from transformer.layers.runtime import Runtime
from transformer.ops.ids import check_ids, look_up
from transformer.ops.panels import Panels, cut_panels, panel_columns
from transformer.ops.quantized import Quantized, quantized_rows


class Embed(nn.Module):
    """A table of vectors: looked up for tokens, and multiplied with hidden states for tied logits (Press and Wolf 2017).

    Attributes:
        num_embeddings: rows of the table.
        embed_dim: their width.
        scale: multiply looked-up vectors by sqrt(embed_dim) (Vaswani et al. 2017, section 3.4).
        axis: logical name of the rows.
        runtime: types, initialisation and `dot_general`.
    """

    num_embeddings: int
    embed_dim: int
    scale: bool = False
    axis: str | None = "vocab"
    runtime: Runtime = Runtime()

    def setup(self) -> None:
        """Make the table."""
        init = self.runtime.initializer(self.embed_dim, (self.axis, "embed"))
        self.embedding = stored(self, "embedding", init, (self.num_embeddings, self.embed_dim))

    def __call__(self, indices: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The rows at `indices`. An index outside the table gives NaN, or UserError if its value is known (`ops.ids`)."""
        check_ids(indices, self.num_embeddings)
        find: Any = {Panels: panel_columns, Quantized: quantized_rows}.get(type(self.embedding), look_up)
        # Rows are cast after the look-up: fewer elements to cast, and the gradient adds up in the parameter's dtype.
        rows = find(self.embedding, indices).astype(self.runtime.dtype)
        return rows * math.sqrt(self.embed_dim) if self.scale else rows

    def attend(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The product of each vector with every row, accumulated and returned in float32."""
        kernel = self.embedding if isinstance(self.embedding, Panels) else self.embedding.T
        return kernel_product(self, hidden.astype(self.runtime.dtype), kernel, 1, jnp.float32)

    @nn.nowrap
    def cut(self, table: Float[Array, "V D"], width: int) -> Panels:
        """The table in panels of so many rows, from which they are looked up and multiplied."""
        return Panels(cut_panels(table.astype(self.runtime.dtype).T, width), (self.num_embeddings,))
