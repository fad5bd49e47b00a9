"""The traffic that is read from compiled programs is what can be counted by hand."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from transformer.planning.chips import find_topology
from transformer.planning.program import read_program

PLUGIN = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
N = 1024
MATRIX = jax.ShapeDtypeStruct((N, N), jnp.float32)
X = N * N * 4
"""Bytes of the matrix."""
STACK = jax.ShapeDtypeStruct((16, N, N), jnp.float32)
TABLE, IDS = jax.ShapeDtypeStruct((64 * N, 256), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.int32)
WIDE = jax.ShapeDtypeStruct((N, 4 * N), jnp.float32)


def loop(x):
    return jax.lax.fori_loop(0, 10, lambda i, total: total + jnp.max(x * i), 0.0)


def update_in_place(stack, new):
    def body(i, stack):
        return jax.lax.dynamic_update_index_in_dim(stack, new * i, i, 0)

    return jax.lax.fori_loop(0, 16, body, stack)


PROGRAMS = {
    "an elementwise operation reads two arrays and writes one": (jnp.add, (MATRIX, MATRIX), (), 3 * X),
    "a product too": (jnp.dot, (MATRIX, MATRIX), (), 3 * X),
    "a loop reads its array each time": (loop, (MATRIX,), (), 10 * X),
    "an update in place writes the slice": (update_in_place, (STACK, MATRIX), (0,), 16 * 2 * X),
    "of a table the rows that are looked up are read": (
        lambda table, ids: jnp.take(table * 2, ids, axis=0, mode="clip"),
        (TABLE, IDS),
        (),
        2 * 128 * 256 * 4,
    ),
    "of an array a part is read": (lambda x: x[:, :N] + x[:, 3 * N :], (WIDE,), (), 3 * X),
    "a reduction writes little": (lambda x: jnp.max(x, axis=1), (MATRIX,), (), X),
}


def traffic(name, device=None):
    function, shapes, donated, _ = PROGRAMS[name]
    place = device and jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
    return read_program(jax.jit(function, donate_argnums=donated).lower(*arguments).compile().as_text()).traffic_bytes


@pytest.mark.parametrize("name", PROGRAMS)
def test_traffic_of_a_cpu_is_that_by_hand(name):
    assert traffic(name) == pytest.approx(PROGRAMS[name][-1], rel=0.02)


@functools.cache
def device(topology):
    return find_topology(topology).devices[0]


@pytest.mark.gpu
@pytest.mark.skipif(not PLUGIN, reason="needs JAX's CUDA plugin")
@pytest.mark.parametrize("name", PROGRAMS)
def test_traffic_of_a_gpu_is_that_by_hand(name):
    assert traffic(name, device("h100:1")) == pytest.approx(PROGRAMS[name][-1], rel=0.02)
