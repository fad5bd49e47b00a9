"""Training in float16: what a scale saves from underflow, and what a step that overflows leaves as it was."""

import contextlib
import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.config import TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.objectives.next_token import NextToken
from transformer.ops.losses import cross_entropy
from transformer.optimizer import OPTIMIZERS
from transformer.optimizers.adamw import AdamW
from transformer.parallel.mesh import MeshRunner, make_mesh
from transformer.parallel.pmap import AXIS_NAME, PmapRunner
from transformer.schedules.cosine import CosineSchedule
from transformer.training.checkpoint import Checkpointer, describe
from transformer.training.folders import committed_steps
from transformer.training.loop import train
from transformer.training.loss_scale import INITIAL, LARGEST, PERIOD, LossScale, keep_if_finite, make_loss_scale
from transformer.training.metrics import TIMINGS
from transformer.training.optimizer import make_optimizer
from transformer.training.state import TrainState, create_state
from transformer.training.step import EvaluateStep, TrainStep, update_ema
from transformer.training.writers import JsonlWriter, read_jsonl
from transformer.types import Batch, Loss, UserError

ROWS, T, V, D = 16, 8, 13, 8
# "Updates" nothing and keeps the gradient as its state.
KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, _, p: (jax.tree.map(jnp.zeros_like, g), g)
)


def make_params():
    """Of two layers that compile in no time; the last parameter has a minus zero, which `x + 0` would change."""
    rng = np.random.default_rng(0)
    up, down = (jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for shape in ((V, D), (D, V)))
    return {"up": {"kernel": up}, "down": {"kernel": down}, "unused": {"kernel": jnp.array([[-0.0, 1.0]])}}


def make_objective(dtype="float16"):
    """Next tokens from the token before, in `dtype` up to the logits."""

    def loss(params, carry, batch, key, train):
        up, down = (params[name]["kernel"].astype(dtype) for name in ("up", "down"))
        hidden = jnp.tanh(up[batch.inputs])
        nll = cross_entropy((hidden @ down).astype(jnp.float32), batch.targets)[0]
        loss_sum, weight = jnp.sum(nll * batch.weights), jnp.sum(batch.weights)
        return (loss_sum, weight), (carry, {"bytes": weight})

    return Loss(lambda batch: jnp.sum(batch.weights), loss)


