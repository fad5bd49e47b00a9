"""A mixture of experts is its experts, each a `FeedForward`, token by token; in a stack too, in every form."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.experts import MixtureOfExperts
from transformer.layers.feed_forward import FeedForward
from transformer.layers.runtime import Runtime, named_axes
from transformer.layers.scan_params import loop_params, scan_params
from transformer.layers.stack import Stack
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.experts import RoutingStatistics
from transformer.ops.masks import AttentionMask

pytestmark = pytest.mark.usefixtures("strict_dtypes")
E = 4


def config(**changes):
    return FeedForwardConfig(**{"hidden_dim": 12, "activation": "silu", "gated": True, "num_experts": E} | changes)


def alone(config):
    return FeedForward(dataclasses.replace(config, num_experts=0))


def all_experts(config, params, inputs):
    """What every expert says to every token, [E, ..., D]."""
    own = {role: params[role] for role in params if role != "router"}
    return jax.vmap(lambda p: alone(config).apply({"params": p}, inputs))(own)


def routing(layer, params, inputs, **kwargs):
    @jax.jit
    def call(params, inputs, kwargs):
        return layer.apply({"params": params}, inputs, mutable="routing", **kwargs)[1]

    variables = call(params, inputs, kwargs)
    return [s for s in jax.tree.leaves(variables, is_leaf=is_statistics) if is_statistics(s)]


def is_statistics(x):
    return isinstance(x, RoutingStatistics)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("experts_per_token", "normalize"), [(1, True), (2, True), (2, False)])
def test_is_its_experts_token_by_token(small, gated, experts_per_token, normalize):
    layer = MixtureOfExperts(config(gated=gated, experts_per_token=experts_per_token, normalize_experts=normalize))
    inputs = small.normal(2, 5, 8)
    params = small.random_params(layer, inputs)
    said = np.asarray(small.jit(functools.partial(all_experts, layer.config))(params, inputs))
    expected, busy = np.zeros(inputs.shape), set()
    for b in range(2):
        for t in range(5):
            p = np.exp(np.asarray(inputs[b, t] @ params["router"]["kernel"], np.float64))
            best = np.argsort(-p)[:experts_per_token]
            total = p[best].sum() if normalize and experts_per_token > 1 else p.sum()
            expected[b, t] = sum(p[e] / total * said[e, b, t] for e in best)
            busy |= set(best.tolist())
    assert len(busy) > 2
    np.testing.assert_allclose(small.apply(layer, params, inputs), expected, atol=1e-5)


def test_gradients_agree_with_the_dense_formulation(small):
    layer, inputs, direction = MixtureOfExperts(config()), small.normal(2, 5, 8), small.normal(2, 5, 8, seed=1)
    params = small.random_params(layer, inputs)

    def dense(params, inputs):
        p = jax.nn.softmax(inputs @ params["router"]["kernel"])
        kept = jnp.where(p >= jnp.sort(p)[..., -2:-1], p, 0.0)
        weights = kept / kept.sum(axis=-1, keepdims=True)
        return jnp.einsum("bte,ebtd->btd", weights, all_experts(layer.config, params, inputs))

    def gradient(function):
        return small.jit(jax.grad(lambda *args: jnp.sum(function(*args) * direction), (0, 1)))(params, inputs)

    ours, expected = gradient(lambda params, x: layer.apply({"params": params}, x)), gradient(dense)
    assert np.abs(expected[0]["router"]["kernel"]).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, expected)


@pytest.mark.parametrize("gated", [False, True])
def test_one_expert_is_a_plain_network(small, gated):
    one = config(gated=gated, num_experts=1, experts_per_token=1)
    layer, inputs = MixtureOfExperts(one), small.normal(2, 5, 8)
    params = small.random_params(layer, inputs)
    plain = {role: {"kernel": leaf["kernel"][0]} for role, leaf in params.items() if role != "router"}
    np.testing.assert_allclose(
        small.apply(layer, params, inputs), small.apply(alone(one), plain, inputs), rtol=1e-5, atol=1e-6
    )


def test_all_tokens_may_go_to_the_same_experts(small):
    layer, inputs = MixtureOfExperts(config()), jnp.abs(small.normal(2, 5, 8))
    params = small.random_params(layer, inputs)
    params["router"]["kernel"] = jnp.zeros((8, E)).at[:, 1].set(9.0).at[:, 3].set(9.0)
    said = small.jit(functools.partial(all_experts, layer.config))(params, inputs)
    np.testing.assert_allclose(small.apply(layer, params, inputs), (said[1] + said[3]) / 2, atol=1e-5)
    np.testing.assert_allclose(routing(layer, params, inputs)[0].busiest_expert, 0.5, rtol=1e-6)


def test_padding_counts_in_no_statistic_and_changes_no_token(small):
    layer, inputs = MixtureOfExperts(config()), small.normal(2, 5, 8)
    params = small.random_params(layer, inputs)
    valid = jnp.arange(5)[None] < jnp.array([[5], [2]])
    padded = jnp.where(valid[..., None], inputs, 7.0)
    real = inputs.reshape(10, 8)[np.flatnonzero(valid)][None]
    (expected,) = routing(layer, params, real)
    np.testing.assert_allclose(routing(layer, params, padded, valid_BT=valid)[0], expected, rtol=1e-5)
    assert np.abs(np.subtract(routing(layer, params, padded)[0], expected)).max() > 0.01
    out = small.apply(layer, params, padded)
    np.testing.assert_allclose(out[valid], small.apply(layer, params, real)[0], atol=1e-6)


def test_statistics_are_for_those_who_ask(small):
    layer, inputs = MixtureOfExperts(config()), small.normal(2, 5, 8)
    variables = jax.jit(layer.init)(jax.random.key(0), inputs)
    assert set(variables) == {"params"}
    assert jax.eval_shape(lambda: layer.apply(variables, inputs, mutable="routing"))[1].keys() == {"routing"}
    assert jax.eval_shape(lambda: layer.apply(variables, inputs)).shape == inputs.shape


def test_parameters_have_their_axes_and_scales(small):
    layer = MixtureOfExperts(config(hidden_dim=64), runtime=Runtime(residual_init_scale=0.5))
    with named_axes():
        params = jax.jit(layer.init)(jax.random.key(0, impl="unsafe_rbg"), small.normal(1, 2, 32))["params"]
    found = {role: (leaf["kernel"].value.shape, leaf["kernel"].names) for role, leaf in params.items()}
    assert found == {
        "router": ((32, E), ("embed", None)),
        "up": ((E, 32, 64), ("expert", "embed", "hidden")),
        "gate": ((E, 32, 64), ("expert", "embed", "hidden")),
        "down": ((E, 64, 32), ("expert", "hidden", "embed")),
    }
    for role, std in (("up", 32**-0.5), ("gate", 32**-0.5), ("down", 0.5 * 64**-0.5)):
        np.testing.assert_allclose(np.std(params[role]["kernel"].value), std, rtol=0.05)


def test_bfloat16_with_a_router_in_float32(small):
    inputs = small.normal(2, 5, 8).astype(jnp.bfloat16)
    params = small.random_params(MixtureOfExperts(config()), inputs)
    # Logits that bfloat16 cannot tell apart.
    params["router"]["kernel"] = jnp.zeros((8, E)).at[0].set(1.0 + 1e-3 * jnp.arange(E, dtype=jnp.float32))
    inputs = inputs.at[..., 0].set(1.0)
    out = small.apply(MixtureOfExperts(config(), runtime=Runtime(dtype=jnp.bfloat16)), params, inputs)
    assert out.dtype == jnp.bfloat16
    expected = small.apply(MixtureOfExperts(config()), params, inputs.astype(jnp.float32))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.1)


def test_one_network_and_a_mixture_refuse_each_other(small):
    with pytest.raises(ValueError, match="is one network, got num_experts=4; use MixtureOfExperts"):
        FeedForward(config()).init(jax.random.key(0), small.normal(1, 2, 8))
    with pytest.raises(ValueError, match="needs experts, got num_experts=0; FeedForward is one network"):
        MixtureOfExperts(config(num_experts=0)).init(jax.random.key(0), small.normal(1, 2, 8))


# ---- In a stack: every second block has experts --------------------------------------------------------------------

PATTERN = tuple(BlockConfig(AttentionConfig(num_heads=2), network) for network in (FeedForwardConfig(12), config()))
BASE = ModelConfig(num_layers=4, embed_dim=8, pattern=PATTERN)


def loss(config, params, inputs, weights):
    """A loss with the router's in it, and what was routed, layer by layer."""
    segments = jnp.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])
    (hidden, _), variables = Stack(config).apply(
        {"params": params}, inputs, mask=AttentionMask.packed(segments, causal=True), mutable="routing"
    )
    statistics = jax.tree.leaves(variables, is_leaf=is_statistics)
    layers = jax.tree.map(lambda *parts: jnp.concatenate([x.reshape(-1) for x in parts]), *statistics)
    return jnp.sum(weights * hidden) + jnp.sum(layers.load_balance + layers.router_z), (hidden, layers)


