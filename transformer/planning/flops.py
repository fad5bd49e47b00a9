"""Operations of a step: those its program traces to, and those of the formula by which utilisation is told."""

import math
from typing import Any

import jax

from transformer.config import Config
from transformer.layers.spread_attention import ATTENTION_SCOPE
from transformer.model_config import BlockConfig
from transformer.tasks import idle_parameters
from transformer.types import PyTree


def traced_flops(function: Any, *arguments: PyTree) -> float:
    """Operations of all matrix products of a function, over all devices, two for each multiply-add, without attention's own.

    Counted in what JAX traces, so that loops count as often as they run, recomputation as computed, and each device of a
    `shard_map` for itself. What `layers.spread_attention` traces to is left out (`attention_flops` has it): kernels do not say
    what they do, nor do loops over the blocks that a mask leaves. Of branches, the dearest counts.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, experts=1)


def _count(jaxpr: Any, experts: int) -> float:
    return sum(
        _count_equation(equation, experts)
        for equation in jaxpr.eqns
        if ATTENTION_SCOPE not in str(equation.source_info.name_stack)
    )


def _count_equation(equation: Any, experts: int) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name.startswith("ragged_dot"):
        # Each row meets one of the groups' matrices; over an axis of experts, on one of the devices that hold the row.
        rows, inner = equation.invars[0].aval.shape[:2]
        return 2.0 * rows * inner * equation.outvars[0].aval.shape[-1] / experts
    if name == "cond":
        return max(_count(branch.jaxpr, experts) for branch in params["branches"])
    if name == "shard_map":
        sizes = params["mesh"].shape
        return sum(_count(part, sizes.get("expert", 1)) for part in _parts(params)) * math.prod(sizes.values())
    inner = sum(_count(part, experts) for part in _parts(params))
    return inner * params["length"] if name == "scan" else inner


def _parts(params: dict[str, Any]) -> list[Any]:
    """The programs within an equation."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found


def formula_flops(config: Config, params: PyTree, *, rows: int, length: int, causal_half: bool) -> float:
    """Operations of a training step as utilisation has them: `6 N + attention` a token, without recomputation.

    Attention is `12 H K` for each pair of places that a block's window leaves (Chowdhery et al. 2022, appendix B), all T x T
    of them or, with `causal_half`, those not later only.

    Args:
        config: of the run.
        params: the parameters or their shapes.
        rows: of the batch.
        length: T.
        causal_half: count T / 2 keys for a query instead of T.
    """
    attention = attention_flops(config, length=length, memory=config.model.memory_length, causal_half=causal_half)
    return rows * length * (6.0 * product_parameters(config, params) + attention)


def attention_flops(config: Config, *, length: int, memory: int = 0, causal_half: bool, products: int = 6) -> float:
    """Operations of all layers' attention for one token, projections left out.

    Args:
        config: of the run.
        length: T.
        memory: vectors before the row that each query attends to besides.
        causal_half: count T / 2 keys for a query instead of T.
        products: over the pairs of places: 2 forward; 4 backward, 5 in a fused kernel, which computes the logits again; and 2
            for a forward pass that is computed again.
    """
    model = config.model
    pairs = sum(
        block.attention.num_heads
        * block.attention.resolved_head_dim(model.embed_dim)
        * _keys(block, length, memory, causal_half)
        for block in model.pattern
    )
    return 2.0 * products * pairs * model.num_layers / len(model.pattern)


def product_parameters(config: Config, params: PyTree) -> float:
    """Parameters that a token meets in matrix products: no table that is only looked up, and of experts those it goes to."""
    total = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if names[-1] == "kernel" or (names[0] == "token_embedding" and config.model.tie_embeddings):
            total += math.prod(x.shape)
    return total - idle_parameters(config.model)


def _keys(block: BlockConfig, length: int, memory: int, causal_half: bool) -> float:
    keys = min(memory + length, block.attention.window or memory + length)
    of_row = max(0, keys - memory)  # the others are there for the first query already
    return keys - of_row * of_row / (2 * length) if causal_half else keys
