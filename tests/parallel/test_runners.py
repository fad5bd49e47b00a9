"""One step, three ways to run it: one device, a mesh of eight, pmap over eight."""

import functools
import re
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.objectives.next_token import NextToken
from transformer.optimizers.adamw import AdamW
from transformer.parallel.mesh import MeshRunner, make_mesh
from transformer.parallel.pmap import AXIS_NAME, PmapRunner, replicate, unreplicate
from transformer.parallel.runner import check_divisible, choose_devices
from transformer.schedules.constant import ConstantSchedule
from transformer.training.checkpoint import Checkpointer
from transformer.training.optimizer import make_optimizer
from transformer.training.state import create_state
from transformer.training.step import EvaluateStep, TrainStep
from transformer.types import Batch, UserError

ROWS, T, V = 16, 8, 13
RUNNERS = ["one", "mesh", "pmap"]


@functools.cache
def model_and_params(memory_length=0, num_experts=0):
    block = BlockConfig(AttentionConfig(num_heads=2), FeedForwardConfig(hidden_dim=16, num_experts=num_experts))
    sizes = {"vocab_size": V, "max_length": T, "num_layers": 1, "embed_dim": 8, "memory_length": memory_length}
    model = Decoder(ModelConfig(**sizes, pattern=(block,)))
    return model, init_params(model, jax.random.key(0))[0]


@functools.cache
def make_runner(kind, accumulate_steps=2, memory_length=0, num_experts=0):
    """The runner and the state before the first step; Adam with an eps that hides no rounding (DESIGN: "equal")."""
    model, params = model_and_params(memory_length, num_experts)
    config = AdamW(learning_rate=0.05, schedule=ConstantSchedule(), eps=1e-3, accumulate_steps=accumulate_steps)
    optimizer, schedule = make_optimizer(config, 10, params)
    objective = NextToken(z_loss=1e-3).bind(model, SimpleNamespace(token_bytes=np.ones(V, np.int32)))
    axis_name = AXIS_NAME if kind == "pmap" else None
    step = TrainStep(
        objective, optimizer, schedule, accumulate_steps=accumulate_steps, ema_decay=0.9, axis_name=axis_name
    )
    evaluate = EvaluateStep(objective, axis_name=axis_name)
    runner = (
        PmapRunner(0, step, evaluate)
        if kind == "pmap"
        else MeshRunner(make_mesh(1 if kind == "one" else 0), step, evaluate)
    )
    return runner, create_state(params, optimizer, jax.random.key(1), carry=objective.init_carry(ROWS), ema=True)


