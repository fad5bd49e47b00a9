"""What experts add to an objective: two losses in what is minimised, and additive statistics; nothing to the scores."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.layers.scan_params import scan_params
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.models.classifier import Classifier
from transformer.models.decoder import Decoder
from transformer.models.encoder import Encoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.objective import OBJECTIVES
from transformer.objectives.next_token import NextToken
from transformer.objectives.routing import add_routing
from transformer.ops.experts import RoutingStatistics
from transformer.training.metrics import derive
from transformer.training.state import create_state
from transformer.training.step import TrainStep
from transformer.types import Batch, LabelledBatch, PairBatch

PLAIN, EXPERTS = FeedForwardConfig(12), FeedForwardConfig(12, num_experts=4)
# Every token of masked_lm may be hidden.
WEIGHTS = NextToken(load_balance=0.5, router_z=0.25)
OFF = dataclasses.replace(WEIGHTS, load_balance=0.0, router_z=0.0)
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, _, p: (jax.tree.map(jnp.zeros_like, g), g)
)


def jit(function):
    """`jax.jit` that compiles in half the time, to slower code."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def model_config(networks=(EXPERTS,), **changes):
    pattern = tuple(BlockConfig(AttentionConfig(num_heads=2), network) for network in networks)
    sizes = {"vocab_size": 7, "max_length": 6, "num_layers": len(networks), "embed_dim": 8, "init_std": 0.7}
    return ModelConfig(**{**sizes, "pattern": pattern, **changes})


def make_batch():
    generator = np.random.default_rng(1)
    inputs, targets = (jnp.asarray(generator.integers(0, 7, (4, 6)), jnp.int32) for _ in range(2))
    valid = np.arange(6)[None] < np.array([[6], [2], [5], [1]])
    segments = jnp.asarray(valid, jnp.int32)
    return Batch(
        inputs,
        targets,
        jnp.asarray(valid, jnp.float32),
        segments,
        jnp.tile(jnp.arange(6, dtype=jnp.int32)[None], (4, 1)),
    )


@functools.cache
def make(kind, weights, networks=(EXPERTS,)):
    """(objective, parameters, batch)."""
    batch, decoder = make_batch(), model_config(networks)
    match kind:
        case "next_token":
            model = Decoder(decoder)
        case "prefix_lm":
            model = Decoder(decoder, bidirectional_prefix=True)
        case "masked_lm":
            model = Encoder(decoder)
        case "classification":
            model = Classifier(decoder, num_classes=3)
            batch = LabelledBatch(batch.inputs, batch.segment_ids, batch.inputs[:, 0] % 3, jnp.ones(4))
        case "seq2seq":
            model = EncoderDecoder(decoder)
            batch = PairBatch(
                batch.targets, batch.segment_ids, batch.inputs, batch.targets, batch.weights, batch.segment_ids
            )
    tokens = (batch.inputs[:1],) * (2 if kind == "seq2seq" else 1)
    method = "logits" if kind == "masked_lm" else "__call__"
    params = jit(lambda key: model.init(key, *tokens, method=method)["params"])(jax.random.key(0))
    vocabulary = SimpleNamespace(vocab_size=6, token_bytes=np.ones(7, np.int32))
    rates = {"mask_rate": 0.99} if kind == "masked_lm" else {}
    config = OBJECTIVES.find(kind)(load_balance=weights.load_balance, router_z=weights.router_z, **rates)
    return config.bind(model, vocabulary), params, batch


def statistics_of(objective, params, batch, train=False):
    (loss_sum, weight), (_, statistics) = jit(
        lambda params, batch: objective.loss(params, (), batch, jax.random.key(0), train)
    )(params, batch)
    assert float(loss_sum) == float(statistics["objective"])
    assert float(weight) == float(objective.weight(batch))
    return statistics


@pytest.mark.parametrize("kind", ["next_token", "prefix_lm", "masked_lm", "classification", "seq2seq"])
def test_every_objective_has_the_losses_in_what_it_minimises_only(kind):
    statistics = statistics_of(*make(kind, WEIGHTS))
    mixtures = 2 if kind == "seq2seq" else 1
    penalty = mixtures * (0.5 * statistics["load_balance"] + 0.25 * statistics["router_z"])
    np.testing.assert_allclose(statistics["objective"] - statistics["loss"], penalty, rtol=1e-4)
    metrics = derive({name: float(value) for name, value in statistics.items() if np.ndim(value) == 0})
    assert 1 <= 4 * metrics["busiest_expert"] <= 4 and metrics["load_balance"] > 0.9 and metrics["router_z"] > 0
    assert metrics["objective"] > metrics["loss"]


def test_weights_of_zero_leave_the_loss_and_no_experts_leave_nothing():
    on, off = (statistics_of(*make("next_token", weights)) for weights in (WEIGHTS, OFF))
    assert float(off["objective"]) == float(off["loss"]) == float(on["loss"])
    plain = statistics_of(*make("next_token", WEIGHTS, networks=(PLAIN,)))
    assert set(off) - set(plain) == set(RoutingStatistics._fields)
    assert float(plain["objective"]) == float(plain["loss"])


