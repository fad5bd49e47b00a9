"""Frequencies of rotary positions for contexts longer than in training."""

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from transformer.types import Array

if TYPE_CHECKING:
    from transformer.ops.positions.rotary import RotaryPositions

OF_SCALINGS: dict[str, tuple[str, ...]] = {
    "scaling_factor": ("linear", "llama3", "yarn", "longrope", "dynamic"),
    "original_length": ("llama3", "yarn", "longrope", "dynamic"),
    "low_factor": ("llama3",),
    "high_factor": ("llama3",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "truncate": ("yarn",),
    "attention_factor": ("yarn", "longrope"),
    "short_factors": ("longrope",),
    "long_factors": ("longrope",),
}
"""The scalings that use each setting of rotary positions."""
BY_LENGTH = ("longrope", "dynamic")
"""Scalings whose frequencies depend on the length of the input."""


def plain_frequencies(dim: int, theta: float) -> Float[np.ndarray, " half"]:
    """Radians per position of each of the dim / 2 rotated planes, fastest first, float64 (Su et al. 2021, section 3.2.2)."""
    if dim % 2 != 0:
        raise ValueError(f"Rotary positions rotate pairs: head_dim must be even, got {dim}.")
    return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def frequencies(settings: "RotaryPositions", dim: int, length: Array = None) -> np.ndarray | Array:
    """The frequencies of `plain_frequencies` after a scaling, float32 [dim / 2].

    * linear: all are divided by the factor (Chen et al. 2023).
    * llama3: frequencies with a wavelength above original_length / low_factor are divided, with one below original_length /
      high_factor kept, others blended (https://github.com/meta-llama/llama-models, models/llama3/model.py).
    * yarn: as llama3, but blended by plane number, between the planes with beta_fast and beta_slow rotations in the original
      length (Peng et al. 2023, section 3.2).
    * longrope: each is divided by its own factor, from short_factors up to the original length and long_factors beyond it
      (Ding et al. 2024).
    * dynamic: beyond the original length, the base of the wavelengths grows with the length ("NTK-aware").

    Args:
        settings: the scaling and its settings.
        dim: rotated elements of a head, an even number.
        length: the largest position plus 1, for longrope and dynamic.
    """
    plain, factor, original = plain_frequencies(dim, settings.theta), settings.scaling_factor, settings.original_length
    match settings.scaling:
        case "linear":
            scaled = plain / factor
        case "llama3":
            turns = original * plain / (2 * math.pi)
            keep = np.clip((turns - settings.low_factor) / (settings.high_factor - settings.low_factor), 0.0, 1.0)
            scaled = keep * plain + (1 - keep) * plain / factor
        case "yarn":
            first, last = (_plane(settings, dim, turns) for turns in (settings.beta_fast, settings.beta_slow))
            if settings.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dim - 1)
            width = last - first or 0.001  # as in the published code
            divide = np.clip((np.arange(dim // 2) - first) / width, 0.0, 1.0)
            scaled = plain * (1 - divide) + plain / factor * divide
        case "longrope":
            short, long = (np.float32(plain / np.array(x)) for x in (settings.short_factors, settings.long_factors))
            return jnp.where(length > original, long, short)
        case "dynamic":
            growth = factor * jnp.maximum(length, original).astype(jnp.float32) / original - (factor - 1)
            power = np.float32(np.arange(0, dim, 2) / (dim - 2))
            return np.float32(plain) * jnp.exp(-power * jnp.log(growth))
        case _:
            scaled = plain
    return scaled.astype(np.float32)


def attention_factor(settings: "RotaryPositions") -> float:
    """The factor on rotated queries and keys: 1 except for yarn and longrope."""
    factor = settings.scaling_factor
    if settings.scaling not in OF_SCALINGS["attention_factor"]:
        return 1.0
    if settings.attention_factor > 0:
        return settings.attention_factor
    if settings.scaling == "yarn":
        return 0.1 * math.log(factor) + 1
    return math.sqrt(1 + math.log(factor) / math.log(settings.original_length))


def _plane(settings: "RotaryPositions", dim: int, turns: float) -> float:
    """The (fractional) number of the plane with this many rotations within the original length."""
    return dim * math.log(settings.original_length / (turns * 2 * math.pi)) / (2 * math.log(settings.theta))
