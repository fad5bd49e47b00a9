"""Parameters of a model as plain arrays, with a second tree of the logical names of their axes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transformer.layers.runtime import named_axes
from transformer.types import Array, PyTree


def init_params(
    model: nn.Module, key: Array, *shapes: tuple[int, ...], method: str = "__call__"
) -> tuple[PyTree, PyTree]:
    """Initialise a model that reads tokens.

    Args:
        model: a `Decoder`, `Encoder` or `EncoderDecoder`.
        key: a PRNG key; equal keys give equal parameters for any input shapes. None returns shapes instead of arrays.
        *shapes: shapes of the model's token arrays; (1, 1) if none is given.
        method: a method of the model that uses all its parameters.

    Returns:
        The parameters as nested dictionaries of arrays (or, without a key, of `jax.ShapeDtypeStruct`). And the same tree with a
        `PartitionSpec` of logical names (`embed`, `heads`, `vocab`, ...) for each array.
    """
    return initialized(model, key, *(jnp.zeros(shape, jnp.int32) for shape in shapes or ((1, 1),)), method=method)


def initialized(model: nn.Module, key: Array, *inputs: PyTree, method: str = "__call__") -> tuple[PyTree, PyTree]:
    """`init_params` of any linen module; axis names come from its Flax partition metadata, and are empty without it.

    Args:
        model: the module.
        key: a PRNG key; None returns shapes instead of arrays.
        *inputs: the arguments of the model.
        method: a method of the model that uses all its parameters.
    """

    return made(initializer(model, *inputs, method=method), key)


def initializer(model: nn.Module, *inputs: PyTree, method: str = "__call__") -> Callable[[Array], PyTree]:
    """The compiled function of `initialized`, from a key to parameters; all calls of one such function trace the model once."""

    def init(key: Any) -> PyTree:
        return model.init(key, *jax.tree.map(jnp.asarray, inputs), method=method)["params"]

    return jax.jit(init)


def made(init: Callable[[Array], PyTree], key: Array) -> tuple[PyTree, PyTree]:
    """The result of `initialized` from its compiled function (`initializer`)."""
    with named_axes():
        boxed = jax.eval_shape(lambda: init(jax.random.key(0))) if key is None else init(key)
    params = nn.unbox(boxed)
    specs = nn.get_partition_spec(boxed)
    return params, jax.tree.map(_whole_spec, specs, params, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _whole_spec(spec: PartitionSpec, shape: Any) -> PartitionSpec:
    """The spec with one entry per axis, unless it is empty: metadata may leave out the last axes."""
    return PartitionSpec(*spec, *(None,) * (len(shape.shape) - len(spec))) if len(spec) else spec
