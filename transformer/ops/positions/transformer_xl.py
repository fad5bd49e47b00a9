"""The relative positions of Transformer-XL, as extra elements of queries and keys."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from transformer.model_kinds import POSITIONS, Parameter
from transformer.ops.positions.sinusoidal import sinusoidal
from transformer.ops.positions.waves import WavePositions
from transformer.types import Array
from transformer.validation import require

if TYPE_CHECKING:
    from transformer.model_config import BlockConfig


@POSITIONS.register
@dataclasses.dataclass(frozen=True)
class TransformerXLPositions(WavePositions):
    """Sinusoids of distances in the keys, and biases on the queries (Dai et al. 2019, section 3.3).

    Logits are `(q_i + u) · k_j + (q_i + v) · W R_{i-j}` (appendix B), where the `R` are sinusoids. The second product therefore
    equals one of `Wᵀ (q_i + v)`, reflected by the angle of `i`, with `R_j`. No backend needs support for it, nothing is moved or
    gathered, and memory use stays the backend's.
    """

    kind = "transformer_xl"
    between_tokens = True

    def check_block(self, block: "BlockConfig", embed_dim: int) -> None:
        """Sinusoids have equally many sines and cosines: D must be even."""
        require(
            embed_dim % 2 == 0,
            f"Positions of kind transformer_xl pair sines and cosines: embed_dim must be even, got {embed_dim}.",
        )

    def extend(
        self,
        query_BTHK: Array,
        key_BSGK: Array,
        positions: Callable[[], tuple[Array, Array]],
        embed_dim: int,
        parameter: Parameter,
    ) -> tuple[Array, Array]:
        """Queries and keys with D extra elements each; keys of a group use their heads' `W`."""
        query_positions, key_positions = positions()
        B, T, H, K = query_BTHK.shape
        _, S, G, _ = key_BSGK.shape
        D, dtype = embed_dim, query_BTHK.dtype

        content_bias_HK = parameter("content_bias", (H, K), ("heads", "head_dim"), fan_in=K).astype(dtype)
        position_bias_HK = parameter("position_bias", (H, K), ("heads", "head_dim"), fan_in=K).astype(dtype)
        kernel_DGK = parameter("kernel", (D, G, K), ("embed", "kv_heads", "head_dim"), fan_in=D).astype(dtype)

        biased_BTGRK = (query_BTHK + position_bias_HK[None, None]).reshape(B, T, G, H // G, K)
        weights_BTGRD = jnp.einsum("BTGRK,DGK->BTGRD", biased_BTGRK, kernel_DGK, preferred_element_type=jnp.float32)
        turned_BTHD = turn_to_query(weights_BTGRD.reshape(B, T, H, D), query_positions, theta=self.theta)
        query = jnp.concatenate([query_BTHK + content_bias_HK[None, None], turned_BTHD.astype(dtype)], axis=-1)
        wave_BSD = sinusoidal(key_positions, D, theta=self.theta).astype(dtype)
        wave_BSGD = jnp.broadcast_to(wave_BSD[:, :, None], (B, S, G, D))
        return query, jnp.concatenate([key_BSGK, wave_BSGD], axis=-1)


def turn_to_query(
    x_BTHD: Float[jax.Array, "B T H D"], positions_BT: Int[jax.Array, "#B T"], *, theta: float = 10_000.0
) -> Float[jax.Array, "B T H D"]:
    """The `y` with `y · sinusoidal(j) = x · sinusoidal(i - j)` for every `j`, where `i` is the vector's own position.

    By the addition theorems, each pair of `x`, for a sine and a cosine, is reflected by its angle at `i`. Products with
    sinusoids of distances, as in Transformer-XL, thus become products of queries and keys. D is even; float32.
    """
    wave_BT1D = sinusoidal(positions_BT, x_BTHD.shape[-1], theta=theta)[:, :, None]
    sine, cosine = wave_BT1D[..., 0::2], wave_BT1D[..., 1::2]
    of_sine, of_cosine = x_BTHD[..., 0::2].astype(jnp.float32), x_BTHD[..., 1::2].astype(jnp.float32)
    pairs = jnp.stack([of_cosine * sine - of_sine * cosine, of_sine * sine + of_cosine * cosine], axis=-1)
    return pairs.reshape(x_BTHD.shape)
