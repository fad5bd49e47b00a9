"""A model small enough to compile in no time, with parameters named as in the real ones."""

import functools
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.optimizers.adamw import AdamW
from transformer.parallel.mesh import MeshRunner, make_mesh
from transformer.schedules.cosine import CosineSchedule
from transformer.training.optimizer import make_optimizer
from transformer.training.state import create_state
from transformer.training.step import EvaluateStep, TrainStep
from transformer.types import Batch, Loss

V, D, H, K, F, T = 11, 8, 2, 4, 16, 6


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the suite runs in the background of a shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def make_params(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)

    return {
        "token_embedding": {"embedding": normal(V, D)},
        "positions": {"position_embedding": {"embedding": normal(T, D)}},
        "block": {
            "query": {"kernel": normal(D, H, K), "bias": normal(H, K)},
            "out": {"kernel": normal(H, K, D)},
            "up": {"kernel": normal(D, F)},
            "down": {"kernel": normal(F, D), "bias": normal(D)},
            "norm": {"scale": jnp.ones((D,), jnp.float32)},
        },
        "unused": {"kernel": jnp.array([[-0.0, 0.0], [1.0, -1.0]])},
    }


def make_objective(dropout=0.0):
    def weight(batch):
        return jnp.sum(batch.weights)

    def loss(params, carry, batch, key, train):
        block = params["block"]
        x = params["token_embedding"]["embedding"][batch.inputs]
        x = x + params["positions"]["position_embedding"]["embedding"][None]
        heads = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, block["query"]["kernel"]) + block["query"]["bias"][None, None])
        x = x + jnp.einsum("bthk,hkd->btd", heads, block["out"]["kernel"])
        if train and dropout:
            x = x * jax.random.bernoulli(key, 1 - dropout, x.shape) / (1 - dropout)
        hidden = jax.nn.gelu(x @ block["up"]["kernel"])
        x = (x + hidden @ block["down"]["kernel"] + block["down"]["bias"][None, None]) * block["norm"]["scale"][
            None, None
        ]
        logits = x @ params["token_embedding"]["embedding"].T
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
        correct = (jnp.argmax(logits, -1) == batch.targets).astype(jnp.float32)
        statistics = {"correct": jnp.sum(correct * batch.weights), "bytes": jnp.sum(2 * batch.weights)}
        return (jnp.sum(nll * batch.weights), jnp.sum(batch.weights)), (carry, statistics)

    return Loss(weight, loss)


def make_batch(seed=0, rows=8, uneven=True):
    """Rows that count up; `uneven` pads each to another length, one to nothing."""
    rng = np.random.default_rng(seed)
    tokens = (np.arange(T + 1)[None] + rng.integers(0, V, (rows, 1))) % V
    lengths = np.arange(rows) * T // max(rows - 1, 1) if uneven else np.full(rows, T)
    valid = np.arange(T)[None] < lengths[:, None]
    return Batch(
        inputs=tokens[:, :-1].astype(np.int32),
        targets=tokens[:, 1:].astype(np.int32),
        weights=valid.astype(np.float32),
        segment_ids=valid.astype(np.int32),
        positions=np.tile(np.arange(T, dtype=np.int32), (rows, 1)),
    )


class Batches:
    """Batch n depends on n only; the state is n."""

    def __init__(self, rows=8):
        self.rows, self.count = rows, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        return make_batch(seed=self.count, rows=self.rows)

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


@functools.cache
def make_runner(devices=1, steps=30, dropout=0.25, schedule=None, **optimizer):
    """A runner over a mesh and a function that makes the state before the first step; compiled once for all tests."""
    config = AdamW(
        **{
            "learning_rate": 0.03,
            "schedule": schedule or CosineSchedule(warmup_steps=3),
            "accumulate_steps": 2,
            **optimizer,
        }
    )
    transform, rates = make_optimizer(config, steps, make_params())
    objective = make_objective(dropout)
    step = TrainStep(objective, transform, rates, accumulate_steps=config.accumulate_steps, ema_decay=config.ema_decay)
    runner = MeshRunner(make_mesh(devices), step, EvaluateStep(objective))
    return runner, lambda: create_state(make_params(), transform, jax.random.key(7), ema=config.ema_decay > 0)


@pytest.fixture(scope="session")
def toy():
    return types.SimpleNamespace(
        params=make_params,
        objective=make_objective,
        batch=make_batch,
        Batches=Batches,
        runner=make_runner,
        rows=8,
        T=T,
    )
