"""The comparison of two runs sees a single bit, an array too many, and a changed row."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.runs.compare import compare, read_outcome
from transformer.training.checkpoint import Checkpointer
from transformer.training.state import create_state
from transformer.types import UserError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What a run of two steps leaves, of a model with two parameters."""
    directory = tmp_path_factory.mktemp("compare")
    state = create_state({"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, optax.adam(0.1), jax.random.key(0))
    checkpointer = Checkpointer(directory / "checkpoints")
    checkpointer.save(state._replace(step=jnp.int32(2)), {})
    checkpointer.close()
    rows = [{"step": step, "split": "train", "loss": 1.0 / step, "tokens_per_second": 9.0} for step in (1, 2)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_parameters_optimizer_state_key_and_rows_are_read(workdir):
    step, arrays, rows = read_outcome(workdir)
    assert step == 2
    assert arrays["params/kernel"].tolist() == [[1.0] * 3] * 2
    assert arrays["rest/key"].dtype == np.uint32
    assert len([name for name in arrays if name.startswith("rest/opt_state/")]) == 5
    assert rows == [{"step": 1, "split": "train", "loss": 1.0}, {"step": 2, "split": "train", "loss": 0.5}]
    assert compare(read_outcome(workdir), read_outcome(workdir)) == (
        0,
        8 * sum(x.nbytes for x in arrays.values()),
        0,
        0,
    )


def flipped(array):
    data = bytearray(array.tobytes())
    data[-1] ^= 0x10
    return np.frombuffer(bytes(data), array.dtype).reshape(array.shape)


def test_one_bit_of_any_array_is_seen(workdir):
    reference = read_outcome(workdir)
    for name, array in reference.arrays.items():
        altered = reference._replace(arrays=reference.arrays | {name: flipped(array)})
        difference = compare(altered, reference)
        assert difference.bits == 1
        assert (difference.largest > 0) == name.startswith("params/")


def test_missing_arrays_other_types_and_rows_are_seen(workdir):
    reference = read_outcome(workdir)
    fewer = {name: x for name, x in reference.arrays.items() if name != "params/kernel"}
    assert compare(reference._replace(arrays=fewer), reference)[::2] == (8 * 4 * 6, float("inf"))
    half = reference.arrays | {"params/bias": reference.arrays["params/bias"].astype(np.float16)}
    assert compare(reference._replace(arrays=half), reference).bits == 8 * 4 * 3
    assert compare(reference._replace(rows=reference.rows[:1]), reference).rows == 1
    assert compare(reference._replace(rows=[{}, {}, {}]), reference).rows == 3


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="has none; train it first"):
        read_outcome(tmp_path)
