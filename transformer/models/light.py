"""A model's parameters with lighter matrices, to be used and not trained: in bfloat16, or quantized to 8 bits."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from transformer.layers.embedding import Embed
from transformer.layers.experts import ExpertKernel
from transformer.layers.linear import Linear
from transformer.model_config import Weights
from transformer.ops.quantized import quantize
from transformer.types import PyTree


def light_params(params: PyTree, trace: Callable[[], object], weights: Weights) -> PyTree:
    """Parameters with which the model computes nearly the same from less memory.

    The kernels of linear layers and experts, and the tables of tokens, become bfloat16 or `Quantized`, with a scale for each
    output (of a table, for each token). Activations keep their type: each product converts its kernel. Norms, biases, positions,
    adapters, routers, and kernels of one output stay as they are.

    Args:
        params: of a model of the package, of looped or scanned layers.
        trace: initialises or calls the model, with shapes alone: it shows which axes each kernel contracts.
        weights: the type.
    """
    if weights == "":
        return params
    contracted: dict[tuple[str, ...], tuple[int, ...]] = {}

    def look(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name == "__call__" and (axes := _contracted(module)):
            contracted[*module.path, "embedding" if isinstance(module, Embed) else "kernel"] = axes
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        trace()
    flat: Any = flatten_dict(params)
    light = {path: _lighten(flat[path], axes=axes, weights=weights) for path, axes in contracted.items()}
    return unflatten_dict({**flat, **light})


@functools.partial(jax.jit, static_argnames=("axes", "weights"))
def _lighten(kernel: Any, *, axes: tuple[int, ...], weights: Weights) -> Any:
    return quantize(kernel, axes) if weights == "int8" else kernel.astype(jnp.bfloat16)


def _contracted(module: nn.Module) -> tuple[int, ...]:
    """Axes that products with a module's matrix contract, counted from the last (scanned layers are first); none if it stays."""
    if isinstance(module, Linear):
        stays = module.path[-1] == "router" or module.features == (1,)
        return () if stays else tuple(range(-len(module.axes), -len(module.features)))
    if isinstance(module, ExpertKernel):
        return (-2,)
    return (-1,) if isinstance(module, Embed) and module.axis is not None else ()
