"""Positions without parameters: rotary embeddings of queries and keys, sinusoidal vectors and products with them."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

# Llama 3.1 keeps wavelengths that fit HIGH times into the original context, and divides the frequency of those that
# fit less than LOW times (https://github.com/meta-llama/llama-models, models/llama3/model.py, apply_scaling).
_LLAMA3_LOW = 1.0
_LLAMA3_HIGH = 4.0


def rotary_frequencies(
    head_dim: int,
    *,
    theta: float = 10_000.0,
    scaling: Literal["none", "linear", "llama3"] = "none",
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
    scaling: Literal["none", "linear", "llama3"] = "none",
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


def sinusoidal(
    positions_BT: Int[jax.Array, "B T"], dim: int, *, theta: float = 10_000.0
) -> Float[jax.Array, "B T {dim}"]:
    """Position vectors of sines (even elements) and cosines (odd ones), float32 (Vaswani et al. 2017, section 3.5).

    >>> sinusoidal(jnp.zeros((1, 1), jnp.int32), 4).tolist()
    [[[0.0, 1.0, 0.0, 1.0]]]
    """
    frequencies = (theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)
    angles = positions_BT.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*positions_BT.shape, -1)[:, :, :dim]


def turn_to_query(
    x_BTHD: Float[jax.Array, "B T H D"], positions_BT: Int[jax.Array, "#B T"], *, theta: float = 10_000.0
) -> Float[jax.Array, "B T H D"]:
    """The `y` with `y · sinusoidal(j) = x · sinusoidal(i - j)` for every `j`, where `i` is the vector's own position.

    By the addition theorems: each pair of `x`, for a sine and a cosine, is reflected by its angle at `i`. Products with
    sinusoids of distances, as in Transformer-XL, so become products of queries and keys. D is even; float32.
    """
    wave_BT1D = sinusoidal(positions_BT, x_BTHD.shape[-1], theta=theta)[:, :, None]
    sine, cosine = wave_BT1D[..., 0::2], wave_BT1D[..., 1::2]
    of_sine, of_cosine = x_BTHD[..., 0::2].astype(jnp.float32), x_BTHD[..., 1::2].astype(jnp.float32)
    pairs = jnp.stack([of_cosine * sine - of_sine * cosine, of_sine * sine + of_cosine * cosine], axis=-1)
    return pairs.reshape(x_BTHD.shape)
