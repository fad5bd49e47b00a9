"""Sums over the places of rows, a part of each row at a time, with the gradient taken on the way."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sum_over_chunks(
    sums_of: Callable[..., tuple[Array, Any]],
    params: Any,
    hidden_BTD: Float[Array, "B T D"],
    others: tuple[Array, ...],
    num_chunks: int,
) -> tuple[Float[Array, ""], Any]:
    """`sums_of(params, hidden_BTD, *others)` with the memory of one of `num_chunks` parts of T.

    The gradient of a sum is known as soon as its part is: each part's is computed with the part, so that nothing of the
    large arrays inside (logits, say) is kept, nor computed twice. Place t is in part t % num_chunks: where T is spread over
    devices, every part is.

    Args:
        sums_of: gives a scalar, the sum that is differentiated, and other sums, which have no gradient.
        params: a pytree of arrays; each part adds to its gradient.
        hidden_BTD: the vectors of the places.
        others: arrays [B, T] of the places, without a gradient. Places that fill up the last part have zeros in them.
        num_chunks: parts.
    """
    num_chunks = min(num_chunks, hidden_BTD.shape[1])  # one place a part, at the least
    padding = -hidden_BTD.shape[1] % num_chunks

    def parts(x: Array) -> Array:
        x = jnp.pad(x, [(0, padding if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, num_chunks, *x.shape[2:]), 2, 0)

    return _sum(sums_of, params, parts(hidden_BTD), tuple(parts(x) for x in others))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(sums_of: Any, params: Any, hidden_CBTD: Any, others: Any) -> Any:
    def add(total: Any, part: Any) -> Any:
        return jax.tree.map(jnp.add, total, sums_of(params, part[0], *part[1])), None

    return jax.lax.scan(add, _zeros(sums_of, params, hidden_CBTD, others), (hidden_CBTD, others))[0]


def _forward(sums_of: Any, params: Any, hidden_CBTD: Any, others: Any) -> Any:
    def add(total: Any, part: Any) -> Any:
        graded = jax.value_and_grad(sums_of, argnums=(0, 1), has_aux=True)
        sums, (params_gradient, hidden_gradient) = graded(params, part[0], *part[1])
        return jax.tree.map(jnp.add, total, (sums, params_gradient)), hidden_gradient

    sums = _zeros(sums_of, params, hidden_CBTD, others)
    total, hidden_gradient = jax.lax.scan(add, (sums, jax.tree.map(jnp.zeros_like, params)), (hidden_CBTD, others))
    return total[0], (total[1], hidden_gradient)


def _backward(sums_of: Any, gradients: Any, out_gradient: Any) -> Any:
    del sums_of
    scaled = jax.tree.map(lambda x: (x * out_gradient[0]).astype(x.dtype), gradients)
    return *scaled, None


_sum.defvjp(_forward, _backward)


def _zeros(sums_of: Any, params: Any, hidden_CBTD: Any, others: Any) -> Any:
    first = jax.tree.map(lambda x: x[0], (hidden_CBTD, others))
    shapes = jax.eval_shape(lambda hidden, rest: sums_of(params, hidden, *rest), *first)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
