"""A step with a spike in its gradient is skipped as if its batch had not been; off, there is no trace of it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.config import TrainingConfig
from transformer.parallel.mesh import MeshRunner, make_mesh
from transformer.parallel.pmap import AXIS_NAME, PmapRunner
from transformer.training.checkpoint import Checkpointer, describe
from transformer.training.loop import train
from transformer.training.loss_scale import LossScale
from transformer.training.spikes import FEWEST, WINDOW, Spikes, make_spikes, skip_spike
from transformer.training.state import TrainState, create_state
from transformer.training.step import EvaluateStep, TrainStep
from transformer.training.writers import JsonlWriter, read_jsonl
from transformer.types import Loss, UserError

FACTOR = 10.0
SPIKES = (20, 23, 24)
STEPS = 26


def loss(params, carry, batch, key, train):
    """Its gradient is the mean of the batch's rows."""
    del key, train
    rows = batch["x"] * params["w"][None]
    carry = jax.tree.map(lambda c: c + batch["x"][:, 0], carry)
    return (jnp.sum(rows), jnp.float32(batch["x"].shape[0])), (carry, {"bytes": jnp.float32(1)})


OBJECTIVE = Loss(lambda batch: jnp.float32(batch["x"].shape[0]), loss)


class Batches:
    def __init__(self):
        self.count = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        size = 1e4 if self.count in SPIKES else 1.0
        return {"x": size * np.random.default_rng(self.count).uniform(1, 2, (8, 3)).astype(np.float32)}

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


def make(kind="one", accumulate_steps=1, factor=FACTOR, float16=False):
    """A runner, and a function that makes the first state."""
    axis_name = AXIS_NAME if kind == "pmap" else None
    optimizer = optax.adam(lambda count: 0.1 / (1 + count))
    step = TrainStep(
        OBJECTIVE,
        optimizer,
        lambda count: 0.1 / (1 + count),
        accumulate_steps=accumulate_steps,
        ema_decay=0.9,
        skip_spikes=factor,
        axis_name=axis_name,
    )
    evaluate = EvaluateStep(OBJECTIVE, axis_name=axis_name)
    if kind == "pmap":
        runner = PmapRunner(2, step, evaluate)
    else:
        runner = MeshRunner(make_mesh(1 if kind == "one" else 2), step, evaluate)

    def state():
        scale = LossScale(jnp.float32(8), jnp.int32(0), jnp.int32(0)) if float16 else ()
        return create_state(
            {"w": jnp.ones(3)},
            optimizer,
            jax.random.key(0),
            carry=jnp.zeros(8),
            ema=True,
            loss_scale=scale,
            spikes=make_spikes(factor),
        )

    return runner, state


def run(directory, made, *, hooks=(), steps=STEPS):
    runner, state = made
    with contextlib.closing(Checkpointer(directory / "checkpoints", report=lambda _: None)) as checkpointer:
        return train(
            state(),
            config=TrainingConfig(steps=steps, log_every=1, checkpoint_every=7),
            runner=runner,
            batches=Batches(),
            checkpointer=checkpointer,
            writers=[JsonlWriter(directory / "metrics.jsonl")],
            hooks=hooks,
        )


def bits(state):
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), state._replace(key=jax.random.key_data(state.key)))


@pytest.mark.parametrize(
    ("kind", "accumulate_steps", "float16"),
    [("one", 1, False), ("one", 2, True), ("mesh", 1, False), ("mesh", 2, True), ("pmap", 1, True), ("pmap", 2, False)],
)
def test_a_spike_changes_nothing_but_counters_and_carry(tmp_path, kind, accumulate_steps, float16):
    seen = {}

    def keep(step, state, statistics):
        seen[step] = jax.device_get(made[0].fetch_state(state)._replace(key=()))

    made = make(kind, accumulate_steps, float16=float16)
    run(tmp_path, made, hooks=[keep])
    for step in range(2, STEPS + 1):
        before, after = (jax.tree.map(lambda x: x.tobytes(), seen[s]) for s in (step - 1, step))
        same = all(getattr(before, name) == getattr(after, name) for name in ("params", "opt_state", "ema_params"))
        assert same == (step in SPIKES), step
        assert before.carry != after.carry and before.step != after.step and before.spikes.norms != after.spikes.norms
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["skipped_spikes"] for row in rows] == [sum(s <= row["step"] for s in SPIKES) for row in rows]
    # The schedule goes by the steps that counted.
    assert [r["learning_rate"] for r in rows] == pytest.approx(
        [0.1 / (r["step"] - sum(s < r["step"] for s in SPIKES)) for r in rows]
    )