def make_batch(seed=0, rows=ROWS):
    """Rows of very different lengths, so that devices and micro-batches weigh unequally."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (rows, T + 1)).astype(np.int32)
    valid = np.arange(T)[None] < rng.integers(0, T + 1, (rows, 1))
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=valid.astype(np.float32),
        segment_ids=valid.astype(np.int32),
        positions=np.tile(np.arange(T, dtype=np.int32), (rows, 1)),
    )


def continued_batch(count):
    """Rows without padding, of which half go on with a document."""
    batch = make_batch(count)
    positions = batch.positions + np.where(np.arange(ROWS) % 2 == 0, count * T, 0)[:, None]
    ones = np.ones_like(batch.segment_ids)
    return batch._replace(weights=ones.astype(np.float32), segment_ids=ones, positions=positions.astype(np.int32))


@functools.cache
def trained(kind, steps=3, memory_length=0, accumulate_steps=2, num_experts=0):
    runner, state = make_runner(kind, accumulate_steps, memory_length, num_experts)
    state = runner.place_state(state)
    rows = []
    for count in range(steps):
        batch = continued_batch(count) if memory_length else make_batch(count)
        state, statistics = runner.step(state, runner.place_batch(batch))
        rows.append(jax.device_get(statistics))
    return jax.device_get(runner.fetch_state(state)._replace(key=())), rows


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


@pytest.mark.parametrize("kind", ["mesh", "pmap"])
def test_equals_one_device(kind):
    state, rows = trained(kind)
    expected_state, expected_rows = trained("one")
    assert_close(state, expected_state)
    assert_close(rows, expected_rows)
    assert int(state.step) == 3
    start = model_and_params()[1]["token_embedding"]["embedding"]
    assert np.max(np.abs(state.params["token_embedding"]["embedding"] - start)) > 0.01


def test_experts_over_a_mesh_equal_one_device():
    """With the losses of routers, which are of a whole micro-batch there; under pmap each device has its own."""
    state, rows = trained("mesh", steps=2, num_experts=3)
    expected_state, expected_rows = trained("one", steps=2, num_experts=3)
    assert_close(state, expected_state)
    assert_close(rows, expected_rows)
    assert rows[0]["load_balance"] > 0 and rows[0]["objective"] > rows[0]["loss"]


@pytest.mark.parametrize("kind", ["mesh", "pmap"])
def test_a_memory_equals_one_device_in_one_micro_batch(kind):
    state, rows = trained(kind, memory_length=5)
    expected_state, expected_rows = trained("one", memory_length=5, accumulate_steps=1)
    assert_close(state, expected_state)
    assert_close(rows, expected_rows)
    memory = state.carry["recurrence_BLPD"]
    embedded = expected_state.params["token_embedding"]["embedding"][continued_batch(2).inputs[:, -5:]]
    # Of the parameters before the last step, row by row.
    assert memory.shape == (ROWS, 1, 5, 8)
    assert np.abs(memory[:, 0] - embedded).max() < 0.2 < np.abs(memory[::-1, 0] - embedded).max()


@pytest.mark.parametrize(("writer", "reader"), [("pmap", "mesh"), ("mesh", "pmap")])
def test_a_memory_is_in_the_checkpoint(writer, reader, tmp_path):
    runner, state = make_runner(writer, memory_length=5)
    state = runner.place_state(state)
    for count in range(2):
        state, _ = runner.step(state, runner.place_batch(continued_batch(count)))
    saved = runner.fetch_state(state)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(saved, {})
    checkpointer.wait()
    runner, target = make_runner(reader, memory_length=5)
    restored = checkpointer.restore(target).state
    np.testing.assert_array_equal(restored.carry["recurrence_BLPD"], saved.carry["recurrence_BLPD"])
    state, statistics = runner.step(runner.place_state(restored), runner.place_batch(continued_batch(2)))
    expected, rows = trained("one", memory_length=5, accumulate_steps=1)
    assert_close(jax.device_get(runner.fetch_state(state)._replace(key=())), expected)
    assert_close(jax.device_get(statistics), rows[2])


def test_a_memory_of_several_processes_under_pmap_is_refused(monkeypatch):
    runner, state = make_runner("pmap", memory_length=5)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"got 2 processes; set parallel.strategy=mesh, or model.memory_length=0"):
        runner.place_state(state)


@pytest.mark.parametrize("kind", RUNNERS)
def test_does_not_compile_twice_and_donates(kind, compilations):
    runner, state = make_runner(kind)
    state = runner.place_state(state)
    for count in range(4):
        before = state
        state, statistics = runner.step(state, runner.place_batch(make_batch(count)))
        jax.block_until_ready(statistics)
        if count == 0:
            compiled = len(compilations)
        arrays = [x for x in jax.tree.leaves(before.params) if x.is_deleted()]
        assert len(arrays) == len(jax.tree.leaves(before.params)), "the state was copied instead of donated"
    assert len(compilations) == compiled


@pytest.mark.parametrize("kind", RUNNERS)
def test_place_state_leaves_what_it_was_given(kind):
    runner, state = make_runner(kind)
    runner.step(runner.place_state(state), runner.place_batch(make_batch()))
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("kind", RUNNERS)
def test_fetch_is_the_inverse_of_place(kind):
    runner, state = make_runner(kind)
    fetched = runner.fetch_state(runner.place_state(state))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fetched) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    jax.tree.map(np.testing.assert_array_equal, fetched.params, state.params)


@pytest.mark.parametrize("kind", RUNNERS)
def test_evaluation_sums_over_devices(kind):
    runner, state = make_runner(kind)
    params = runner.place_state(state.params)
    halves = [runner.evaluate_step(params, (), runner.place_batch(make_batch(seed, rows=8)))[1] for seed in (0, 1)]
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), make_batch(0, rows=8), make_batch(1, rows=8))
    _, whole = runner.evaluate_step(params, (), runner.place_batch(both))
    assert float(whole["weight"]) == both.weights.sum()
    assert_close(jax.tree.map(lambda a, b: a + b, *jax.device_get(halves)), jax.device_get(whole))


@pytest.mark.parametrize(("writer", "reader"), [("pmap", "mesh"), ("mesh", "pmap"), ("mesh", "one"), ("one", "mesh")])
def test_checkpoint_of_one_is_read_by_the_other(writer, reader, tmp_path):
    """Two steps, a checkpoint, and a third step by another runner are three steps of one device."""
    runner, state = make_runner(writer)
    state = runner.place_state(state)
    for count in range(2):
        state, _ = runner.step(state, runner.place_batch(make_batch(count)))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(runner.fetch_state(state), {})
    checkpointer.wait()

    runner, target = make_runner(reader)
    state = runner.place_state(checkpointer.restore(target).state)
    state, statistics = runner.step(state, runner.place_batch(make_batch(2)))
    expected, rows = trained("one")
    assert_close(jax.device_get(runner.fetch_state(state)._replace(key=())), expected)
    assert_close(jax.device_get(statistics), rows[2])


def test_dropout_under_pmap_differs_between_devices():
    """The noise of eight devices has a variance, which one key for all would not have."""

    def loss(params, carry, batch, key, train):
        noise = jax.random.uniform(key)
        return (jnp.sum(params * batch), jnp.float32(1.0)), (carry, {"square": noise**2, "noise": noise})

    objective = (
        NextToken()
        .bind(model_and_params()[0], SimpleNamespace(token_bytes=np.ones(V, np.int32)))
        ._replace(weight=lambda batch: jnp.float32(1.0), loss=loss)
    )
    optimizer = optax.sgd(0.0)
    step = TrainStep(objective, optimizer, lambda _: 0.0, axis_name=AXIS_NAME)
    runner = PmapRunner(0, step, lambda params, carry, batch: (carry, {}))
    state = create_state(jnp.ones(()), optimizer, jax.random.key(0))
    _, statistics = runner.step(runner.place_state(state), runner.place_batch(np.ones((8, 1), np.float32)))
    mean, square = float(statistics["noise"]) / 8, float(statistics["square"]) / 8
    assert square - mean**2 > 1e-3


def test_micro_batches_stay_on_their_device():
    """Row r of eight devices' rows goes to micro-batch r % 2: sums cross devices, rows do not."""
    model, params = model_and_params()
    objective = NextToken().bind(model, SimpleNamespace(token_bytes=np.ones(V, np.int32)))
    optimizer = optax.sgd(0.1)
    step = TrainStep(objective, optimizer, lambda _: 0.1, accumulate_steps=2)
    mesh = make_mesh()
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = create_state(params, optimizer, jax.random.key(1))
    text = jax.jit(step, in_shardings=(whole, rows), out_shardings=whole).lower(state, make_batch()).compile().as_text()
    assert "all-reduce" in text
    assert not re.search(r"all-to-all|collective-permute|all-gather", text)