def make_batch(seed=0, *, spoilt_row=None):
    """Rows of different lengths; a spoilt one has targets of a weight that no loss is finite with."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (ROWS, T + 1)).astype(np.int32)
    valid = np.arange(T)[None] < rng.integers(1, T + 1, (ROWS, 1))
    weights = valid.astype(np.float32)
    if spoilt_row is not None:
        weights[spoilt_row] = np.inf
    positions = np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, valid.astype(np.int32), positions)


def loss_scale(scale=INITIAL, good_steps=0, skipped_steps=0):
    return LossScale(jnp.float32(scale), jnp.int32(good_steps), jnp.int32(skipped_steps))


def numbers(state):
    return tuple(float(x) for x in state.loss_scale)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# ---- One step --------------------------------------------------------------------------------------------------------


@functools.cache
def compiled_step(optimizer, accumulate_steps):
    transform, schedule = make_optimizer(
        OPTIMIZERS.find(optimizer)(schedule=CosineSchedule(warmup_steps=9)), 10, make_params()
    )
    step = TrainStep(make_objective(), transform, schedule, accumulate_steps=accumulate_steps, ema_decay=0.5)
    return jax.jit(step), transform


def run_step(scale, *, optimizer="adamw", accumulate_steps=1):
    """Step 8 from a state that is not what a run starts with: zeros would hide a change."""
    step, transform = compiled_step(optimizer, accumulate_steps)
    state = create_state(make_params(), transform, jax.random.key(1), ema=True, loss_scale=scale)
    state = state._replace(
        step=jnp.int32(7),
        opt_state=jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state.opt_state),
        ema_params=jax.tree.map(lambda x: 2 * x, state.ema_params),
    )
    return state, *step(state, make_batch())


@pytest.mark.parametrize(("optimizer", "accumulate_steps"), [("adamw", 1), ("adamw", 4), ("muon", 1)])
def test_overflow_changes_nothing_but_the_counter_and_half_the_scale(optimizer, accumulate_steps):
    """2^60 times a gradient is beyond float16, whose loss is as finite as ever."""
    before, after, statistics = run_step(
        loss_scale(2.0**60, good_steps=9, skipped_steps=2), optimizer=optimizer, accumulate_steps=accumulate_steps
    )
    assert math.isfinite(float(statistics["loss"]))
    assert not math.isfinite(float(statistics["grad_norm"]))
    for name in ("params", "opt_state", "ema_params"):
        assert bits(getattr(after, name)) == bits(getattr(before, name)), name
    assert int(after.step) == 8
    assert numbers(after) == (2.0**59, 0, 3)
    assert (float(statistics["loss_scale"]), int(statistics["skipped_steps"])) == (2.0**59, 3)


def test_a_good_step_changes_everything_and_keeps_the_scale():
    before, after, statistics = run_step(loss_scale(good_steps=9, skipped_steps=2))
    assert numbers(after) == (INITIAL, 10, 2)
    for name in ("params", "opt_state", "ema_params"):
        assert bits(getattr(after, name)) != bits(getattr(before, name)), name
    # Skipped steps are none to the schedule: the optimizer did not see them.
    schedule = make_optimizer(AdamW(schedule=CosineSchedule(warmup_steps=9)), 10, before.params)[1]
    np.testing.assert_allclose(statistics["learning_rate"], schedule(5))
    assert float(schedule(5)) < float(schedule(7))


def test_skipped_steps_are_none_to_the_average():
    step = TrainStep(make_objective(), optax.sgd(0.1), lambda _: 0.1, ema_decay=0.5)
    state = create_state(
        make_params(), optax.sgd(0.1), jax.random.key(1), ema=True, loss_scale=loss_scale(skipped_steps=3)
    )
    after = jax.jit(step)(state._replace(step=jnp.int32(3)), make_batch())[0]
    expected = update_ema(state.ema_params, after.params, jnp.int32(0), 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after.ema_params, expected)


def test_a_loss_that_is_not_finite_is_skipped_and_its_carry_goes_on():
    """Whatever its gradient is. The next batch continues this one, so that what was carried before would not fit it."""
    objective = make_objective()

    def loss(params, carry, batch, key, train):
        (loss_sum, weight), _ = objective.loss(params, (), batch, key, train)
        new_carry = jnp.stack([carry[1] + 1, carry[0]])
        return (loss_sum, weight), (new_carry, {"objective": loss_sum + carry[0]})  # which has no gradient

    optimizer = optax.sgd(0.1)
    step = jax.jit(TrainStep(objective._replace(loss=loss), optimizer, lambda _: 0.1))
    for first, skipped in ((jnp.inf, 1), (5.0, 0)):
        carry = jnp.array([first, 2.0])
        state = create_state(make_params(), optimizer, jax.random.key(1), carry=carry, loss_scale=loss_scale(64.0))
        after, statistics = step(state, make_batch())
        assert math.isfinite(float(statistics["grad_norm"]))
        assert numbers(after) == (32.0 if skipped else 64.0, 1 - skipped, skipped)
        assert (bits(after.params) == bits(state.params)) == bool(skipped)
        assert after.carry.tolist() == [3.0, 0.0 if skipped else 5.0]


@pytest.mark.parametrize(
    ("before", "grad_norm", "after"),
    [
        ((64.0, PERIOD - 2, 5), 1.0, (64.0, PERIOD - 1, 5)),
        ((64.0, PERIOD - 1, 5), 1.0, (128.0, 0, 5)),
        ((64.0, PERIOD - 1, 5), math.nan, (32.0, 0, 6)),
        ((LARGEST, PERIOD - 1, 5), 1.0, (LARGEST, 0, 5)),
    ],
)
def test_the_scale_doubles_after_a_period_of_good_steps_up_to_its_limit(before, grad_norm, after):
    assert PERIOD == 2000
    state = TrainState(jnp.int32(7), jnp.ones(2), (), (), jax.random.key(0), (), loss_scale(*before))
    new_state = state._replace(step=jnp.int32(8), params=jnp.zeros(2))
    statistics = {"loss": jnp.float32(1), "objective": jnp.float32(1), "grad_norm": jnp.float32(grad_norm)}
    assert numbers(keep_if_finite(state, new_state, statistics)[0]) == after


def gradient(dtype, scale):
    """Of a decoder and a loss so small that what float16 is to hold of its gradient is below float16's smallest number."""
    block = BlockConfig(AttentionConfig(num_heads=2), FeedForwardConfig(hidden_dim=16))
    model = Decoder(ModelConfig(vocab_size=V, num_layers=1, embed_dim=D, pattern=(block,), dtype=dtype))
    objective = NextToken().bind(model, SimpleNamespace(token_bytes=np.ones(V, np.int32)))
    objective = objective._replace(weight=lambda batch: jnp.float32(1e7))
    step = TrainStep(objective, KEEP_GRADIENT, lambda _: 0.0)
    params = init_params(model, jax.random.key(0))[0]
    state = create_state(params, KEEP_GRADIENT, jax.random.key(1), loss_scale=scale)
    return jax.jit(step)(state, make_batch())[0].opt_state["decoder"]["blocks"]["block_0"]


