"""The relative positions of Transformer-XL, as queries and keys of more elements."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.layers.linear import normal_initializer, with_axes
from transformer.ops.positions import sinusoidal, turn_to_query


class RelativePosition(nn.Module):
    """Queries and keys whose products are `(q_i + u) · k_j + (q_i + v) · W R_{i-j}` (Dai et al. 2019, appendix B).

    `R` are sinusoids, so that the second product is one of `Wᵀ (q_i + v)`, turned by `i`, and `R_j`: no backend has to know
    of it, nothing is gathered or shifted, and memory is what theirs is. Attention's scale stays that of the first K elements.

    Attributes:
        embed_dim: D, elements of a sinusoid, even.
        theta: base of the wavelengths.
        init_std: standard deviation of initial parameters; 0 means 1 / sqrt(fan_in).
    """

    embed_dim: int
    theta: float = 10_000.0
    init_std: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        query_BTHK: Float[Array, "B T H K"],
        key_BSGK: Float[Array, "B S G K"],
        query_places_BT: Int[Array, "#B T"],
        key_places_BS: Int[Array, "#B S"],
    ) -> tuple[Float[Array, "B T H W"], Float[Array, "B S G W"]]:
        """Both with D elements more, W in all; keys of a group share their heads' `W`."""
        B, T, H, K = query_BTHK.shape
        _, S, G, _ = key_BSGK.shape
        D = self.embed_dim

        def parameter(name: str, fan_in: int, shape: tuple[int, ...], *axes: str) -> Array:
            init = with_axes(normal_initializer(self.init_std, fan_in), axes)
            return self.param(name, init, shape, self.param_dtype).astype(self.dtype)

        content_bias_HK = parameter("content_bias", K, (H, K), "heads", "head_dim")
        position_bias_HK = parameter("position_bias", K, (H, K), "heads", "head_dim")
        kernel_DGK = parameter("kernel", D, (D, G, K), "embed", "kv_heads", "head_dim")

        asking_BTGRK = (query_BTHK + position_bias_HK[None, None]).reshape(B, T, G, H // G, K)
        weights_BTGRD = jnp.einsum("BTGRK,DGK->BTGRD", asking_BTGRK, kernel_DGK, preferred_element_type=jnp.float32)
        turned_BTHD = turn_to_query(weights_BTGRD.reshape(B, T, H, D), query_places_BT, theta=self.theta)
        query = jnp.concatenate([query_BTHK + content_bias_HK[None, None], turned_BTHD.astype(self.dtype)], axis=-1)
        wave_BSD = sinusoidal(key_places_BS, D, theta=self.theta).astype(self.dtype)
        wave_BSGD = jnp.broadcast_to(wave_BSD[:, :, None], (B, S, G, D))
        return query, jnp.concatenate([key_BSGK.astype(self.dtype), wave_BSGD], axis=-1)
