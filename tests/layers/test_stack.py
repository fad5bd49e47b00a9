"""A stack is the same as a loop, as a scan and with rematerialisation, in values and gradients."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.cache import NO_CACHE
from transformer.layers.runtime import Runtime, named_axes
from transformer.layers.scan_params import loop_params, scan_params
from transformer.layers.stack import Stack, init_stack_cache
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops import dense_cpu
from transformer.ops.masks import AttentionMask
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.learned import LearnedPositions

pytestmark = pytest.mark.usefixtures("strict_dtypes")
GLOBAL = BlockConfig(attention=AttentionConfig(num_heads=2))
LOCAL = BlockConfig(attention=AttentionConfig(num_heads=2, num_kv_heads=1, window=2), norm=RMSNorm())
PATTERNS = {1: (GLOBAL,), 2: (LOCAL, GLOBAL)}


def config(pattern=1, **changes):
    return ModelConfig(**{"num_layers": 4, "embed_dim": 8, "pattern": PATTERNS[pattern]} | changes)


@functools.cache
def context():
    rng = np.random.default_rng(0)
    inputs, weights = (jnp.asarray(rng.standard_normal((2, 5, 8)), jnp.float32) for _ in range(2))
    segments = jnp.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])
    return inputs, weights, AttentionMask.packed(segments, causal=True)


def loss(config, params, dot_general=jax.lax.dot_general, **kwargs):
    inputs, weights, mask = context()
    runtime = Runtime(dot_general=dot_general).of(config)
    hidden, _ = Stack(config, runtime=runtime).apply({"params": params}, inputs, mask=mask, **kwargs)
    return (weights * hidden).sum(), hidden


def graded(small, config, params):
    """(gradient, hidden states), compiled."""
    return small.jit(jax.grad(functools.partial(loss, config), has_aux=True))(params)


@pytest.fixture(scope="module")
def looped(small):
    """A looped stack of two kinds of blocks: config, parameters, gradient, hidden states."""
    base = config(2)
    params = small.random_params(Stack(base), context()[0])
    return base, params, *graded(small, base, params)


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), actual, expected)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "offload"])
def test_scan_is_loop(small, looped, remat):
    base, params, gradient, hidden = looped
    scanned = dataclasses.replace(base, scan_layers=True, remat=remat)
    scan_gradient, scan_hidden = graded(small, scanned, scan_params(params, len(base.pattern)))
    assert_close(scan_hidden, hidden)
    assert_close(loop_params(scan_gradient), gradient)


def test_scan_is_loop_for_equal_blocks(small):
    base = config(num_layers=2)
    params = small.random_params(Stack(base), context()[0])
    gradient, hidden = graded(small, base, params)
    scan_gradient, scan_hidden = graded(small, dataclasses.replace(base, scan_layers=True), scan_params(params))
    assert_close(scan_hidden, hidden)
    assert_close(loop_params(scan_gradient), gradient)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_is_none(small, looped, remat):
    base, params, gradient, hidden = looped
    remat_gradient, remat_hidden = graded(small, dataclasses.replace(base, remat=remat), params)
    assert_close(remat_hidden, hidden)
    assert_close(remat_gradient, gradient)


def primitives(jaxpr, counts=None):
    """How often each primitive stands in a jaxpr and all within it."""
    counts = collections.Counter() if counts is None else counts
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                primitives(getattr(inner, "jaxpr", inner), counts)
    return counts


@pytest.mark.parametrize("dot_general", [jax.lax.dot_general, dense_cpu.dot_general], ids=["lax", "dense_cpu"])
@pytest.mark.parametrize("scan", [False, True])
def test_remat_recomputes(small, scan, dot_general):
    """Products in the program of the gradient: `full` repeats all products of the forward pass, `dots` only attention's."""
    counts = {}
    for remat in ("none", "dots", "full"):
        base = config(remat=remat, scan_layers=scan)
        params = small.random_params(Stack(base), context()[0])
        gradient = jax.grad(functools.partial(loss, base, dot_general=dot_general), has_aux=True)
        counts[remat] = primitives(jax.make_jaxpr(gradient)(params).jaxpr)
    blocks = 1 if scan else 4
    forward = {remat: count["dot_general"] / blocks for remat, count in counts.items()}
    # Query, key, value, two of attention, out, up, down; each once forward and twice backward. Products of `dense_cpu` have
    # the gradient of the weights once for each platform.
    once = 3 * 8 + (6 if dot_general is dense_cpu.dot_general else 0)
    assert forward["none"] == once
    assert forward["dots"] == once + 2
    # The last product of a block, down, is not needed again.
    assert forward["full"] == once + 7