def test_scaled_float16_has_the_gradient_of_float32_where_unscaled_float16_has_zero():
    expected = gradient("float32", ())
    unscaled = gradient("float16", ())
    scaled = gradient("float16", loss_scale(LARGEST))
    assert all(np.any(x) for x in jax.tree.leaves(expected))
    assert not any(np.any(x) for x in jax.tree.leaves(unscaled))

    def assert_close(a, b):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * np.abs(b).max())

    jax.tree.map(assert_close, scaled, expected)


# ---- Off -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_float16_state_and_program_have_no_trace_of_it(dtype):
    """The program equals, letter by letter, the program of a step without loss scaling."""
    params = make_params()
    objective, optimizer = make_objective(dtype), optax.adam(0.1)
    assert make_loss_scale(ModelConfig(dtype=dtype)) == ()
    state = create_state(params, optimizer, jax.random.key(1), ema=True, loss_scale=())
    assert not [name for name in describe(state) if "scale/" in name or "loss" in name]
    assert len(jax.tree.leaves(state)) == 2 + 4 * len(jax.tree.leaves(params)) + 1

    def plain(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        weight = objective.weight(batch)
        weight = jnp.where(weight > 0, weight, jnp.ones_like(weight))

        def mean_loss(params):
            (loss_sum, weight_sum), (_, statistics) = objective.loss(params, (), batch, key, True)
            return loss_sum / weight, {"objective": loss_sum, "loss": loss_sum, "weight": weight_sum, **statistics}

        grads, statistics = jax.grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, state.step, 0.5)
        statistics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": jnp.asarray(0.1, jnp.float32)}
        return TrainState(state.step + 1, params, opt_state, (), state.key, ema_params), statistics

    def step(state, batch):
        return TrainStep(objective, optimizer, lambda _: 0.1, ema_decay=0.5)(state, batch)

    plain.__name__ = step.__name__
    texts = [jax.jit(f).lower(state, make_batch()).as_text() for f in (step, plain)]
    assert texts[0] == texts[1]


def test_float16_has_a_scale_and_float16_parameters_are_refused():
    assert tuple(float(x) for x in make_loss_scale(ModelConfig(dtype="float16"))) == (2.0**15, 0, 0)
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(UserError, match=rf"needs model.param_dtype=float32, got '{dtype}'.*model.dtype={dtype}"):
            make_loss_scale(ModelConfig(param_dtype=dtype))


# ---- Devices ---------------------------------------------------------------------------------------------------------


def trained(kind, accumulate_steps):
    """Four steps: one good, one that one row of one device spoils, two good ones of which the first doubles."""
    params = make_params()
    optimizer, axis_name = optax.sgd(0.5), AXIS_NAME if kind == "pmap" else None
    options = {"accumulate_steps": accumulate_steps, "ema_decay": 0.5, "axis_name": axis_name}
    step = TrainStep(make_objective(), optimizer, lambda _: 0.5, **options)
    evaluate = EvaluateStep(make_objective(), axis_name=axis_name)
    if kind == "pmap":
        runner = PmapRunner(0, step, evaluate)
    else:
        runner = MeshRunner(make_mesh(1 if kind == "one" else 0), step, evaluate)
    state = runner.place_state(create_state(params, optimizer, jax.random.key(1), ema=True, loss_scale=loss_scale()))
    scales = []
    for count, spoilt_row in enumerate((None, 5, None, None)):
        if count == 2:
            scale = runner.fetch_state(state).loss_scale._replace(good_steps=jnp.int32(PERIOD - 1))
            state = state._replace(loss_scale=runner.place_state(scale))
        before = bits(runner.fetch_state(state).params)
        state, statistics = runner.step(state, runner.place_batch(make_batch(count, spoilt_row=spoilt_row)))
        for x in jax.tree.leaves((state.params, state.loss_scale)):
            assert len({np.asarray(shard.data).tobytes() for shard in x.addressable_shards}) == 1, "devices differ"
        assert (bits(runner.fetch_state(state).params) == before) == (spoilt_row is not None)
        scales.append((float(statistics["loss_scale"]), int(statistics["skipped_steps"])))
    return jax.device_get(runner.fetch_state(state)._replace(key=())), scales


@pytest.mark.parametrize("kind", ["one", "mesh", "pmap"])
def test_devices_and_micro_batches_agree_on_what_is_skipped(kind):
    state, scales = trained(kind, accumulate_steps=2)
    expected, _ = trained("one", 1)
    assert scales == [(INITIAL, 0), (INITIAL / 2, 1), (INITIAL, 1), (INITIAL, 1)]
    assert numbers(state) == numbers(expected) == (INITIAL, 1, 1)
    assert int(state.step) == 4
    # In float16, sums in another order differ by some units of 2^-11.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state, expected)
    start = make_params()["up"]["kernel"]
    assert np.abs(state.params["up"]["kernel"] - start).max() > 0.01


