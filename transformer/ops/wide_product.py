"""A float32 product of bfloat16 operands, as logits are, with the gradients of a bfloat16 one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: jax.lax.DotDimensionNumbers,
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """Stands in for `lax.dot_general` in dense layers: `wide_product` for bfloat16 operands and a float32 result.

    Like `ops.dense_cpu` it has no forward-mode derivative: a trainer injects it, and no layer has it by default.
    """
    (lhs_axes, rhs_axes), batch = dimension_numbers
    is_dense = (
        not any(batch)
        and tuple(lhs_axes) == tuple(range(lhs.ndim - len(lhs_axes), lhs.ndim))
        and tuple(rhs_axes) == tuple(range(len(rhs_axes)))
    )
    wide = lhs.dtype == rhs.dtype == jnp.bfloat16 and preferred_element_type == jnp.float32
    if is_dense and wide and precision is None:
        return wide_product(len(lhs_axes), lhs, rhs)
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_product(num_contracted: int, lhs: Float[Array, "..."], rhs: Float[Array, "..."]) -> Float[Array, "..."]:
    """Contract the last `num_contracted` axes of `lhs` with the first of `rhs`, in float32.

    The gradient of the result is rounded to bfloat16 before it is multiplied, as elsewhere in a bfloat16 model. JAX's own rule
    multiplies in float32, and makes the gradient of an output layer a float32 array of its whole size on every device. There
    is no forward-mode derivative.

    Args:
        num_contracted: how many axes.
        lhs: bfloat16, activations.
        rhs: bfloat16, a kernel.
    """
    return _contract(lhs, rhs, range(lhs.ndim - num_contracted, lhs.ndim), range(num_contracted), jnp.float32)


def _forward(num_contracted: int, lhs: Array, rhs: Array) -> tuple[Array, Any]:
    return wide_product(num_contracted, lhs, rhs), (lhs, rhs)


def _backward(num_contracted: int, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    lhs, rhs = operands
    gradient, leading = gradient.astype(lhs.dtype), lhs.ndim - num_contracted
    of_lhs = _contract(gradient, rhs, range(leading, gradient.ndim), range(num_contracted, rhs.ndim), lhs.dtype)
    return of_lhs, _contract(lhs, gradient, range(leading), range(leading), rhs.dtype)


wide_product.defvjp(_forward, _backward)


def _contract(left: Array, right: Array, left_axes: Any, right_axes: Any, dtype: Any) -> Array:
    dimensions = ((tuple(left_axes), tuple(right_axes)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=dtype)
