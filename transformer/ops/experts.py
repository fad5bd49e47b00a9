"""A mixture of experts: the way of tokens to their experts and back, and statistics of how they were routed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

PRODUCT = "expert_product"
"""Name of the results, for `jax.checkpoint_policies.save_only_these_names`."""


class RoutingStatistics(NamedTuple):
    """How one layer routed the tokens of one micro-batch, float32 scalars."""

    load_balance: Any
    """`E * sum_e f_e P_e`, 1 where all experts are alike (`routing_statistics`)."""
    router_z: Any
    """Mean squared log-normaliser of the router's logits (Zoph et al. 2022, eq. 5)."""
    busiest_expert: Any
    """The largest `f_e`, 1 / E where all experts get as many tokens."""


def route(
    logits: Float[Array, "*N E"], experts_per_token: int, *, normalize: bool = True
) -> tuple[Int[Array, "*N A"], Float[Array, "*N A"]]:
    """The experts of each token, most probable first, and their weights in float32.

    Probabilities are a softmax over all experts; the largest are kept and divided by their sum (Jiang et al. 2024,
    section 2.1), or without `normalize` kept as they are (Muennighoff et al. 2024). A single one keeps its probability always
    (Fedus et al. 2022, eq. 2): divided by itself it would be 1, without a gradient for the router.

    >>> experts, weights = route(jnp.log(jnp.array([[0.125, 0.5, 0.25]])), 2)
    >>> experts.tolist(), [round(float(weight), 3) for weight in weights[0]]
    ([[1, 2]], [0.667, 0.333])
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), experts_per_token)
    if normalize and experts_per_token > 1:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return experts, weights


def sort_by_expert(experts_NA: Int[Array, "N A"], num_experts: int) -> tuple[Int[Array, " R"], Int[Array, " E"]]:
    """Places `n * A + a` in the order of their experts, and how many each expert has: any number, none is dropped.

    Those of an expert beyond `num_experts` come last and count for none.

    >>> order, sizes = sort_by_expert(jnp.array([[2, 0], [0, 2]]), 3)
    >>> order.tolist(), sizes.tolist()
    ([1, 2, 0, 3], [2, 0, 2])
    """
    experts_R = experts_NA.reshape(-1)
    sizes_E = jnp.sum(experts_R[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)
    return jnp.argsort(experts_R), sizes_E


def to_experts(tokens_ND: Float[Array, "N D"], order_R: Int[Array, " R"]) -> Float[Array, "R D"]:
    """A copy of each token for each of its experts, sorted."""
    N, D = tokens_ND.shape
    copies_NAD = jnp.broadcast_to(tokens_ND[:, None], (N, len(order_R) // N, D))
    # Each copy is read once, so that the gradient adds in a fixed order.
    return copies_NAD.reshape(-1, D).at[order_R].get(unique_indices=True)


def expert_product(
    rows_RD: Float[Array, "R D"], kernel_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"], dtype: Any
) -> Float[Array, "R F"]:
    """Each row times the matrix of its expert, for rows sorted by expert; zeros for rows after those that have one.

    XLA's CPU backend multiplies all rows with all experts and keeps what belongs together: E times the work.
    """
    product = jax.lax.ragged_dot(rows_RD, kernel_EDF, sizes_E, preferred_element_type=jnp.dtype(dtype))
    # What is there beyond the groups depends on the platform.
    has_expert_R = jnp.arange(len(rows_RD)) < jnp.sum(sizes_E)
    # To a policy of `jax.checkpoint` this is not among the products.
    return checkpoint_name(jnp.where(has_expert_R[:, None], product, jnp.zeros((), product.dtype)), PRODUCT)


def from_experts(
    rows_RD: Float[Array, "R D"], order_R: Int[Array, " R"], weights_NA: Float[Array, "N A"]
) -> Float[Array, "N D"]:
    """The weighted sum of what each token's experts say, added in float32."""
    out_RD = rows_RD.at[jnp.argsort(order_R)].get(unique_indices=True)
    out_NAD = out_RD.reshape(*weights_NA.shape, -1).astype(jnp.float32)
    return jnp.sum(out_NAD * weights_NA[..., None], axis=1).astype(rows_RD.dtype)


def routing_statistics(
    logits_NE: Float[Array, "N E"], experts_NA: Int[Array, "N A"], valid_N: Bool[Array, " N"] | None = None
) -> RoutingStatistics:
    """What the auxiliary losses are made of. They do not add over micro-batches: each has its own, by definition.

    With `f_e` the share of expert e among all choices of tokens (its gradient is zero) and `P_e` its mean probability, the
    load-balance loss is `E * sum_e f_e P_e` (Shazeer et al. 2017 in the form of Fedus et al. 2022, eq. 4 to 6; with A
    experts a token, each choice counts 1 / A).

    Args:
        logits_NE: of the router.
        experts_NA: as chosen by `route`.
        valid_N: False for padding, which does not count; None means that all do. With no valid token all are 0.
    """
    N, E = logits_NE.shape
    logits_NE = logits_NE.astype(jnp.float32)
    valid_N = jnp.ones(N, bool) if valid_N is None else valid_N
    share_N = valid_N.astype(jnp.float32) / jnp.maximum(jnp.sum(valid_N, dtype=jnp.float32), 1.0)
    chosen_NE = jnp.mean(jax.nn.one_hot(experts_NA, E, dtype=jnp.float32), axis=1)
    fraction_E = jnp.sum(share_N[:, None] * chosen_NE, axis=0)
    probability_E = jnp.sum(share_N[:, None] * jax.nn.softmax(logits_NE), axis=0)
    return RoutingStatistics(
        load_balance=E * jnp.sum(fraction_E * probability_E),
        router_z=jnp.sum(share_N * jnp.square(jax.nn.logsumexp(logits_NE, axis=1))),
        busiest_expert=jnp.max(fraction_E),
    )