def test_replicate_is_undone_by_unreplicate_without_a_gather():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(3), "n": np.int32(5)}
    copies = replicate(tree, jax.devices())
    assert copies["a"].shape == (8, 2, 3)
    back = unreplicate(copies)
    assert back["a"].devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(back["a"], tree["a"])
    assert back["key"] == tree["key"]
    assert back["n"].shape == ()


@pytest.mark.parametrize(("rows", "devices", "accumulate"), [(12, 8, 1), (8, 8, 2), (10, 4, 1)])
def test_batch_not_divisible_is_refused(rows, devices, accumulate):
    with pytest.raises(UserError, match=rf"{devices} x {accumulate}, got {rows}; change one of them"):
        check_divisible(rows, devices, accumulate)


def test_batch_divisible_is_accepted():
    check_divisible(16, 8, 2)


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"must not exceed the 8 devices there are, got 9; lower one of them"):
        make_mesh(9)
    assert choose_devices(0) == jax.devices()
    assert choose_devices(3) == jax.devices()[:3]


def test_processes_have_as_many_devices_each(monkeypatch):
    class Device(NamedTuple):
        process_index: int
        number: int

    devices = [Device(process, number) for process in (0, 1) for number in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert choose_devices(0) == devices
    assert choose_devices(4) == [Device(0, 0), Device(0, 1), Device(1, 0), Device(1, 1)]
    with pytest.raises(UserError, match=r"must be a multiple of the 2 processes, got 3; change its axes"):
        choose_devices(3)
