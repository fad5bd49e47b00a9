"""Auxiliary losses and statistics of the routers of experts."""

import jax
import jax.numpy as jnp

from transformer.objective import Objective
from transformer.ops.experts import RoutingStatistics
from transformer.types import PyTree, Statistics


def add_routing(statistics: Statistics, variables: PyTree, config: Objective) -> Statistics:
    """The statistics with auxiliary losses added to `objective`, and with routing statistics; unchanged without experts.

    Each loss is a mean over a micro-batch, one per layer; their sum over layers is added (Fedus et al. 2022, section 2.2).
    `objective` is a sum that the step divides by the weight of the whole batch. The losses are therefore multiplied by the weight
    of this micro-batch: the gradient then contains their weighted mean over micro-batches. Reported under the names of
    `RoutingStatistics` is the mean over layers, times that weight.

    Args:
        statistics: with the sums `objective` and `weight`.
        variables: the second result of `model.apply(..., mutable="routing")`.
        config: the weights of the losses.
    """
    routed = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, RoutingStatistics))
    if not routed:
        return statistics
    # A scanned stack has one array over layers, a loop one scalar per layer.
    layers: RoutingStatistics = jax.tree.map(lambda *parts: jnp.concatenate([x.reshape(-1) for x in parts]), *routed)
    weight = statistics["weight"]
    # The divisor of the step. With class weights it differs from the number of examples.
    divided_by = statistics.get("objective_weight", weight)
    penalty = config.load_balance * jnp.sum(layers.load_balance) + config.router_z * jnp.sum(layers.router_z)
    reported = {name: weight * jnp.mean(value) for name, value in layers._asdict().items()}
    return {**statistics, **reported, "objective": statistics["objective"] + divided_by * penalty}
