"""A step is the gradient of the mean loss, however its rows are cut, with keys of their own and an average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.training.state import create_state, evaluation_params
from transformer.training.step import EvaluateStep, TrainStep, update_ema

# "Updates" nothing and keeps the gradient as its state.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, _, p: (jax.tree.map(jnp.zeros_like, g), g)
)


def constant(_):
    return 0.5


def run(toy, batch, *, dropout=0.0, step_number=0, **options):
    step = TrainStep(toy.objective(dropout), KEEP_GRADIENT, constant, **options)
    state = create_state(toy.params(), KEEP_GRADIENT, jax.random.key(3))
    state = state._replace(step=jnp.int32(step_number))
    return jax.jit(step)(state, batch)


@pytest.mark.parametrize("accumulate_steps", [2, 4, 8])
def test_accumulation_is_the_big_batch(toy, accumulate_steps):
    """With rows of very different lengths: an average of averages would be far off."""
    batch = toy.batch()
    whole, statistics = run(toy, batch)
    parts, part_statistics = run(toy, batch, accumulate_steps=accumulate_steps)
    for a, b in zip(jax.tree.leaves(whole.opt_state), jax.tree.leaves(parts.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert set(statistics) == set(part_statistics)
    for name, value in statistics.items():
        np.testing.assert_allclose(value, part_statistics[name], rtol=1e-6)


def test_gradient_is_of_the_mean_over_valid_tokens(toy):
    batch = toy.batch()

    def mean(params):
        (loss, weight), _ = toy.objective().loss(params, (), batch, jax.random.key(0), True)
        return loss / weight

    expected = jax.grad(mean)(toy.params())
    state, statistics = run(toy, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), expected, state.opt_state)
    np.testing.assert_allclose(statistics["grad_norm"], optax.tree.norm(expected), rtol=1e-5)


def test_statistics_are_sums_and_say_the_learning_rate(toy):
    _, statistics = run(toy, toy.batch())
    (loss, weight), (_, own) = toy.objective().loss(toy.params(), (), toy.batch(), jax.random.key(0), True)
    assert float(statistics["weight"]) == float(weight) == float(np.sum(toy.batch().weights))
    np.testing.assert_allclose(statistics["loss"], loss, rtol=1e-6)
    assert float(statistics["correct"]) == float(own["correct"])
    assert float(statistics["learning_rate"]) == 0.5


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_batch_without_weight_gives_zero_gradient(toy, accumulate_steps):
    batch = toy.batch()._replace(weights=np.zeros((8, toy.T), np.float32))
    state, statistics = run(toy, batch, accumulate_steps=accumulate_steps)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(state.opt_state))
    assert float(statistics["grad_norm"]) == float(statistics["loss"]) == 0.0


def test_randomness_is_of_key_and_step(toy):
    losses = [float(run(toy, toy.batch(), dropout=0.5, step_number=n)[1]["loss"]) for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_micro_batches_have_their_own_randomness(toy):
    batch = jax.tree.map(lambda x: np.repeat(x[-1:], 2, axis=0), toy.batch())
    seen = []

    def record(params, carry, micro_batch, key, train):
        seen.append(key)
        return toy.objective(0.5).loss(params, carry, micro_batch, key, train)

    objective = toy.objective()._replace(loss=record)
    step = TrainStep(objective, KEEP_GRADIENT, constant, accumulate_steps=2)
    with jax.disable_jit():
        step(create_state(toy.params(), KEEP_GRADIENT, jax.random.key(3)), batch)
    keys = {tuple(jax.random.key_data(key).tolist()) for key in seen[-2:]}
    assert len(keys) == 2


def test_micro_batches_are_strided_and_carry_goes_with_its_rows(toy):
    """Row r is in micro-batch r % 2, and what it carries comes back in row r."""
    rows = []

    def loss(params, carry, batch, key, train):
        rows.append(batch)
        x = jnp.sum(params["w"] * batch)
        return (x, jnp.float32(batch.size)), (carry * 10 + batch, {})

    objective = toy.objective()._replace(loss=loss, weight=lambda batch: jnp.float32(batch.size))
    step = TrainStep(objective, optax.sgd(0.0), constant, accumulate_steps=2)
    params = {"w": jnp.ones(())}
    state = create_state(params, optax.sgd(0.0), jax.random.key(0), carry=jnp.arange(4.0))
    with jax.disable_jit():
        state, _ = step(state, jnp.arange(4.0))
    assert [r.tolist() for r in rows[-2:]] == [[0.0, 2.0], [1.0, 3.0]]
    assert state.carry.tolist() == [0.0, 11.0, 22.0, 33.0]


def test_ema_is_the_recurrence(toy):
    """By hand in float64, with the decay bounded by (1 + t) / (10 + t)."""
    optimizer = optax.sgd(0.5)
    # Donated, which fails if the average shares the buffers of the parameters it starts from.
    step = jax.jit(TrainStep(toy.objective(), optimizer, constant, ema_decay=0.3), donate_argnums=0)
    state = create_state(toy.params(), optimizer, jax.random.key(0), ema=True)
    average = np.asarray(state.params["block"]["up"]["kernel"], np.float64)
    for count in range(6):
        state, _ = step(state, toy.batch(count))
        decay = min(0.3, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * np.asarray(state.params["block"]["up"]["kernel"], np.float64)
        np.testing.assert_allclose(state.ema_params["block"]["up"]["kernel"], average, rtol=1e-5, atol=1e-6)
    assert evaluation_params(state) is state.ema_params
    assert int(state.step) == 6


def test_ema_of_constant_parameters_stays_to_the_bit(toy):
    params = toy.params()
    ema = update_ema(params, params, jnp.int32(100), 0.999)
    jax.tree.map(np.testing.assert_array_equal, ema, params)


def test_without_ema_parameters_are_scored(toy):
    state = create_state(toy.params(), optax.sgd(0.1), jax.random.key(0))
    assert evaluation_params(state) is state.params


def test_eval_step_has_no_dropout_and_sums(toy):
    evaluate = jax.jit(EvaluateStep(toy.objective(0.5)))
    halves = [jax.tree.map(lambda x, part=part: x[part::2], toy.batch()) for part in (0, 1)]
    _, whole = evaluate(toy.params(), (), toy.batch())
    parts = [evaluate(toy.params(), (), half)[1] for half in halves]
    for name, value in whole.items():
        np.testing.assert_allclose(value, sum(part[name] for part in parts), rtol=1e-6)
