"""The relative positions of T5: a learned bias for each bucket of distances, shared by all layers."""

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from transformer.model_kinds import POSITIONS, Parameter, Positions
from transformer.ops.bias import BiasDescription
from transformer.types import Leaf, UserError
from transformer.validation import require

if TYPE_CHECKING:
    from transformer.model_config import ModelConfig


@POSITIONS.register
@dataclasses.dataclass(frozen=True)
class T5Positions(Positions):
    """A learned bias for each bucket of distances and each head (Raffel et al. 2020, section 2.1)."""

    kind = "t5"
    between_tokens = True

    num_buckets: int = 32
    """Buckets of distances (in an encoder, half of them for each direction)."""
    max_distance: int = 128
    """Distances from this one on share the last bucket."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_buckets >= 4 and self.num_buckets % 4 == 0 and self.max_distance > self.num_buckets // 2,
            "T5Positions.num_buckets must be a multiple of 4, and max_distance above half of it, "
            f"got {self.num_buckets} and {self.max_distance}.",
        )

    def check(self, config: "ModelConfig") -> None:
        """All layers must have the number of heads of the shared table."""
        super().check(config)
        require(
            len({block.attention.num_heads for block in config.block_counts}) == 1,
            "Positions of kind t5 share one bias for each head: the blocks of ModelConfig.pattern must have as many heads.",
        )

    def check_own(self, block: object, embed_dim: int) -> None:
        """A block cannot have its own: the table belongs to the model."""
        raise UserError("Positions of kind t5 share a table among the layers of a model, a block cannot have its own.")

    def num_parameters(self, config: "ModelConfig") -> int:
        """The table."""
        return self.num_buckets * (*config.first, *config.pattern)[0].attention.num_heads

    def shared_bias(self, num_heads: int, bidirectional: bool, parameter: Parameter) -> "T5Bias":
        """Its gradient adds over all layers; an encoder distinguishes the two directions."""
        table = parameter("embedding", (self.num_buckets, num_heads), (None, "heads"), fan_in=num_heads)
        return T5Bias(table, bidirectional=bidirectional, max_distance=self.max_distance)

    def bias(self, num_heads: int, shared: BiasDescription | None) -> BiasDescription:
        """The shared bias."""
        return shared if shared is not None else self.refuse_shared(shared)


def t5_buckets(
    distances: Int[jax.Array, "*B"], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[jax.Array, "*B"]:
    """The bucket of each distance, key minus query: exact for short distances, then wider and wider (Raffel et al. 2020,
    section 2.1).

    Half of a direction's buckets hold one distance each, the other half grow geometrically up to `max_distance`. In one
    direction, keys later than the query share bucket 0.

    >>> t5_buckets(jnp.array([0, -1, -3, -200, 1]), bidirectional=True, num_buckets=32, max_distance=128).tolist()
    [0, 1, 3, 15, 17]
    """
    offset = jnp.zeros_like(distances)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distances > 0, num_buckets, 0)
        away = jnp.abs(distances)
    else:
        away = jnp.maximum(-distances, 0)
    exact = num_buckets // 2
    # Distances below `exact` are not looked up here; the maximum keeps their logarithm finite.
    ratio = jnp.log(jnp.maximum(away, exact).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    wide = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(away < exact, away, jnp.minimum(wide, num_buckets - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class T5Bias:
    """A learned bias for each bucket of distances and each head (Raffel et al. 2020, section 2.1)."""

    table: Leaf  # float [num_buckets, H]
    bidirectional: bool = dataclasses.field(metadata={"static": True})
    max_distance: int = dataclasses.field(metadata={"static": True})

    def block(
        self, query_positions: Int[jax.Array, "#B t"], key_positions: Int[jax.Array, "#B s"]
    ) -> Float[jax.Array, "B H t s"]:
        """The float32 bias [B|1, H, t, s]; B is 1 if both positions have one row."""
        buckets_Bts = t5_buckets(
            key_positions[:, None, :] - query_positions[:, :, None],
            bidirectional=self.bidirectional,
            num_buckets=self.table.shape[0],
            max_distance=self.max_distance,
        )
        return jnp.moveaxis(self.table.astype(jnp.float32)[buckets_Bts], -1, 1)
