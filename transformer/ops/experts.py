"""A mixture of experts: routing of tokens to experts, their products, the weighted sum, and statistics of the routing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from transformer.types import Leaf

PRODUCT = "expert_product"
"""Name of the results, for `jax.checkpoint_policies.save_only_these_names`."""


class RoutingStatistics(NamedTuple):
    """How one layer routed the tokens of one micro-batch, float32 scalars."""

    load_balance: Leaf
    """`E * sum_e f_e P_e`, 1 if all experts get equal shares (`routing_statistics`)."""
    router_z: Leaf
    """Mean squared log-normaliser of the router's logits (Zoph et al. 2022, eq. 5)."""
    busiest_expert: Leaf
    """The largest `f_e`, 1 / E if all experts get equally many tokens."""


def route(
    logits: Float[Array, "*N E"], experts_per_token: int, *, normalize: bool = True
) -> tuple[Int[Array, "*N A"], Float[Array, "*N A"]]:
    """The experts of each token, most probable first, and their weights in float32.

    Probabilities are a softmax over all experts. The A largest are divided by their sum (Jiang et al. 2024, section 2.1), or,
    without `normalize`, left as they are (Muennighoff et al. 2024). With A = 1 the probability is always left as it is (Fedus et
    al. 2022, eq. 2): divided by itself it would be 1, without a gradient for the router.

    >>> experts, weights = route(jnp.log(jnp.array([[0.125, 0.5, 0.25]])), 2)
    >>> experts.tolist(), [round(float(weight), 3) for weight in weights[0]]
    ([[1, 2]], [0.667, 0.333])
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), experts_per_token)
    if normalize and experts_per_token > 1:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return experts, weights


def sort_by_expert(experts_NA: Int[Array, "N A"], num_experts: int) -> tuple[Int[Array, " R"], Int[Array, " E"]]:
    """Indices `n * A + a` sorted by expert, and the number of rows of each expert. No row is dropped.

    Rows of experts from `num_experts` on come last and are counted for none.

    >>> order, sizes = sort_by_expert(jnp.array([[2, 0], [0, 2]]), 3)
    >>> order.tolist(), sizes.tolist()
    ([1, 2, 0, 3], [2, 0, 2])
    """
    experts_R = experts_NA.reshape(-1)
    sizes_E = jnp.sum(experts_R[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)
    return jnp.argsort(experts_R), sizes_E


def to_experts(tokens_ND: Float[Array, "N D"], order_R: Int[Array, " R"]) -> Float[Array, "R D"]:
    """One copy of each token for each of its experts, sorted by expert."""
    N, D = tokens_ND.shape
    copies_NAD = jnp.broadcast_to(tokens_ND[:, None], (N, len(order_R) // N, D))
    # Each copy is read once: the gradient adds in a fixed order.
    return copies_NAD.reshape(-1, D).at[order_R].get(unique_indices=True)


def expert_product(
    rows_RD: Float[Array, "R D"], kernel_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"], dtype: DTypeLike
) -> Float[Array, "R F"]:
    """Each row times the matrix of its expert, for rows sorted by expert; zeros for the rows beyond the last expert's.

    XLA's CPU backend multiplies every row with every expert and discards the other products: E times the work.
    """
    product = jax.lax.ragged_dot(rows_RD, kernel_EDF, sizes_E, preferred_element_type=jnp.dtype(dtype))
    # The content of the rows beyond all groups depends on the platform.
    has_expert_R = jnp.arange(len(rows_RD)) < jnp.sum(sizes_E)
    # Policies of `jax.checkpoint` do not recognise it as a matrix product.
    return checkpoint_name(jnp.where(has_expert_R[:, None], product, jnp.zeros((), product.dtype)), PRODUCT)


def from_experts(
    rows_RD: Float[Array, "R D"], order_R: Int[Array, " R"], weights_NA: Float[Array, "N A"]
) -> Float[Array, "N D"]:
    """The weighted sum of the outputs of each token's experts, added in float32."""
    out_RD = rows_RD.at[jnp.argsort(order_R)].get(unique_indices=True)
    out_NAD = out_RD.reshape(*weights_NA.shape, -1).astype(jnp.float32)
    return jnp.sum(out_NAD * weights_NA[..., None], axis=1).astype(rows_RD.dtype)


def routing_statistics(
    logits_NE: Float[Array, "N E"], experts_NA: Int[Array, "N A"], valid_N: Bool[Array, " N"] | None = None
) -> RoutingStatistics:
    """The quantities in the auxiliary losses. They do not add over micro-batches: by definition, each has its own.

    Let `f_e` be the share of expert e in all assignments (without a gradient) and `P_e` its mean probability. The load-balance
    loss is `E * sum_e f_e P_e` (Shazeer et al. 2017 in the form of Fedus et al. 2022, eq. 4 to 6). With A experts per token,
    each assignment counts 1 / A.

    Args:
        logits_NE: logits of the router.
        experts_NA: the experts chosen by `route`.
        valid_N: False for padding, which is not counted; None means that all tokens are valid. Without a valid token all are 0.
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
