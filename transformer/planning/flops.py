"""Operations of a step: those its program traces to, and those of the formula by which utilisation is told."""

import math
from typing import Any

import jax

from transformer.config import Config
from transformer.model_config import BlockConfig
from transformer.tasks import idle_parameters
from transformer.types import PyTree


def traced_flops(function: Any, *arguments: PyTree) -> float:
    """Operations of all matrix products of a function, over all devices, two for each multiply-add.

    Counted in what JAX traces, so that loops count as often as they run, recomputation as computed, and each device of a
    `shard_map` for itself. A fused attention kernel counts by formula, from its operands: forward two products over all pairs
    of places, backward seven where the mathematics has five, halved if causal, as its blocks are skipped. Of branches, the
    dearest counts; a loop whose length is known only when running counts once.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> float:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name.startswith("ragged_dot"):
        # Each row meets one of the groups' matrices.
        rows, inner = equation.invars[0].aval.shape[:2]
        return 2.0 * rows * inner * equation.outvars[0].aval.shape[-1]
    if name == "pallas_call":
        return kernel_flops(str(params.get("name_and_src_info", params.get("name", ""))), equation.invars)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    inner = sum(_count(part) for part in _parts(params))
    if name == "scan":
        return inner * params["length"]
    if name == "shard_map":
        return inner * math.prod(params["mesh"].shape.values())
    return inner


def _parts(params: dict[str, Any]) -> list[Any]:
    """The programs within an equation."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found


def kernel_flops(name: str, operands: Any) -> float:
    """Operations of a splash attention kernel, from its name and its operands: `[H, T, K]` queries first among those."""
    arrays = [operand.aval.shape for operand in operands if len(operand.aval.shape) >= 3]
    if "splash" not in name or len(arrays) < 2:
        return 0.0
    *heads, length, width = arrays[0]
    pairs = math.prod(heads) * length * arrays[1][-2]
    products = 5 if "dkv" in name and "dq" not in name else 2 if "fwd" in name else 3
    return 2.0 * products * pairs * width / 2


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
    model = config.model
    attention = sum(_attention(block, model.embed_dim, length, causal_half) for block in model.pattern)
    attention *= model.num_layers / len(model.pattern)
    return rows * length * (6.0 * product_parameters(config, params) + attention)


def product_parameters(config: Config, params: PyTree) -> float:
    """Parameters that a token meets in matrix products: no table that is only looked up, and of experts those it goes to."""
    total = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if names[-1] == "kernel" or (names[0] == "token_embedding" and config.model.tie_embeddings):
            total += math.prod(x.shape)
    return total - idle_parameters(config.model)


def _attention(block: BlockConfig, embed_dim: int, length: int, causal_half: bool) -> float:
    attention = block.attention
    keys = min(length, attention.window or length)
    keys = keys - keys * keys / (2 * length) if causal_half else keys
    return 12.0 * attention.num_heads * attention.resolved_head_dim(embed_dim) * keys
