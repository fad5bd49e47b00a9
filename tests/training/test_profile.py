"""A trace of some steps is there afterwards, names its modules, and leaves the others alone."""

import gzip

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from transformer.training.profile import trace_steps


@jax.jit
def step(x):
    with jax.named_scope("optimizer"):
        return {"loss": jnp.sum(x @ x)}


def test_the_requested_steps_are_traced(tmp_path, monkeypatch):
    calls, said = [], []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: (calls.append(f"start {path}"), start(path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (calls.append("stop"), stop()))
    with trace_steps((3, 4), epath.Path(tmp_path), said.append) as (hook,):
        for number in range(1, 7):
            calls.append(number)
            hook(number, None, step(jnp.ones((8, 8))))
    assert calls == [1, 2, f"start {tmp_path}", 3, 4, "stop", 5, 6]
    assert said == [f"Steps 3 to 4 are traced in {tmp_path}."]
    (trace,) = tmp_path.rglob("*.trace.json.gz")
    assert b"jit_step" in gzip.decompress(trace.read_bytes())


def test_a_run_that_ends_early_leaves_the_trace_of_its_steps(tmp_path):
    said = []

    def run():
        with trace_steps((2, 9), epath.Path(tmp_path), said.append) as (hook,):
            for number in range(1, 4):
                hook(number, None, step(jnp.ones((8, 8))))
            raise RuntimeError("signal")

    with pytest.raises(RuntimeError, match="signal"):
        run()
    assert said == [f"Steps 2 to 3 are traced in {tmp_path}."]
    assert len(list(tmp_path.rglob("*.trace.json.gz"))) == 1


def test_a_run_that_goes_on_after_the_first_of_them_says_so(tmp_path):
    said = []
    with trace_steps((3, 9), epath.Path(tmp_path), said.append) as (hook,):
        for number in range(5, 12):
            hook(number, None, step(jnp.ones((8, 8))))
    assert said == ["Step 3 is not traced: the run continues from step 5."]
    assert not list(tmp_path.iterdir())


def test_no_steps_no_trace(tmp_path):
    with trace_steps((0, 0), epath.Path(tmp_path)) as hooks:
        assert hooks == []
