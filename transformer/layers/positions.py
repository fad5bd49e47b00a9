"""The parameters of positions: those added to embeddings, those shared by all layers, and those of an attention layer."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from transformer.layers.runtime import Runtime
from transformer.model_kinds import Positions


class PositionEmbedding(nn.Module):
    """Adds vectors of positions to the embeddings, where the kind has any.

    Attributes:
        config: which kind.
        max_length: rows of a learned table.
        runtime: types and initialisation.
    """

    config: Positions
    max_length: int
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(self, inputs_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "#B T"]) -> Float[Array, "B T D"]:
        """The embeddings with their positions' vectors added; NaN at a position beyond a learned table."""
        parameter = functools.partial(self.runtime.parameter, self)
        return self.config.embed(inputs_BTD, positions_BT, self.max_length, parameter)


class RelativeBias(nn.Module):
    """The bias of attention logits that all layers of a stack share (T5), where the kind has one.

    Attributes:
        config: which kind.
        num_heads: of every attention layer.
        runtime: types and initialisation.
    """

    config: Positions
    num_heads: int
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(self, *, bidirectional: bool) -> Any:
        """The description that attention takes as `relative_bias`; an encoder's tells the two directions apart."""
        return self.config.shared_bias(self.num_heads, bidirectional, functools.partial(self.runtime.parameter, self))


class RelativePosition(nn.Module):
    """What positions add to the queries and keys of a layer as they are multiplied (Transformer-XL).

    Attributes:
        config: which kind.
        embed_dim: D, width of the residual stream.
        runtime: types and initialisation.
    """

    config: Positions
    embed_dim: int
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(
        self,
        query_BTHK: Float[Array, "B T H K"],
        key_BSGK: Float[Array, "B S G K"],
        positions: Callable[[], tuple[Int[Array, "#B T"], Int[Array, "#B S"]]],
    ) -> tuple[Float[Array, "B T H W"], Float[Array, "B S G W"]]:
        """Both, with as many elements more as the kind needs; `positions()` gives those of queries and keys."""
        parameter = functools.partial(self.runtime.parameter, self)
        return self.config.extend(query_BTHK, key_BSGK, positions, self.embed_dim, parameter)
