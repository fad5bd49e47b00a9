"""Routing, dispatch and the router's losses against loops over tokens and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.ops.experts import (
    expert_product,
    from_experts,
    route,
    routing_statistics,
    sort_by_expert,
    to_experts,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")
N, D, F, E = 9, 4, 6, 5


def make(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def softmax(x):
    exp = np.exp(np.asarray(x, np.float64))
    return exp / exp.sum(axis=-1, keepdims=True)


def mixture(tokens, logits, kernel, experts_per_token):
    """A matrix for each expert."""
    experts, weights = route(logits, experts_per_token)
    order, sizes = sort_by_expert(experts, len(kernel))
    return from_experts(
        expert_product(to_experts(tokens, order), kernel, sizes, tokens.dtype),
        order,
        weights,
    )


def dense(tokens, logits, kernel, experts_per_token):
    """Every expert works on every token; weights of the others are zero."""
    probabilities = jax.nn.softmax(logits)
    smallest = jnp.sort(probabilities, axis=1)[:, -experts_per_token][:, None]
    kept = jnp.where(probabilities >= smallest, probabilities, 0.0)
    kept = kept / kept.sum(axis=1, keepdims=True) if experts_per_token > 1 else kept
    return jnp.einsum("ne,nd,edf->nf", kept, tokens, kernel)


@pytest.mark.parametrize("experts_per_token", [1, 2, 3, 5])
def test_is_a_loop_over_tokens_and_their_experts(experts_per_token):
    tokens, logits, kernel = make(N, D), make(N, E, seed=1), make(E, D, F, seed=2)
    expected = np.zeros((N, F))
    for n in range(N):
        p = softmax(logits[n])
        best = sorted(range(E), key=lambda e: -p[e])[:experts_per_token]
        total = sum(p[e] for e in best) if experts_per_token > 1 else 1.0
        for e in best:
            expected[n] += p[e] / total * (np.asarray(tokens[n], np.float64) @ np.asarray(kernel[e], np.float64))
    out = jax.jit(mixture, static_argnums=3)(tokens, logits, kernel, experts_per_token)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_routing_by_hand():
    experts, weights = route(jnp.log(jnp.array([[0.5, 0.1, 0.4], [0.2, 0.7, 0.1]])), 2)
    assert experts.tolist() == [[0, 2], [1, 0]]
    np.testing.assert_allclose(weights, [[5 / 9, 4 / 9], [7 / 9, 2 / 9]], rtol=1e-6)
    _, shares = route(jnp.log(jnp.array([[0.5, 0.1, 0.4], [0.2, 0.7, 0.1]])), 2, normalize=False)
    np.testing.assert_allclose(shares, [[0.5, 0.4], [0.7, 0.2]], rtol=1e-6)
    # One expert keeps its probability, by which the router learns.
    np.testing.assert_allclose(route(jnp.log(jnp.array([[0.5, 0.1, 0.4]])), 1)[1], [[0.5]], rtol=1e-6)


def test_sorting_keeps_every_token_and_its_order():
    experts = jnp.array([[3, 0], [3, 1], [0, 3]])
    order, sizes = sort_by_expert(experts, 4)
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert sizes.tolist() == [2, 1, 0, 3]
    assert sizes.dtype == order.dtype == jnp.int32


def test_no_token_is_dropped_when_all_go_to_one_expert():
    tokens, kernel = make(N, D), make(E, D, F)
    logits = jnp.zeros((N, E)).at[:, 3].set(20.0)
    np.testing.assert_allclose(mixture(tokens, logits, kernel, 1), tokens @ kernel[3], atol=1e-5)
    assert sort_by_expert(route(logits, 1)[0], E)[1].tolist() == [0, 0, 0, N, 0]


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_gradients_agree_with_the_dense_formulation(experts_per_token):
    arguments, direction = (make(N, D), make(N, E, seed=1), make(E, D, F, seed=2)), make(N, F, seed=3)

    def gradient(function):
        return jax.jit(jax.grad(lambda *args: jnp.sum(function(*args, experts_per_token) * direction), (0, 1, 2)))

    for ours, expected in zip(gradient(mixture)(*arguments), gradient(dense)(*arguments), strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_bfloat16_rows_are_added_in_float32():
    tokens, logits, kernel = make(N, D), make(N, E, seed=1), make(E, D, F, seed=2)
    out = mixture(tokens.astype(jnp.bfloat16), logits, kernel.astype(jnp.bfloat16), 2)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), mixture(tokens, logits, kernel, 2), atol=0.05)
    same = jnp.full((64, 1), 1 / 64, jnp.bfloat16)
    ones = from_experts(same.at[0, 0].set(256.0), jnp.arange(64), jnp.ones((1, 64)))
    assert float(ones[0, 0]) == 256.0 and route(logits.astype(jnp.bfloat16), 2)[1].dtype == jnp.float32


@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_statistics_by_definition(experts_per_token, padded):
    logits = make(N, E)
    valid = np.arange(N) % 3 != 1 if padded else np.ones(N, bool)
    experts, _ = route(logits, experts_per_token)
    statistics = routing_statistics(logits, experts, jnp.asarray(valid) if padded else None)
    real = [n for n in range(N) if valid[n]]
    balance, shares = 0.0, []
    for e in range(E):
        shares.append(sum(e in experts[n].tolist() for n in real) / len(real) / experts_per_token)
        balance += E * shares[-1] * np.mean([softmax(logits[n])[e] for n in real])
    z = np.mean([np.log(np.exp(np.asarray(logits[n], np.float64)).sum()) ** 2 for n in real])
    np.testing.assert_allclose(statistics, [balance, z, max(shares)], rtol=1e-5)
    assert all(value.dtype == jnp.float32 and value.shape == () for value in statistics)


def test_padding_alone_has_no_loss_and_no_gradient():
    experts, _ = route(make(N, E), 2)

    def loss(logits):
        return sum(routing_statistics(logits, experts, jnp.zeros(N, bool))[:2])

    value, gradient = jax.value_and_grad(loss)(make(N, E))
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, 0)


def test_extremes_of_the_load_balance_loss():
    """1 where experts are alike, E where one gets everything."""
    alike = routing_statistics(jnp.zeros((E, E)), jnp.arange(E)[:, None])
    one = routing_statistics(jnp.zeros((N, E)).at[:, 2].set(50.0), jnp.full((N, 1), 2))
    np.testing.assert_allclose([alike.load_balance, alike.busiest_expert], [1, 1 / E], rtol=1e-6)
    np.testing.assert_allclose([one.load_balance, one.busiest_expert], [E, 1], rtol=1e-6)


def test_load_balance_pushes_away_from_the_busy_expert():
    logits = jnp.zeros((N, E))
    experts = jnp.where(jnp.arange(N) < 6, 1, 3)[:, None]
    gradient = jax.grad(lambda logits: routing_statistics(logits, experts).load_balance)(logits).sum(axis=0)
    assert gradient.argmax() == 1 and gradient[1] > gradient[3] > 0 > gradient[0]
