"""Operations of a training step, counted in the traced loss; attention counts the pairs that its masks permit."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer.ops.attention import ATTENTION_SCOPE
from transformer.ops.visible import read_mark
from transformer.types import Loss, PyTree


class Flops(NamedTuple):
    """Operations, two per multiply-add, by category."""

    products: float
    """Matrix products and convolutions outside attention."""
    attention: float
    """Attention over the pairs of queries and keys that masks permit (`ops.visible`), as in model FLOPs."""
    attention_whole: float
    """Attention over all pairs."""

    @property
    def total(self) -> float:
        """The operations counted by utilization (MFU)."""
        return self.products + self.attention


def count_flops(loss: Callable[..., Any], params: PyTree, *arguments: PyTree) -> Flops:
    """Operations of a loss and its gradient by `params`; `loss` is traced once, with shapes, and nothing is computed.

    A product counts once, and once more for each operand with a gradient. A layer in training therefore counts three times, the
    first layer twice, because its inputs have no gradient, and frozen layers and a model in evaluation once. Memory-saving
    techniques (rematerialization, a loss in chunks, custom gradients) do not change the count. A loop counts its iterations if
    their number is known when tracing, else one; of several branches, the most expensive counts. A mixture's experts count for
    the tokens routed to them.

    Attention by `ops.dot_product_attention` (used by every layer of this package) counts by formula, for every backend. There are
    two products of each query with the keys that the static fields of its mask permit, and four for the gradient.

    Args:
        loss: `(params, *arguments) -> loss`, or a pytree whose first leaf is the loss. Other results have no gradient.
        params: the differentiated arrays, or their shapes. An empty tree (`()`) counts a forward pass.
        arguments: all other arguments.

    Example:
        >>> w, x = jax.ShapeDtypeStruct((4, 5), "float32"), jax.ShapeDtypeStruct((3, 4), "float32")
        >>> count_flops(lambda w, x: (x @ w).sum(), w, x).total  # forward, and the gradient of w
        240.0
    """
    closed = jax.make_jaxpr(loss)(params, *arguments)
    num_params = len(jax.tree.leaves(params))
    active = [index < num_params and _inexact(v) for index, v in enumerate(closed.jaxpr.invars)]
    live = [index == 0 for index in range(len(closed.jaxpr.outvars))]
    total, _ = _Counter().count(closed.jaxpr, tuple(active), tuple(live))
    return Flops(*total.tolist())


def step_flops(loss: Loss, params: PyTree, batch: PyTree) -> Flops:
    """`count_flops` of a loss on a batch; only the batch's shapes matter."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)), batch)
    rows = len(jax.tree.leaves(batch)[0])
    carry = jax.eval_shape(lambda: loss.init_carry(rows))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def training_loss(params: PyTree, carry: PyTree, batch: PyTree, key: Any) -> Any:
        return loss.loss(params, carry, batch, key, True)

    return count_flops(training_loss, params, carry, shapes, key)


def traced_flops(function: Callable[..., PyTree], *arguments: PyTree) -> float:
    """Operations of all matrix products of a function as traced, over all devices, without attention.

    For a training step, the result may exceed `count_flops`: recomputation counts as computed, and each device of a `shard_map`
    counts separately. Attention is omitted, because kernels do not reveal their operations.
    """
    return _as_written(jax.make_jaxpr(function)(*arguments).jaxpr, experts=1)


def _as_written(jaxpr: Any, experts: int) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if ATTENTION_SCOPE in str(equation.source_info.name_stack):
            continue
        name, params = equation.primitive.name, equation.params
        own = _product_flops(equation, experts)
        if own is not None:
            total += own
        elif name == "cond":
            total += max(_as_written(branch.jaxpr, experts) for branch in params["branches"])
        elif name == "shard_map":
            (part,) = _parts(params)
            sizes = params["mesh"].shape
            total += _as_written(part, sizes.get("expert", 1)) * math.prod(sizes.values())
        else:
            total += sum(_as_written(part, experts) for part in _parts(params)) * _repeats(equation)
    return total


