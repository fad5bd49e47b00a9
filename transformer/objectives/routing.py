"""What routers of experts add to an objective: their losses and their statistics."""

from typing import Any

import jax
import jax.numpy as jnp

from transformer.objective import Objective
from transformer.ops.experts import RoutingStatistics
from transformer.types import Statistics


def add_routing(statistics: Statistics, variables: Any, config: Objective) -> Statistics:
    """The statistics with the auxiliary losses in `objective`, and what routers report; unchanged without experts.

    The losses are means over a micro-batch, one for each layer, whose sum over layers is added (Fedus et al. 2022, section
    2.2). `objective` is a sum that the step divides by the weight of the whole batch: they are multiplied by the weight of
    this micro-batch, so that its gradient has the mean over micro-batches, each by its weight. What is reported is the
    mean over layers, times that weight, under the names of `RoutingStatistics`.

    Args:
        statistics: with the sums `objective` and `weight`.
        variables: what `model.apply(..., mutable="routing")` returned beside its output.
        config: the weights of the losses.
    """
    routed = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, RoutingStatistics))
    if not routed:
        return statistics
    # A scanned stack has an array of layers, a loop a scalar for each.
    layers: RoutingStatistics = jax.tree.map(lambda *parts: jnp.concatenate([x.reshape(-1) for x in parts]), *routed)
    weight = statistics["weight"]
    # What the step divides by, which class weights make another number than that of examples.
    divided_by = statistics.get("objective_weight", weight)
    penalty = config.load_balance * jnp.sum(layers.load_balance) + config.router_z * jnp.sum(layers.router_z)
    reported = {name: weight * jnp.mean(value) for name, value in layers._asdict().items()}
    return {**statistics, **reported, "objective": statistics["objective"] + divided_by * penalty}