def test_remat_survives_compilation(small):
    """XLA must not merge the recomputation with the first pass: the program holds every repeated product."""
    products = {}
    for remat in ("none", "full"):
        base = config(remat=remat, num_layers=2)
        params = small.random_params(Stack(base), context()[0])
        gradient = jax.jit(jax.grad(functools.partial(loss, base), has_aux=True))
        products[remat] = gradient.lower(params).compile().as_text().count(" dot(")
    assert products["full"] == products["none"] + 2 * 7


@pytest.mark.parametrize("scan", [False, True])
def test_layers_drop_differently(small, scan):
    adds_one = dataclasses.replace(GLOBAL, feed_forward=FeedForwardConfig(use_bias=True))
    base = config(num_layers=2, dropout=0.5, scan_layers=scan, final_norm=False)
    base = dataclasses.replace(base, pattern=(adds_one,))
    inputs = jnp.zeros((1, 32, 8))
    params = jax.tree.map(jnp.zeros_like, small.random_params(Stack(base), inputs))
    for block in params["blocks"].values():
        block["feed_forward"]["down"]["bias"] += 1.0
    hidden, _ = small.apply(Stack(base), params, inputs, train=True, rngs={"dropout": jax.random.key(0)})
    # Each layer adds 0 or 2: with one key for both, nothing would add up to 2.
    assert np.unique(hidden).tolist() == [0, 2, 4]


def test_initial_scale_of_residual_outputs():
    base = ModelConfig(num_layers=8, embed_dim=64, scan_layers=True)
    with named_axes():
        params = jax.jit(Stack(base).init)(jax.random.key(0, impl="unsafe_rbg"), jnp.ones((1, 2, 64)))["params"]
    blocks = params["blocks"]["block_0"]
    np.testing.assert_allclose(np.std(blocks["attention"]["out"]["kernel"].value), 0.02 / math.sqrt(16), rtol=0.05)
    assert blocks["attention"]["out"]["kernel"].names == ("layers", "heads", "head_dim", "embed")


@pytest.mark.parametrize("scan", [False, True])
def test_cache_of_a_pattern(scan):
    base = config(2, scan_layers=scan)
    cache = init_stack_cache(base, 3, 7, cross_attention=True)
    assert len(cache) == (2 if scan else 4)
    elements = [3 * 7 * 1 * 4, 3 * 7 * 2 * 4] * (1 if scan else 2)
    assert [block.attention.key_BGPK.size for block in cache] == [n * (2 if scan else 1) for n in elements]
    assert all(block.cross_attention.key_BSGK.shape[-3] == 0 for block in cache)
    assert init_stack_cache(base, 3, 7)[0].cross_attention == NO_CACHE


def test_learned_positions_bound_the_cache():
    base = config(positions=LearnedPositions(), max_length=6)
    with pytest.raises(ValueError, match="Learned positions reach max_length=6 tokens, got 7"):
        init_stack_cache(base, 1, 7)


def test_offloaded_products_wait_in_the_memory_of_the_host(small):
    base = config(num_layers=4, scan_layers=True)
    params = small.random_params(Stack(base), context()[0])

    def text(remat):
        model = Stack(dataclasses.replace(base, remat=remat))
        return str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, context()[0])[0])))(params))

    assert "pinned_host" in text("offload") or "<host>" in text("offload")
    assert "host" not in text("dots")
