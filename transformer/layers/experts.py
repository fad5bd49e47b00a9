"""A mixture of experts: feed-forward networks of which every token goes to a few."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from transformer.layers.feed_forward import network
from transformer.layers.linear import DotGeneral, Linear, normal_initializer, with_axes
from transformer.model_config import FeedForwardConfig
from transformer.ops import experts
from transformer.parallel.rules import RULES, mesh_axes, spread_axes


class ExpertKernel(nn.Module):
    """A matrix for each expert; attributes as of `Linear`, with an axis of experts before `axes`."""

    shape: tuple[int, int, int]
    axes: tuple[str, str]
    init_std: float = 0.0
    init_scale: float = 1.0
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "E D F"]:
        """The matrices, in the type of parameters."""
        init = with_axes(normal_initializer(self.init_std, self.shape[1], self.init_scale), ("expert", *self.axes))
        return self.param("kernel", init, self.shape, self.param_dtype)


class MixtureOfExperts(nn.Module):
    """`config.num_experts` networks like `FeedForward`; a router sends each token to a few, however many others go there.

    No token is dropped, so that none depends on another: packing, padding and decoding change nothing. An `apply` with
    `mutable=["routing"]` returns a `RoutingStatistics` of each layer too, under `statistics`.

    Attributes:
        config: of each expert, how many there are, and to how many a token goes.
        init_std: standard deviation of initial kernels; 0 means 1 / sqrt(fan_in).
        residual_init_scale: multiplies that of `down`.
        dtype: of activations and products; the router works in float32.
        param_dtype: of the parameters.
        dot_general: replaces `jax.lax.dot_general` in the router.

    Example:
        >>> layer = MixtureOfExperts(FeedForwardConfig(hidden_dim=16, num_experts=4))
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 8)))
        >>> sorted(variables["params"]), variables["params"]["up"]["kernel"].shape
        (['down', 'router', 'up'], (4, 8, 16))
    """

    config: FeedForwardConfig
    init_std: float = 0.0
    residual_init_scale: float = 1.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(
        self, inputs_BTD: Float[Array, "*B T D"], *, valid_BT: Bool[Array, "*B T"] | None = None
    ) -> Float[Array, "*B T D"]:
        """Map every position on its own; `valid_BT` is False for padding, which the statistics leave out."""
        config, num_experts, embed_dim = self.config, self.config.num_experts, inputs_BTD.shape[-1]
        if num_experts < 1:
            raise ValueError(f"A mixture needs experts, got num_experts={num_experts}; FeedForward is one network.")
        shared: dict[str, Any] = {"init_std": self.init_std, "param_dtype": self.param_dtype}
        router = Linear((num_experts,), ("embed", None), dot_general=self.dot_general, name="router", **shared)
        logits_BTE = router(inputs_BTD)
        experts_BTA, weights_BTA = experts.route(logits_BTE, config.experts_per_token)
        if self.is_mutable_collection("routing") and not self.is_initializing():
            fold = (-1, logits_BTE.shape[-1]), (-1, config.experts_per_token)
            valid_N = None if valid_BT is None else valid_BT.reshape(-1)
            statistics = experts.routing_statistics(logits_BTE.reshape(fold[0]), experts_BTA.reshape(fold[1]), valid_N)
            self.sow("routing", "statistics", statistics)

        def kernel(role: str, axes: tuple[str, str]) -> Array:
            sizes = {"embed": embed_dim, "hidden": config.resolved_hidden_dim(embed_dim)}
            shape = (num_experts, sizes[axes[0]], sizes[axes[1]])
            scale = self.residual_init_scale if role == "down" else 1.0
            return ExpertKernel(shape, axes, init_scale=scale, name=role, **shared)().astype(self.dtype)

        kernels = {role: kernel(role, ("embed", "hidden")) for role in ("up", "gate")[: 1 + config.gated]}
        kernels["down"] = kernel("down", ("hidden", "embed"))
        return spread_experts(config, inputs_BTD.astype(self.dtype), experts_BTA, weights_BTA, kernels)


def spread_experts(
    config: FeedForwardConfig,
    tokens_BTD: Float[Array, "*B T D"],
    experts_BTA: Int[Array, "*B T A"],
    weights_BTA: Float[Array, "*B T A"],
    kernels: dict[str, Array],
) -> Float[Array, "*B T D"]:
    """`apply_experts`, under the mesh that is set each device its rows, and over an `expert` axis its experts.

    The devices of an expert axis see each other's rows, run their own experts on those that go there, and add up what they
    found: two exchanges of the rows, whatever the router does.
    """
    spread = spread_axes()
    rows, places, of_experts = mesh_axes(("batch", "length", "expert"), spread)
    shards = math.prod(spread.get(axis, 1) for axis in RULES["batch"])
    if not spread or tokens_BTD.ndim != 3 or len(tokens_BTD) % shards != 0:
        return apply_experts(config, tokens_BTD, experts_BTA, weights_BTA, kernels)

    def run(tokens: Array, chosen: Array, weights: Array, kernels: dict[str, Array]) -> Array:
        first: Any = 0
        if of_experts is not None:
            tokens, chosen, weights = (
                jax.lax.all_gather(x, of_experts, axis=0, tiled=True) for x in (tokens, chosen, weights)
            )
            first = jax.lax.axis_index(of_experts) * len(kernels["up"])
        out = apply_experts(config, tokens, chosen - first, weights, kernels)
        if "tensor" in spread:
            out = jax.lax.psum(out, "tensor")
        return out if of_experts is None else jax.lax.psum_scatter(out, of_experts, scatter_dimension=0, tiled=True)

    whole = PartitionSpec(rows, places)
    axes = {role: ("embed", "hidden") if role != "down" else ("hidden", "embed") for role in kernels}
    # Over fsdp, the matrices of a layer are gathered before it.
    specs = {
        role: mesh_axes(("expert", *(name if name == "hidden" else None for name in names)), spread)
        for role, names in axes.items()
    }
    return jax.shard_map(run, in_specs=(whole, whole, whole, specs), out_specs=whole, check_vma=False)(
        tokens_BTD, experts_BTA, weights_BTA, kernels
    )


def apply_experts(
    config: FeedForwardConfig,
    tokens_BTD: Float[Array, "*B T D"],
    experts_BTA: Int[Array, "*B T A"],
    weights_BTA: Float[Array, "*B T A"],
    kernels: dict[str, Array],
) -> Float[Array, "*B T D"]:
    """The weighted sum of what its experts make of each token; those without a kernel here add nothing.

    Args:
        config: of each expert.
        tokens_BTD: what they see.
        experts_BTA: the experts of each token; below 0, or from as many on as there are kernels, is another device's.
        weights_BTA: of each.
        kernels: by role, [E, D, F] or for `down` [E, F, D], in the tokens' type.
    """
    num_experts, num_chosen = len(kernels["up"]), experts_BTA.shape[-1]
    chosen_NA, weights_NA = experts_BTA.reshape(-1, num_chosen), weights_BTA.reshape(-1, num_chosen)
    here_NA = (chosen_NA >= 0) & (chosen_NA < num_experts)
    order_R, sizes_E = experts.sort_by_expert(jnp.where(here_NA, chosen_NA, num_experts), num_experts)

    def linear(role: str, features: int, axes: tuple[str, str]) -> Callable[[Array], Array]:
        del features, axes
        return lambda rows_RD: experts.expert_product(rows_RD, kernels[role], sizes_E, rows_RD.dtype)

    tokens_ND = tokens_BTD.reshape(-1, tokens_BTD.shape[-1])
    rows_RD = network(config, experts.to_experts(tokens_ND, order_R), linear)
    return experts.from_experts(rows_RD, order_R, jnp.where(here_NA, weights_NA, 0.0)).reshape(tokens_BTD.shape)
