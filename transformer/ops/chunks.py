"""Sums over the positions of rows, one chunk of each row at a time, with the gradient computed in the same pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.types import PyTree


def sum_over_chunks(
    sums_of: Callable[..., tuple[Array, Any]],
    params: PyTree,
    hidden_BTD: Float[Array, "B T D"],
    others: tuple[Array, ...],
    num_chunks: int,
) -> tuple[Float[Array, ""], Any]:
    """`sums_of(params, hidden_BTD, *others)` with the memory of one of `num_chunks` chunks of T.

    The gradient of each chunk is computed with the chunk's sum. Large arrays inside (such as logits) are therefore neither kept
    nor computed twice. Position t belongs to chunk t % num_chunks: where T is sharded over devices, every chunk is too.

    Args:
        sums_of: returns a scalar, the differentiated sum, and other sums, which have no gradient.
        params: a pytree of arrays; each chunk adds to its gradient.
        hidden_BTD: the hidden states.
        others: further arrays [B, T], without a gradient; zeros at the positions that fill up the last chunk.
        num_chunks: number of chunks.
    """
    num_chunks = min(num_chunks, hidden_BTD.shape[1])  # at least one position per chunk
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
