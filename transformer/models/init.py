"""Parameters of a model as plain arrays, and the logical names of their axes as a tree beside them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transformer.layers.runtime import named_axes
from transformer.types import PyTree


def init_params(
    model: nn.Module, key: Any, *shapes: tuple[int, ...], method: str = "__call__"
) -> tuple[PyTree, PyTree]:
    """Initialise a model that reads tokens.

    Args:
        model: a `Decoder`, `Encoder` or `EncoderDecoder`.
        key: a PRNG key; the same key gives the same parameters, whatever the shapes. None gives their shapes alone.
        *shapes: the shape of each token array that the model reads, (1, 1) if none is given.
        method: of the model, one that uses all its parameters.

    Returns:
        The parameters (or, without a key, a `jax.ShapeDtypeStruct` for each), nested dictionaries of arrays, and the same
        tree with a `PartitionSpec` of logical names (`embed`, `heads`, `vocab`, ...) in the place of each array.
    """
    return initialized(model, key, *(jnp.zeros(shape, jnp.int32) for shape in shapes or ((1, 1),)), method=method)


def initialized(model: nn.Module, key: Any, *inputs: Any, method: str = "__call__") -> tuple[PyTree, PyTree]:
    """`init_params` of any linen module: of one's own, names are those of its Flax partition metadata, none where there is none.

    Args:
        model: the module.
        key: a PRNG key; None gives shapes alone.
        *inputs: what the model is called with.
        method: of the model, one that uses all its parameters.
    """

    def init(key: Any) -> PyTree:
        return model.init(key, *jax.tree.map(jnp.asarray, inputs), method=method)["params"]

    with named_axes():
        boxed = jax.eval_shape(lambda: init(jax.random.key(0)))
    params = nn.unbox(boxed) if key is None else nn.unbox(jax.jit(init)(key))
    specs = nn.get_partition_spec(boxed)
    return params, jax.tree.map(_whole_spec, specs, nn.unbox(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))


def _whole_spec(spec: PartitionSpec, shape: Any) -> PartitionSpec:
    """With a name or None for every axis, where there is any: the last ones may be left out."""
    return PartitionSpec(*spec, *(None,) * (len(shape.shape) - len(spec))) if len(spec) else spec
