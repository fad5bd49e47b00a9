"""Rotary positions: queries and keys are rotated by their positions; products then depend on distances."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from transformer.model_kinds import POSITIONS
from transformer.ops.positions.scalings import BY_LENGTH, OF_SCALINGS, attention_factor, frequencies
from transformer.ops.positions.waves import WavePositions
from transformer.types import Array
from transformer.validation import require, require_at_least

if TYPE_CHECKING:
    from transformer.model_config import BlockConfig

Scaling = Literal["none", "linear", "llama3", "yarn", "longrope", "dynamic"]


@POSITIONS.register
@dataclasses.dataclass(frozen=True)
class RotaryPositions(WavePositions):
    """Rotary embeddings of queries and keys (Su et al. 2021).

    The scalings longrope and dynamic depend on the largest position of a call: over all its rows, and over its new tokens only.
    Keys already in a cache keep the rotation of the frequencies at the time when they were written.
    """

    kind = "rotary"
    between_tokens = True

    fraction: float = 1.0
    """Share of each head's elements that is rotated, the first ones (Black et al. 2022: a quarter)."""
    scaling: Scaling = "none"
    """Scaling for longer contexts: linear (Chen et al. 2023), or by wavelength, as Llama 3.1 and YaRN (Peng et al. 2023) do it.
    The scalings longrope (factors of Phi-3) and dynamic (a growing base) depend on the length of the input."""
    scaling_factor: float = 1.0
    """Factor by which the context is extended."""
    original_length: int = 8192
    """All scalings except linear: the context length before the extension."""
    low_factor: float = 1.0
    """llama3: frequencies with fewer periods than this within the original length are divided."""
    high_factor: float = 4.0
    """llama3: frequencies with more periods than this within the original length are kept."""
    beta_fast: float = 32.0
    """yarn: planes with more rotations than this within the original length are kept."""
    beta_slow: float = 1.0
    """yarn: planes with fewer rotations than this within the original length are divided."""
    truncate: bool = True
    """yarn: round the two boundaries of the blended planes outwards."""
    attention_factor: float = 0.0
    """yarn, longrope: factor on rotated queries and keys. 0 means 0.1 ln(s) + 1 (yarn) or sqrt(1 + ln(s) / ln(original_length)),
    with s the scaling_factor."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisors of the frequencies up to the original length."""
    long_factors: tuple[float, ...] = ()
    """longrope: divisors of the frequencies beyond it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.fraction <= 1, f"RotaryPositions.fraction must be above 0 and at most 1, got {self.fraction}.")
        require_at_least(self, 1, "scaling_factor", "original_length")
        require_at_least(self, 0, "attention_factor")
        for low, high in (("low_factor", "high_factor"), ("beta_slow", "beta_fast")):
            least, most = getattr(self, low), getattr(self, high)
            require(
                0 < least < most, f"RotaryPositions.{low} must be above 0 and below {high}={most:g}, got {least:g}."
            )
        require(
            all(factor > 0 for factor in (*self.short_factors, *self.long_factors)),
            "RotaryPositions.short_factors and long_factors must be positive, "
            f"got {self.short_factors} and {self.long_factors}.",
        )
        require(
            self.scaling != "longrope" or self.original_length > 1,
            f"RotaryPositions.original_length must be above 1 for longrope, got {self.original_length}.",
        )
        require(
            self.scaling != "yarn" or self.theta > 1,
            f"RotaryPositions.theta must be above 1 for yarn, got {self.theta}.",
        )

    def unused(self) -> Mapping[str, str]:
        """Settings of the other scalings."""
        return {
            name: f"the scaling{'s' * (len(kinds) > 1)} {', '.join(kinds)}"
            for name, kinds in OF_SCALINGS.items()
            if self.scaling not in kinds
        }

    def check_block(self, block: "BlockConfig", embed_dim: int) -> None:
        """A head's elements are rotated in pairs."""
        head_dim = block.attention.resolved_head_dim(embed_dim)
        require(
            self._turned(head_dim) % 2 == 0,
            f"Rotary positions need an even head_dim, got {head_dim}"
            + (f" and fraction={self.fraction}" if self.fraction < 1 else "")
            + "; change ModelConfig.embed_dim, AttentionConfig.num_heads or AttentionConfig.head_dim.",
        )
        self._check_scaling(self._turned(head_dim))

    def _check_scaling(self, turned: int) -> None:
        half, given = turned // 2, (len(self.short_factors), len(self.long_factors))
        require(
            self.scaling != "longrope" or given == (half, half),
            f"RotaryPositions.short_factors and long_factors must be {half} numbers each, one for each pair of turned elements, "
            f"got {given[0]} and {given[1]}.",
        )
        require(
            self.scaling != "dynamic" or turned > 2,
            f"RotaryPositions.scaling=dynamic needs more than 2 turned elements of a head, got {turned}.",
        )

    def rotate(
        self, query_BTHK: Array, key_BSGK: Array, positions: Callable[[], tuple[Array, Array]]
    ) -> tuple[Array, Array]:
        """Queries and keys, rotated by their positions."""
        query_positions, key_positions = positions()
        # Key positions equal query positions, possibly preceded by positions of the Transformer-XL memory.
        length = jnp.max(key_positions) + 1 if self.scaling in BY_LENGTH else None
        planes = frequencies(self, self._turned(query_BTHK.shape[-1]), length)
        return self._turn(query_BTHK, query_positions, planes), self._turn(key_BSGK, key_positions, planes)

    def _turned(self, head_dim: int) -> int:
        return int(self.fraction * head_dim)

    def _turn(self, x_BTHK: Array, positions_BT: Array, planes: Any) -> Array:
        turned, factor = self._turned(x_BTHK.shape[-1]), attention_factor(self)
        first = rotary(x_BTHK[..., :turned] if self.fraction < 1 else x_BTHK, positions_BT, planes, factor=factor)
        return jnp.concatenate([first, x_BTHK[..., turned:]], axis=-1) if self.fraction < 1 else first


def rotary(
    x_BTHK: Float[jax.Array, "B T H K"],
    positions_BT: Int[jax.Array, "#B T"],
    frequencies: Float[np.ndarray | jax.Array, " half"],
    *,
    factor: float = 1.0,
) -> Float[jax.Array, "B T H K"]:
    """Rotate queries or keys by their position (RoPE, Su et al. 2021); products then depend on distances only.

    Plane `i` holds the elements `i` and `i + K/2` of a head: the layout of GPT-NeoX and of Llama's published safetensors.
    Computed in float32 and returned in the dtype of `x_BTHK`.

    Args:
        x_BTHK: queries or keys, with K even.
        positions_BT: position of each.
        frequencies: radians per position of each plane (`scalings.frequencies`).
        factor: multiplies the result.

    >>> rotary(jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1), jnp.int32), np.ones(1, np.float32)).tolist()
    [[[[1.0, 1.0]]]]
    """
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    if factor != 1:
        sine, cosine = sine * factor, cosine * factor
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTHK.dtype)
