"""A mixture of experts: feed-forward networks, of which each token uses a few."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from transformer.layers.feed_forward import network
from transformer.layers.linear import Linear, stored
from transformer.layers.runtime import Runtime
from transformer.model_config import FeedForwardConfig
from transformer.ops import experts
from transformer.ops.quantized import Quantized


class ExpertKernel(nn.Module):
    """One matrix per expert; attributes as in `Linear`, with an axis of experts before `axes`."""

    shape: tuple[int, int, int]
    axes: tuple[str, str]
    init_scale: float = 1.0
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(self) -> Float[Array, "E D F"]:
        """The matrices, in the type of the activations."""
        init = self.runtime.initializer(self.shape[1], ("expert", *self.axes), self.init_scale)
        kernel = stored(self, "kernel", init, self.shape)
        return kernel.whole(self.runtime.dtype) if isinstance(kernel, Quantized) else kernel.astype(self.runtime.dtype)


class MixtureOfExperts(nn.Module):
    """`config.num_experts` networks like `FeedForward`. A router sends each token to a few, without a limit per expert.

    No token is dropped: none depends on another, and packing, padding and decoding change nothing. An `apply` with
    `mutable=["routing"]` also returns a `RoutingStatistics` of each layer, under `statistics`.

    Attributes:
        config: the form of each expert, their number, and the number of experts per token.
        runtime: types, initialisation, the router's `dot_general` and sharding. The router computes in float32.

    Example:
        >>> layer = MixtureOfExperts(FeedForwardConfig(hidden_dim=16, num_experts=4))
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 8)))
        >>> sorted(variables["params"]), variables["params"]["up"]["kernel"].shape
        (['down', 'router', 'up'], (4, 8, 16))
    """

    config: FeedForwardConfig
    runtime: Runtime = Runtime()

    @nn.compact
    def __call__(
        self, inputs_BTD: Float[Array, "*B T D"], *, valid_BT: Bool[Array, "*B T"] | None = None
    ) -> Float[Array, "*B T D"]:
        """Map every token on its own; `valid_BT` is False for padding, which the statistics leave out."""
        config, num_experts, embed_dim = self.config, self.config.num_experts, inputs_BTD.shape[-1]
        if num_experts < 1:
            raise ValueError(f"A mixture needs experts, got num_experts={num_experts}; FeedForward is one network.")
        float32 = dataclasses.replace(self.runtime, dtype=jnp.float32)
        router = Linear((num_experts,), ("embed", None), runtime=float32, name="router")
        logits_BTE = router(inputs_BTD)
        chosen = experts.route(logits_BTE, config.experts_per_token, normalize=config.normalize_experts)
        experts_BTA, weights_BTA = chosen
        if self.is_mutable_collection("routing") and not self.is_initializing():
            fold = (-1, logits_BTE.shape[-1]), (-1, config.experts_per_token)
            valid_N = None if valid_BT is None else valid_BT.reshape(-1)
            statistics = experts.routing_statistics(logits_BTE.reshape(fold[0]), experts_BTA.reshape(fold[1]), valid_N)
            self.sow("routing", "statistics", statistics)

        def kernel(role: str, axes: tuple[str, str]) -> Array:
            sizes = {"embed": embed_dim, "hidden": config.resolved_hidden_dim(embed_dim)}
            shape = (num_experts, sizes[axes[0]], sizes[axes[1]])
            scale = self.runtime.residual_init_scale if role == "down" else 1.0
            return ExpertKernel(shape, axes, init_scale=scale, runtime=self.runtime, name=role)()

        kernels = {role: kernel(role, ("embed", "hidden")) for role in ("up", "gate")[: 1 + config.gated]}
        kernels["down"] = kernel("down", ("hidden", "embed"))
        tokens_BTD = inputs_BTD.astype(self.runtime.dtype)
        return sharded_experts(config, tokens_BTD, experts_BTA, weights_BTA, kernels, self.runtime)


def sharded_experts(
    config: FeedForwardConfig,
    tokens_BTD: Float[Array, "*B T D"],
    experts_BTA: Int[Array, "*B T A"],
    weights_BTA: Float[Array, "*B T A"],
    kernels: dict[str, Array],
    runtime: Runtime,
) -> Float[Array, "*B T D"]:
    """`apply_experts` under the current mesh: each device computes its rows and, over an `expert` axis, its experts.

    The devices of an expert axis all-gather their rows, run their own experts on the tokens routed to them, and reduce-scatter
    the results. This communication does not depend on the routing.
    """
    sharding = runtime.sharding
    mesh_axes = sharding.sharded_axes()
    shards = math.prod(mesh_axes.get(axis, 1) for axis in sharding.axes("batch")) if mesh_axes else 1
    if not mesh_axes or tokens_BTD.ndim != 3 or len(tokens_BTD) % shards != 0:
        return apply_experts(config, tokens_BTD, experts_BTA, weights_BTA, kernels, runtime)
    rows, positions, of_experts = sharding.spec(("batch", "length", "expert"), mesh_axes)
    of_hidden = sharding.spec(("hidden",), mesh_axes)[0]

    def run(tokens: Array, chosen: Array, weights: Array, kernels: dict[str, Array]) -> Array:
        first: Any = 0
        if of_experts is not None:
            tokens, chosen, weights = (
                jax.lax.all_gather(x, of_experts, axis=0, tiled=True) for x in (tokens, chosen, weights)
            )
            first = jax.lax.axis_index(of_experts) * len(kernels["up"])
        out = apply_experts(config, tokens, chosen - first, weights, kernels, runtime)
        if of_hidden is not None:
            out = jax.lax.psum(out, of_hidden)
        return out if of_experts is None else jax.lax.psum_scatter(out, of_experts, scatter_dimension=0, tiled=True)

    whole = PartitionSpec(rows, positions)
    axes = {role: ("embed", "hidden") if role != "down" else ("hidden", "embed") for role in kernels}
    # Over fsdp, the matrices of a layer are gathered before the layer.
    specs = {
        role: sharding.spec(("expert", *(name if name == "hidden" else None for name in names)), mesh_axes)
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
    runtime: Runtime,
) -> Float[Array, "*B T D"]:
    """The weighted sum of the outputs of each token's experts; experts without a kernel here add nothing.

    Args:
        config: form of each expert.
        tokens_BTD: inputs of the experts.
        experts_BTA: the experts of each token; a number outside the kernels here belongs to another device.
        weights_BTA: weight of each expert.
        kernels: by role, [E, D, F] or for `down` [E, F, D], in the tokens' type.
        runtime: for sharding.
    """
    num_experts, num_chosen = len(kernels["up"]), experts_BTA.shape[-1]
    chosen_NA, weights_NA = experts_BTA.reshape(-1, num_chosen), weights_BTA.reshape(-1, num_chosen)
    here_NA = (chosen_NA >= 0) & (chosen_NA < num_experts)
    order_R, sizes_E = experts.sort_by_expert(jnp.where(here_NA, chosen_NA, num_experts), num_experts)

    def linear(role: str, features: int, axes: tuple[str, str]) -> Callable[[Array], Array]:
        del features, axes
        return lambda rows_RD: experts.expert_product(rows_RD, kernels[role], sizes_E, rows_RD.dtype)

    tokens_ND = tokens_BTD.reshape(-1, tokens_BTD.shape[-1])
    rows_RD = network(config, experts.to_experts(tokens_ND, order_R), linear, runtime)
    return experts.from_experts(rows_RD, order_R, jnp.where(here_NA, weights_NA, 0.0)).reshape(tokens_BTD.shape)