# ---- The loop --------------------------------------------------------------------------------------------------------


class Batches:
    """Batch n depends only on n, and some batches are corrupted."""

    def __init__(self, spoilt):
        self.spoilt, self.count = spoilt, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        return make_batch(self.count, spoilt_row=3 if self.spoilt(self.count) else None)

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


@functools.cache
def loop_runner():
    params = make_params()
    transform, schedule = make_optimizer(AdamW(learning_rate=0.01), 20, params)
    step = TrainStep(make_objective(), transform, schedule, ema_decay=0.9, accumulate_steps=2)
    return MeshRunner(make_mesh(1), step, EvaluateStep(make_objective())), transform


def run_loop(directory, spoilt, *, steps=20, scale=INITIAL, hooks=()):
    runner, transform = loop_runner()
    state = create_state(
        make_params(), transform, jax.random.key(1), ema=True, loss_scale=loss_scale(scale, PERIOD - 10)
    )
    with contextlib.closing(Checkpointer(directory / "checkpoints", report=lambda _: None)) as checkpointer:
        return train(
            state,
            config=TrainingConfig(steps=steps, log_every=1, checkpoint_every=5),
            runner=runner,
            batches=Batches(spoilt),
            checkpointer=checkpointer,
            writers=[JsonlWriter(directory / "metrics.jsonl")],
            hooks=hooks,
        )


def rows(directory):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_jsonl(directory / "metrics.jsonl")]


class Accident(Exception):
    pass


@pytest.mark.parametrize("stop", [6, 9, 12, 16])
def test_resumes_to_the_bit_with_the_scale(tmp_path, stop):
    """Steps 5, 9 and 10 are skipped, of which 5 and 10 are saved; without the counter, the scale would not double at 20."""

    def spoilt(count):
        return count in (5, 9, 10)

    expected = run_loop(tmp_path / "whole", spoilt)

    def fail(step, state, statistics):
        if step == stop:
            raise Accident

    with pytest.raises(Accident):
        run_loop(tmp_path / "cut", spoilt, hooks=[fail])
    state = run_loop(tmp_path / "cut", spoilt)
    assert bits(state._replace(key=jax.random.key_data(state.key))) == bits(
        expected._replace(key=jax.random.key_data(expected.key))
    )
    assert numbers(state) == (INITIAL / 8, 10, 3)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    arrays = json.loads((tmp_path / "cut/checkpoints/20/checkpoint.json").read_text())["arrays"]
    assert {name for name in arrays if name.startswith("loss_scale")} == {
        "loss_scale/scale",
        "loss_scale/good_steps",
        "loss_scale/skipped_steps",
    }


def test_a_row_of_a_skipped_step_has_the_scale_and_no_loss(tmp_path):
    run_loop(tmp_path, lambda count: count == 2, steps=3)
    first, second, third = rows(tmp_path)
    assert (first["loss_scale"], first["skipped_steps"]) == (INITIAL, 0)
    assert second == {
        "step": 2,
        "split": "train",
        "learning_rate": second["learning_rate"],
        "loss_scale": INITIAL / 2,
        "skipped_steps": 1,
    }
    assert {"loss", "grad_norm", "bits_per_byte"} <= set(third)
    assert (third["loss_scale"], third["skipped_steps"]) == (INITIAL / 2, 1)
    assert third["learning_rate"] == second["learning_rate"] < first["learning_rate"] or third["step"] == 3


def test_a_loss_that_stays_infinite_ends_the_run(tmp_path):
    """From 2^15, sixteen halvings lead below 1; the run has not saved what could not go on."""
    with pytest.raises(
        UserError,
        match=r"The loss must be finite, got (nan|inf) with a loss scale that fell to 0.5, below 1 \(try "
        r"model.dtype=bfloat16\), at step 23\. Lower .* The checkpoint of step 20 is good",
    ):
        run_loop(tmp_path, lambda count: count > 7, steps=40)
    assert committed_steps(tmp_path / "checkpoints") == [15, 20]


def test_a_scale_that_is_far_too_high_comes_down_and_the_run_goes_on(tmp_path):
    state = run_loop(tmp_path, lambda count: False, steps=60, scale=2.0**60)
    scale, good_steps, skipped_steps = numbers(state)
    assert scale == 2.0 ** (60 - skipped_steps)
    assert 20 < skipped_steps < 50
    assert good_steps > 5
