"""Finds the first layer with activations or gradients that are not finite, by repeating the batch on which a run diverged."""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transformer.training.optimizer import parameter_path
from transformer.types import Array, Loss, PyTree


def first_not_finite(
    objective: Loss, params: PyTree, parts: list[tuple[PyTree, Any, Array]], *, scale: float | Array = 1.0
) -> str:
    """A sentence that names the first parameter, module or gradient that is not finite; layers must be looped, without remat.

    Args:
        objective: the run's objective.
        params: the parameters before the step.
        parts: `(carry, batch, key)` of each separately computed part of the batch, as `split` yields them.
        scale: the loss scale (float16).
    """
    weight = sum(objective.weight(batch) for _, batch, _ in parts)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not bool(_finite(x)):
            return f"The parameter {parameter_path(path)} was not finite before that step."
    found = [_first(objective, params, carry, batch, key, scale / weight) for carry, batch, key in parts]
    # An activation that is not finite in the forward pass explains such gradients in the backward pass.
    return next((text for _, text in sorted(filter(None, found))), "")


def _first(objective: Loss, params: PyTree, carry: PyTree, batch: Any, key: Array, factor: Any) -> Any:
    names: list[str] = []

    def loss(params: PyTree, taps: Array | None, carry: PyTree, batch: Any) -> tuple[Array, list[Array]]:
        names.clear()
        flags: list[Array] = []

        def watch(function: Any, arguments: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
            output = function(*arguments, **options)
            if context.method_name != "setup" and any(isinstance(x, jax.Array) for x in jax.tree.leaves(output)):
                output = output if taps is None else _tap(output, taps[len(names)])
                names.append("/".join(context.module.path))
                flags.append(_finite(output))
            return output

        with nn.intercept_methods(watch):
            (loss_sum, _), _ = objective.loss(params, carry, batch, key, True)
        return loss_sum * factor, [*flags, _finite(loss_sum)]

    def run(params: PyTree, taps: Array, carry: PyTree, batch: Any) -> tuple[PyTree, Array, list[Array]]:
        (grads, tapped), flags = jax.grad(loss, (0, 1), has_aux=True)(params, taps, carry, batch)
        return jax.tree.map(_finite, grads), tapped, flags

    jax.eval_shape(loss, params, None, carry, batch)  # counts the calls
    grads, tapped, flags = jax.jit(run)(params, jnp.zeros(len(names)), carry, batch)
    finite = [bool(flag) for flag in flags]
    if not all(finite):
        at = finite.index(False)
        if at == len(names):
            return 0, "All activations of that step are finite, its loss is not: look at the targets and weights."
        return 0, f"The first activations of that step that are not finite are in {names[at] or 'the model'}."
    bad = {call: f"{names[call] or 'the model'} (its output)" for call, flag in enumerate(tapped) if flag}
    explained = {names[call] for call in bad}  # for a shared parameter, any of its calls may be the cause
    for path in (parameter_path(path) for path, flag in jax.tree_util.tree_leaves_with_path(grads) if not bool(flag)):
        module = path.rpartition("/")[0]
        if module not in explained:
            bad[max((call for call, name in enumerate(names) if name == module), default=-1)] = path
    # The backward pass starts where the forward pass ends.
    return (
        (1, f"All activations of that step are finite; the first gradient that is not belongs to {bad[max(bad)]}.")
        if bad
        else None
    )


@jax.custom_vjp
def _tap(tree: PyTree, flag: Array) -> PyTree:
    """The tree itself; the gradient of `flag` is 1 if the gradient of the tree is not finite."""
    del flag
    return tree


_tap.defvjp(lambda tree, _: (tree, None), lambda _, grads: (grads, 1.0 - _finite(grads).astype(jnp.float32)))


def _finite(tree: PyTree) -> Array:
    arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays])) if arrays else jnp.bool_(True)


def split(carry: PyTree, batch: PyTree, key: Array, *, devices: int = 1, accumulate_steps: int = 1) -> Iterator[tuple]:
    """The parts of a batch that a step computes separately, with their keys.

    Args:
        carry: the carry of the whole batch.
        batch: all its rows.
        key: the key of the step.
        devices: number of devices that run the step on their own rows (pmap), else 1.
        accumulate_steps: number of micro-batches.
    """
    for device in range(devices):
        own = jax.random.fold_in(key, device) if devices > 1 else key

        def rows(tree: PyTree, first: int, device: int = device) -> PyTree:
            share = jax.tree.map(lambda x: x[device * len(x) // devices : (device + 1) * len(x) // devices], tree)
            return jax.tree.map(lambda x: x[first::accumulate_steps], share)

        for index in range(accumulate_steps):
            micro = jax.random.fold_in(own, index) if accumulate_steps > 1 else own
            yield rows(carry, index), rows(batch, index), micro