def test_resumes_to_the_bit_within_the_window(tmp_path):
    class Accident(Exception):
        pass

    def fail(step, *_):
        if step in (9, 22):
            raise Accident

    made = make()
    expected = run(tmp_path / "whole", made)
    for _ in range(2):
        with pytest.raises(Accident):
            run(tmp_path / "cut", made, hooks=[fail] if _ == 0 else [lambda step, *_: step == 22 and fail(22)])
    assert bits(run(tmp_path / "cut", made)) == bits(expected)
    names = describe(expected)
    assert {name for name in names if name.startswith("spikes")} == {"spikes/norms", "spikes/skipped_spikes"}


def filtered(norms, norm, step=40):
    state = TrainState(jnp.int32(step), jnp.ones(2), (), (), jax.random.key(0), (), spikes=Spikes(norms, jnp.int32(5)))
    new = state._replace(step=state.step + 1, params=jnp.zeros(2))
    kept, statistics = skip_spike(state, new, {"grad_norm": jnp.float32(norm)}, FACTOR)
    assert statistics["skipped_spikes"] == kept.spikes.skipped_spikes
    return float(kept.params[0]) == 1.0, kept.spikes


def window(count, value=2.0):
    return jnp.where(jnp.arange(WINDOW) < count, value, jnp.nan)


@pytest.mark.parametrize(
    ("count", "norm", "skipped"),
    [(FEWEST, 20.1, True), (FEWEST, 20.0, False), (FEWEST - 1, 1e9, False), (WINDOW, 1e9, True), (FEWEST, 0.0, False)],
)
def test_what_is_a_spike(count, norm, skipped):
    found, spikes = filtered(window(count), norm)
    assert found == skipped
    assert int(spikes.skipped_spikes) == 5 + skipped
    assert float(spikes.norms[40]) == np.float32(norm)


@pytest.mark.parametrize("norm", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_is_no_spike_and_forgotten(norm):
    found, spikes = filtered(window(WINDOW), norm)
    assert not found and float(spikes.norms[40]) == 2.0


def test_a_rise_that_lasts_is_taken():
    """Skipped norms are remembered: after half a window they are the median, and the run goes on."""
    norms, skipped = window(WINDOW), 0
    for step in range(WINDOW, 2 * WINDOW):
        found, spikes = filtered(norms, 100.0, step)
        norms, skipped = spikes.norms, skipped + found
    assert WINDOW // 2 <= skipped <= WINDOW // 2 + 1


def test_off_there_is_no_trace_in_state_and_program():
    runner, state = make(factor=0.0)
    assert state().spikes == () and not [name for name in describe(state()) if "spike" in name]
    batch = runner.place_batch(next(Batches()))
    texts = [r.lower(runner.place_state(s()), batch).as_text() for r, s in ((runner, state), make(factor=0.0))]
    bare = TrainStep(OBJECTIVE, optax.adam(0.1), lambda _: 0.1)
    jaxpr = str(jax.make_jaxpr(bare)(create_state({"w": jnp.ones(3)}, optax.adam(0.1), jax.random.key(0)), batch))
    assert texts[0] == texts[1] and "sort" not in texts[0] and "sort" not in jaxpr
    on = make()
    assert "sort" in on[0].lower(on[0].place_state(on[1]()), batch).as_text()


@pytest.mark.parametrize("factor", [-1.0, 0.5, 1.0])
def test_a_factor_that_would_skip_ordinary_steps_is_refused(factor):
    with pytest.raises(UserError, match="skip_spikes must be 0"):
        TrainingConfig(skip_spikes=factor)