class _Counter:
    """Interprets a traced loss. A value is active if it depends on the parameters, and live if the loss depends on it."""

    def __init__(self) -> None:
        self._counts: dict[Any, tuple[np.ndarray, tuple[bool, ...]]] = {}
        self._lives: dict[Any, tuple[bool, ...]] = {}

    def count(
        self, jaxpr: Any, active: tuple[bool, ...], live: tuple[bool, ...]
    ) -> tuple[np.ndarray, tuple[bool, ...]]:
        """The operations as in `Flops`, and the active results, for given active arguments and live results."""
        key = (id(jaxpr), active, live)
        if key not in self._counts:
            self._counts[key] = self._count(jaxpr, active, live)
        return self._counts[key]

    def _count(self, jaxpr: Any, active: tuple[bool, ...], live: tuple[bool, ...]) -> Any:
        live_vars = self._live_vars(jaxpr, live)
        active_vars = {id(v) for v, is_active in zip(jaxpr.invars, active, strict=True) if is_active}
        marked = _marked_scopes(jaxpr)
        total = np.zeros(3)
        for equation in jaxpr.eqns:
            operands = tuple(id(v) in active_vars for v in equation.invars)
            results = tuple(id(v) in live_vars for v in equation.outvars)
            flops, outs = self._equation(equation, operands, results, marked)
            total += flops
            active_vars |= {id(v) for v, is_active in zip(equation.outvars, outs, strict=True) if is_active}
        return total, tuple(id(v) in active_vars for v in jaxpr.outvars)

    def _equation(
        self, equation: Any, operands: tuple[bool, ...], results: tuple[bool, ...], marked: tuple[str, ...]
    ) -> tuple[Any, Sequence[bool]]:
        depends = any(operands) and equation.primitive.name != "stop_gradient"
        outs = [depends and _inexact(v) for v in equation.outvars]
        differentiated = any(operands) and any(results)
        mark = read_mark(equation)
        if mark is not None:
            visible, whole = mark
            return np.array([0.0, visible, whole]) * (3 if differentiated else 1), outs
        if str(equation.source_info.name_stack).startswith(marked):
            return 0.0, outs
        own = _product_flops(equation)
        if own is not None:
            return np.array([own * (1 + (sum(operands[:2]) if any(results) else 0)), 0.0, 0.0]), outs
        branches = _branches(equation)
        if branches:
            skip = len(equation.invars) - len(branches[0].invars)
            counted = [self.count(branch, operands[skip:], results) for branch in branches]
            dearest = max((flops for flops, _ in counted), key=lambda flops: flops[:2].sum())
            return dearest * _repeats(equation), [any(each) for each in zip(*(o for _, o in counted), strict=True)]
        if equation.primitive.name == "scan":
            return self._scan(equation, operands, results)
        # Nothing is known of the inner program, except that it runs.
        parts = _parts(equation.params)
        inner = sum(self.count(part, (False,) * len(part.invars), (False,) * len(part.outvars))[0] for part in parts)
        return inner * (_repeats(equation) * (3 if differentiated else 1)), outs

    def _scan(self, equation: Any, operands: tuple[bool, ...], results: tuple[bool, ...]) -> Any:
        body, consts, carried = _scan_parts(equation)
        while True:
            flops, outs = self.count(body, operands, self._scan_live(equation, results)[0])
            carry = tuple(a or b for a, b in zip(operands[consts : consts + carried], outs[:carried], strict=True))
            if carry == operands[consts : consts + carried]:
                return flops * equation.params["length"], outs
            operands = (*operands[:consts], *carry, *operands[consts + carried :])

    def _scan_live(self, equation: Any, results: tuple[bool, ...]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """The live results of the body, and the live operands."""
        body, consts, carried = _scan_parts(equation)
        while True:
            ins = self.live(body, results)
            carry = tuple(a or b for a, b in zip(results[:carried], ins[consts : consts + carried], strict=True))
            if carry == results[:carried]:
                return results, ins
            results = (*carry, *results[carried:])

    def live(self, jaxpr: Any, results: tuple[bool, ...]) -> tuple[bool, ...]:
        """The live arguments, for given live results."""
        key = (id(jaxpr), results)
        if key not in self._lives:
            found = self._live_vars(jaxpr, results)
            self._lives[key] = tuple(id(v) in found for v in jaxpr.invars)
        return self._lives[key]

    def _live_vars(self, jaxpr: Any, results: tuple[bool, ...]) -> set[int]:
        found = {id(v) for v, is_live in zip(jaxpr.outvars, results, strict=True) if is_live and _inexact(v)}
        for equation in reversed(jaxpr.eqns):
            outs = tuple(id(v) in found for v in equation.outvars)
            if not any(outs) or equation.primitive.name == "stop_gradient":
                continue
            ins: Sequence[bool] = [True] * len(equation.invars)
            branches = _branches(equation)
            if branches:
                each = [self.live(branch, outs) for branch in branches]
                ins = [False] * (len(equation.invars) - len(each[0])) + [any(x) for x in zip(*each, strict=True)]
            elif equation.primitive.name == "scan":
                ins = self._scan_live(equation, outs)[1]
            found |= {id(v) for v, is_live in zip(equation.invars, ins, strict=True) if is_live and _inexact(v)}
        return found


def _product_flops(equation: Any, experts: int = 1) -> float | None:
    """Operations of an equation that is one product; None for others. Its operands come first among the equation's."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name.startswith("ragged_dot"):
        # Each row is multiplied by one group's matrix; over an axis of experts, on one of the devices that hold the row.
        rows, inner = equation.invars[0].aval.shape[:2]
        return 2.0 * rows * inner * equation.outvars[0].aval.shape[-1] / experts
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
    return None


def _branches(equation: Any) -> list[Any]:
    """The programs of a switch or a call: the equation runs one of them on its last operands and returns its results."""
    if equation.primitive.name == "cond":
        return [branch.jaxpr for branch in equation.params["branches"]]
    parts = _parts(equation.params)
    fits = len(parts) == 1 and len(parts[0].invars) == len(equation.invars)
    fits = fits and len(parts[0].outvars) == len(equation.outvars) and equation.primitive.name != "scan"
    return parts if fits else []


def _scan_parts(equation: Any) -> tuple[Any, int, int]:
    """The body of a loop, and the numbers of its constant and carried operands."""
    params = equation.params
    if "ft_in" in params:  # JAX 0.11 and later
        consts, carried, _ = map(len, params["ft_in"].unpack())
    else:
        consts, carried = params["num_consts"], params["num_carry"]
    return params["jaxpr"].jaxpr, consts, carried


def _parts(params: dict[str, Any]) -> list[Any]:
    """The programs inside an equation."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found


def _repeats(equation: Any) -> float:
    """How often the programs inside an equation run."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return params["length"]
    if name == "while":
        return _trips(equation)
    if name == "shard_map":
        return math.prod(params["mesh"].shape.values())
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _trips(equation: Any) -> int:
    """The iterations of a `while` that increments a counter by one between known bounds; 1 for others."""
    params = equation.params
    condition, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    if len(condition.eqns) != 1:
        return 1
    test = condition.eqns[0]
    if test.primitive.name != "lt" or not hasattr(test.invars[1], "val"):
        return 1
    carried = equation.invars[params["cond_nconsts"] + params["body_nconsts"] :]
    indices = [i for i, v in enumerate(condition.invars[params["cond_nconsts"] :]) if v is test.invars[0]]
    if not indices or not hasattr(carried[indices[0]], "val"):
        return 1
    (index,) = indices
    counter, result = body.invars[params["body_nconsts"] + index], body.outvars[index]
    for step in body.eqns:
        if step.outvars[0] is result and step.primitive.name == "add":
            by = [v for v in step.invars if v is not counter]
            if len(by) == 1 and getattr(by[0], "val", None) == 1:
                return max(0, int(test.invars[1].val) - int(carried[index].val))
    return 1


def _marked_scopes(jaxpr: Any) -> tuple[str, ...]:
    return tuple(str(e.source_info.name_stack) for e in jaxpr.eqns if read_mark(e) is not None)


def _inexact(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.inexact)
