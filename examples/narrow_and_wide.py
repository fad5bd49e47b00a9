"""Narrow, standard and wide multi-head attention on the same input, with their costs; prints a table.

    python examples/narrow_and_wide.py

The essay "Transformers from scratch" (Bloem 2019) has two kinds, for width k and h heads:

    narrow     head i reads the i-th of h chunks of the input, k/h wide, by matrices of k/h x k/h
    wide       each head reads the whole input by k x k matrices; the h outputs are projected from h·k back to k

Vaswani et al. (2017) use a third kind: each head reads the whole input by matrices of k x k/h. `Attention` is this kind, and with
`head_dim=k` the wide kind. Only the narrow kind needs a new module. There are no biases.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer import Attention, AttentionConfig, dot_product_attention
from transformer.layers.linear import Linear


class NarrowAttention(nn.Module):
    """Multi-head attention in which each head reads only its own chunk of the input.

    Attributes:
        num_heads: number of heads, and of chunks of the width.
    """

    num_heads: int

    @nn.compact
    def __call__(self, inputs_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Attend within each chunk; only `out` mixes chunks."""
        B, T, D = inputs_BTD.shape
        H, K = self.num_heads, D // self.num_heads
        chunks_BTHK = inputs_BTD.reshape(B, T, H, K)

        def project(role: str) -> Array:
            kernel_HKJ = self.param(role, nn.initializers.normal(K**-0.5), (H, K, K))
            return jnp.einsum("BTHK,HKJ->BTHJ", chunks_BTHK, kernel_HKJ)

        out_BTHK = dot_product_attention(project("query"), project("key"), project("value"))
        return Linear(features=(D,), axes=("heads", "head_dim", "embed"), name="out")(out_BTHK)


def variants(k: int, h: int) -> dict[str, tuple[nn.Module, str, int]]:
    """Each kind's module, and the formula of its parameters with its value."""
    return {
        "narrow": (NarrowAttention(h), "3k²/h + k²", 3 * k**2 // h + k**2),
        "standard": (Attention(AttentionConfig(num_heads=h)), "3k² + k²", 4 * k**2),
        "wide": (Attention(AttentionConfig(num_heads=h, head_dim=k)), "3hk² + hk²", 4 * h * k**2),
    }


def main() -> None:
    """Compare the three kinds on one input."""
    k, h = 256, 8
    x_BTD = jax.random.normal(jax.random.key(0), (1, 16, k))
    print(f"width k = {k}, heads h = {h}, input {x_BTD.shape}")
    print(f"{'kind':<10}{'output':<15}{'parameters':>12}  formula")
    for name, (layer, formula, expected) in variants(k, h).items():
        y_BTD, variables = layer.init_with_output(jax.random.key(1), x_BTD)
        count = sum(leaf.size for leaf in jax.tree.leaves(variables))
        assert count == expected
        print(f"{name:<10}{y_BTD.shape!s:<15}{count:>12,}  {formula}")


if __name__ == "__main__":
    main()
