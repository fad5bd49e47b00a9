"""Sinusoidal positions: fixed vectors of sines and cosines, added to the embeddings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from transformer.model_kinds import POSITIONS, Parameter
from transformer.ops.positions.waves import WavePositions
from transformer.types import Array


@POSITIONS.register
@dataclasses.dataclass(frozen=True)
class SinusoidalPositions(WavePositions):
    """Vectors of sines and cosines, added to the embeddings (Vaswani et al. 2017)."""

    kind = "sinusoidal"
    absolute = True

    def embed(self, x_BTD: Array, positions_BT: Array, max_length: int, parameter: Parameter) -> Array:
        """Defined for every position."""
        vectors = sinusoidal(positions_BT, x_BTD.shape[-1], theta=self.theta).astype(x_BTD.dtype)
        return x_BTD + jnp.broadcast_to(vectors, x_BTD.shape)


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
