"""Rotary positions: queries and keys are turned by their positions, so that products depend on distances."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from transformer.model_kinds import POSITIONS
from transformer.ops.positions.waves import WavePositions
from transformer.types import Array
from transformer.validation import require, require_at_least

if TYPE_CHECKING:
    from transformer.model_config import BlockConfig

Scaling = Literal["none", "linear", "llama3"]

# Llama 3.1 keeps wavelengths that fit HIGH times into the original context, and divides the frequency of those that
# fit less than LOW times (https://github.com/meta-llama/llama-models, models/llama3/model.py, apply_scaling).
_LLAMA3_LOW = 1.0
_LLAMA3_HIGH = 4.0


@POSITIONS.register
@dataclasses.dataclass(frozen=True)
class RotaryPositions(WavePositions):
    """Rotary embeddings of queries and keys (Su et al. 2021)."""

    kind = "rotary"
    between_tokens = True

    fraction: float = 1.0
    """Share of each head's elements that is turned, its first ones (Black et al. 2022: a quarter)."""
    scaling: Scaling = "none"
    """Scaling for longer contexts: linear (Chen et al. 2023) or by wavelength, as Llama 3.1 does."""
    scaling_factor: float = 1.0
    """By how much the context is extended."""
    original_length: int = 8192
    """llama3 scaling: the context length before the extension."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.fraction <= 1, f"RotaryPositions.fraction must be above 0 and at most 1, got {self.fraction}.")
        require_at_least(self, 1, "scaling_factor", "original_length")

    def unused(self) -> Mapping[str, str]:
        """What is of other scalings."""
        found = {} if self.scaling == "llama3" else {"original_length": "the scaling llama3"}
        return found if self.scaling != "none" else found | {"scaling_factor": "positions that are scaled (scaling)"}

    def check_block(self, block: "BlockConfig", embed_dim: int) -> None:
        """Elements of a head are turned in pairs."""
        head_dim = block.attention.resolved_head_dim(embed_dim)
        require(
            self._turned(head_dim) % 2 == 0,
            f"Rotary positions need an even head_dim, got {head_dim}"
            + (f" and fraction={self.fraction}" if self.fraction < 1 else "")
            + "; change ModelConfig.embed_dim, AttentionConfig.num_heads or AttentionConfig.head_dim.",
        )

    def rotate(
        self, query_BTHK: Array, key_BSGK: Array, positions: Callable[[], tuple[Array, Array]]
    ) -> tuple[Array, Array]:
        """Both turned by their positions."""
        query_positions, key_positions = positions()
        return self._turn(query_BTHK, query_positions), self._turn(key_BSGK, key_positions)

    def _turned(self, head_dim: int) -> int:
        return int(self.fraction * head_dim)

    def _turn(self, x_BTHK: Array, positions_BT: Array) -> Array:
        turned = self._turned(x_BTHK.shape[-1])
        first = rotary(
            x_BTHK[..., :turned] if self.fraction < 1 else x_BTHK,
            positions_BT,
            theta=self.theta,
            scaling=self.scaling,
            scaling_factor=self.scaling_factor,
            original_length=self.original_length,
        )
        return jnp.concatenate([first, x_BTHK[..., turned:]], axis=-1) if self.fraction < 1 else first


def rotary_frequencies(
    head_dim: int,
    *,
    theta: float = 10_000.0,
    scaling: Scaling = "none",
    scaling_factor: float = 1.0,
    original_length: int = 8192,
) -> Float[np.ndarray, " half"]:
    """Radians per position of each of the head_dim / 2 rotated planes, fastest first.

    Args:
      head_dim: Width of a head, even.
      theta: Base of the wavelengths (Su et al. 2021, section 3.2.2: 10,000).
      scaling: none; linear divides every frequency (Chen et al. 2023); llama3 divides those whose wavelength exceeds
        the original context, keeps those below a quarter of it, and blends between.
      scaling_factor: By how much the context is extended.
      original_length: llama3 only: the context length before the extension.
    """
    if head_dim % 2 != 0:
        raise ValueError(f"Rotary positions rotate pairs: head_dim must be even, got {head_dim}.")
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling == "linear":
        frequencies = frequencies / scaling_factor
    elif scaling == "llama3":
        turns = original_length * frequencies / (2 * math.pi)
        keep = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling_factor
    elif scaling != "none":
        raise ValueError(f"Rotary scaling must be none, linear or llama3, got {scaling!r}.")
    return frequencies.astype(np.float32)


def rotary(
    x_BTHK: Float[jax.Array, "B T H K"],
    positions_BT: Int[jax.Array, "#B T"],
    *,
    theta: float = 10_000.0,
    scaling: Scaling = "none",
    scaling_factor: float = 1.0,
    original_length: int = 8192,
) -> Float[jax.Array, "B T H K"]:
    """Rotate queries or keys by their position (RoPE, Su et al. 2021); products then depend on distances only.

    Plane `i` holds the elements `i` and `i + K/2` of a head: the layout of GPT-NeoX and of Llama's published
    safetensors. Computed in float32 and returned in the dtype of `x_BTHK`; `rotary_frequencies` explains the options.

    >>> rotary(jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1), jnp.int32)).tolist()
    [[[[1.0, 1.0]]]]
    """
    frequencies = rotary_frequencies(
        x_BTHK.shape[-1],
        theta=theta,
        scaling=scaling,
        scaling_factor=scaling_factor,
        original_length=original_length,
    )
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTHK.dtype)
