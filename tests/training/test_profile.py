"""A trace of some steps is there afterwards, names its modules, and leaves the others alone."""

import gzip

import jax
import jax.numpy as jnp
from etils import epath

from transformer.training.profile import trace_hooks


@jax.jit
def step(x):
    with jax.named_scope("optimizer"):
        return {"loss": jnp.sum(x @ x)}


def test_the_steps_asked_for_are_traced(tmp_path, monkeypatch):
    calls, said = [], []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: (calls.append(f"start {path}"), start(path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (calls.append("stop"), stop()))
    (hook,) = trace_hooks((3, 4), epath.Path(tmp_path), said.append)
    for number in range(1, 7):
        calls.append(number)
        hook(number, None, step(jnp.ones((8, 8))))
    assert calls == [1, 2, f"start {tmp_path}", 3, 4, "stop", 5, 6]
    assert said == [f"Steps 3 to 4 are traced in {tmp_path}."]
    (trace,) = tmp_path.rglob("*.trace.json.gz")
    assert b"jit_step" in gzip.decompress(trace.read_bytes())


def test_no_steps_no_trace(tmp_path):
    assert trace_hooks((0, 0), epath.Path(tmp_path)) == []
