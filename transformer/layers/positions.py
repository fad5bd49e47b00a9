"""Parameters of positions: vectors added to embeddings, biases shared by all layers, and extra elements in attention."""

import functools
from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float, Int

from transformer.layers.runtime import Runtime
from transformer.model_kinds import Positions
from transformer.ops.bias import BiasDescription


class PositionEmbedding(nn.Module):
    """Adds position vectors to the embeddings, if the kind has any.

    Attributes:
        config: the position kind.
        max_length: rows of a learned table.
        runtime: types and initialisation.
    """

    config: Positions
    max_length: int
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(self, inputs_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "#B T"]) -> Float[Array, "B T D"]:
        """The embeddings plus their position vectors; NaN for a position beyond a learned table."""
        parameter = functools.partial(self.runtime.parameter, self)
        return self.config.embed(inputs_BTD, positions_BT, self.max_length, parameter)


class RelativeBias(nn.Module):
    """The bias of attention logits that all layers of a stack share (T5), if the kind has one.

    Attributes:
        config: the position kind.
        num_heads: heads of every attention layer.
        runtime: types and initialisation.
    """

    config: Positions
    num_heads: int
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(self, *, bidirectional: bool) -> BiasDescription | None:
        """The description that attention takes as `relative_bias`; an encoder's distinguishes the two directions."""
        return self.config.shared_bias(self.num_heads, bidirectional, functools.partial(self.runtime.parameter, self))


class RelativePosition(nn.Module):
    """The extra elements that positions add to the queries and keys of a layer (Transformer-XL).

    Attributes:
        config: the position kind.
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
        """Queries and keys with the kind's extra elements; `positions()` gives the positions of both."""
        parameter = functools.partial(self.runtime.parameter, self)
        return self.config.extend(query_BTHK, key_BSGK, positions, self.embed_dim, parameter)