def by_hand(model, params, batch):
    """The two losses of each of two mixtures, from the inputs of their routers, over tokens that are no padding."""
    losses = []

    def captured(params):
        return model.apply(
            {"params": params},
            batch.inputs,
            positions_BT=batch.positions,
            segment_ids_BT=batch.segment_ids,
            capture_intermediates=lambda module, _: module.name == "router",
        )[1]["intermediates"]

    for logits in jax.tree.leaves(jit(captured)(params)):
        real = np.asarray(logits, np.float64)[np.asarray(batch.segment_ids) > 0]
        p = np.exp(real) / np.exp(real).sum(axis=1, keepdims=True)
        chosen = np.argsort(-p, axis=1)[:, :2]
        share = np.array([(chosen == e).mean() for e in range(4)])
        losses.append((4 * (share * p.mean(axis=0)).sum(), (np.log(np.exp(real).sum(axis=1)) ** 2).mean()))
    return np.array(losses)


def test_losses_are_summed_over_layers_and_statistics_are_their_mean():
    objective, params, batch = make("next_token", WEIGHTS, networks=(EXPERTS, EXPERTS))
    statistics = statistics_of(objective, params, batch)
    losses = by_hand(Decoder(model_config((EXPERTS, EXPERTS))), params, batch)
    assert losses.shape == (2, 2)
    weight = float(statistics["weight"])
    np.testing.assert_allclose(
        [statistics["load_balance"], statistics["router_z"]], weight * losses.mean(axis=0), rtol=1e-5
    )
    penalty = weight * (losses.sum(axis=0) @ [0.5, 0.25])
    np.testing.assert_allclose(statistics["objective"] - statistics["loss"], penalty, rtol=1e-4)


def test_padding_leaves_no_trace():
    objective, params, batch = make("next_token", WEIGHTS)
    gradient = jit(jax.grad(lambda params, batch: objective.loss(params, (), batch, jax.random.key(0), True)[0][0]))
    inputs = jnp.where(batch.segment_ids > 0, batch.inputs, (batch.inputs + 3) % 7)
    assert not np.array_equal(inputs, batch.inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        gradient(params, batch._replace(inputs=inputs)),
        gradient(params, batch),
    )


def test_scan_is_loop():
    objective, params, batch = make("next_token", WEIGHTS, networks=(EXPERTS, EXPERTS))
    scanned = Decoder(model_config((EXPERTS,), num_layers=2, scan_layers=True, remat="full"))
    expected = statistics_of(objective, params, batch, train=True)
    again = WEIGHTS.bind(scanned, SimpleNamespace(token_bytes=np.ones(7, np.int32)))
    statistics = statistics_of(again, scan_params(params), batch, train=True)
    assert set(statistics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(statistics[name], value, rtol=1e-5)


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_gradient_has_the_mean_over_micro_batches_by_weight(accumulate_steps):
    """Micro-batches of 11 and of 3 targets: each has its own losses, which count by as much."""
    objective, params, batch = make("next_token", WEIGHTS)
    step = TrainStep(objective, KEEP_GRADIENT, lambda _: 0.0, accumulate_steps=accumulate_steps)
    state, statistics = jit(step)(create_state(params, KEEP_GRADIENT, jax.random.key(3)), batch)
    parts = [jax.tree.map(lambda x, i=i: x[i::accumulate_steps], batch) for i in range(accumulate_steps)]
    model = Decoder(model_config())

    def mean_loss(params):
        total = 0.0
        for part in parts:
            plain = OFF.bind(model, SimpleNamespace(token_bytes=np.ones(7, np.int32)))
            (loss_sum, weight), _ = plain.loss(params, (), part, jax.random.key(0), True)
            _, variables = model.apply(
                {"params": params},
                part.inputs,
                positions_BT=part.positions,
                segment_ids_BT=part.segment_ids,
                mutable="routing",
            )
            (routed,) = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, RoutingStatistics))
            total += loss_sum + weight * (0.5 * routed.load_balance + 0.25 * routed.router_z)
        return total / jnp.sum(batch.weights)

    value, gradient = jit(jax.value_and_grad(mean_loss))(params)
    np.testing.assert_allclose(statistics["objective"] / statistics["weight"], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.opt_state, gradient)
    router = gradient["decoder"]["blocks"]["block_0"]["feed_forward"]["router"]["kernel"]
    assert np.abs(router).max() > 1e-2


def test_nothing_but_padding_is_zero():
    objective, params, batch = make("next_token", WEIGHTS)
    batch = batch._replace(weights=jnp.zeros((4, 6)), segment_ids=jnp.zeros((4, 6), jnp.int32))
    statistics = statistics_of(objective, params, batch)
    assert all(float(value) == 0.0 for value in statistics.values())


def test_the_penalty_goes_with_the_weight_that_the_objective_is_divided_by():
    """Class weights change that sum; the losses of routers follow it, and their statistics the plain weight."""
    routed = RoutingStatistics(jnp.float32([3.0, 1.0]), jnp.float32([2.0, 6.0]), jnp.float32([0.5, 0.25]))
    given = {"objective": 10.0, "weight": 4.0, "objective_weight": 7.0}
    found = add_routing(given, {"routing": routed}, WEIGHTS)
    np.testing.assert_allclose(found["objective"], 10 + 7 * (0.5 * 4 + 0.25 * 8))
    np.testing.assert_allclose([found["load_balance"], found["router_z"], found["busiest_expert"]], [8, 16, 1.5])
