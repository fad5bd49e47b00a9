"""Random parameters for a layer, and the layer compiled."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_params(layer, *args, **kwargs):
    """Parameters large enough that every part matters (fresh biases are zeros, fresh scales ones)."""
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), *args, **kwargs))
    generator = np.random.default_rng(1)

    def draw(path, leaf):
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(center + 0.3 * generator.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes.get("params", {}))


def jit(function):
    """`jax.jit` that compiles in half the time, to slower code."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def apply(layer, params, *args, rngs=None, **kwargs):
    """The layer's compiled output; what is not an array is closed over."""
    return jit(lambda params, args: layer.apply({"params": params}, *args, rngs=rngs, **kwargs))(params, args)


@pytest.fixture(scope="session")
def small():
    """The helpers of this file."""
    return types.SimpleNamespace(normal=normal, random_params=random_params, jit=jit, apply=apply)