def graded(small, config, params):
    """(gradient, (hidden states, statistics)), compiled."""
    inputs, weights = small.normal(2, 5, 8), small.normal(2, 5, 8, seed=1)
    return small.jit(jax.grad(functools.partial(loss, config), has_aux=True))(params, inputs, weights)


@pytest.fixture(scope="module")
def looped(small):
    params = small.random_params(Stack(BASE), small.normal(2, 5, 8))
    return params, *graded(small, BASE, params)


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max())), actual, expected)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("scan", [False, True])
def test_scan_is_loop_and_remat_is_none(small, looped, scan, remat):
    params, gradient, aux = looped
    if (scan, remat) == (False, "none"):
        assert aux[1].load_balance.shape == (2,) and np.all(aux[1].load_balance > 0)
        assert np.abs(gradient["blocks"]["block_1"]["feed_forward"]["router"]["kernel"]).max() > 0.1
        return
    form = dataclasses.replace(BASE, scan_layers=scan, remat=remat)
    other, other_aux = graded(small, form, scan_params(params, 2) if scan else params)
    assert_close(other_aux, aux)
    assert_close(loop_params(other) if scan else other, gradient)


def primitives(jaxpr, counts):
    """How often each primitive stands in a jaxpr and all within it."""
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                primitives(getattr(inner, "jaxpr", inner), counts)
    return counts


@pytest.mark.parametrize("scan", [False, True])
def test_remat_recomputes_products_of_experts_only_when_full(small, scan):
    """Up, gate and down, once forward and twice backward; `full` repeats all but the last."""
    counts = {}
    for remat in ("none", "dots", "full"):
        form = dataclasses.replace(BASE, num_layers=2, remat=remat, scan_layers=scan)
        params = jax.eval_shape(Stack(form).init, jax.random.key(0), small.normal(2, 5, 8))["params"]
        gradient = jax.grad(functools.partial(loss, form), has_aux=True)
        jaxpr = jax.make_jaxpr(gradient)(params, small.normal(2, 5, 8), small.normal(2, 5, 8)).jaxpr
        counts[remat] = primitives(jaxpr, collections.Counter())["ragged_dot_general"]
    assert counts == {"none": 9, "dots": 9, "full": 12}
