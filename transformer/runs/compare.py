"""Comparison of two runs: every array of their last checkpoints, bit by bit, and every metric row."""

import itertools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from transformer.runs.directory import CHECKPOINTS
from transformer.training.folders import latest_undamaged
from transformer.training.metrics import without_timings
from transformer.training.writers import read_jsonl
from transformer.validation import require


class Outcome(NamedTuple):
    """The final state and metrics of a run, on the host."""

    step: int
    arrays: dict[str, np.ndarray]
    """Every array of the last checkpoint by its path: parameters, optimizer state, carry, key."""
    rows: list[dict[str, Any]]
    """The metric rows without timings."""


class Difference(NamedTuple):
    """The difference between the outcomes of two runs."""

    bits: int
    """Number of differing bits in all arrays; an array without a counterpart of the same type and shape counts completely."""
    total_bits: int
    """Number of bits of the reference."""
    largest: float
    """Largest absolute difference of a parameter; infinite if the runs have different parameters."""
    rows: int
    """Number of metric rows that differ, or exist in one run only."""


def read_outcome(workdir: epath.PathLike) -> Outcome:
    """The latest undamaged checkpoint of a run, with any model and mesh, and its metric rows.

    Raises:
        UserError: there is no checkpoint, or no undamaged one.
    """
    workdir = epath.Path(workdir)
    path = latest_undamaged(workdir / CHECKPOINTS)
    require(path is not None, f"A run to compare must have a checkpoint, {workdir} has none; train it first.")
    rows = [without_timings(row) for row in read_jsonl(workdir / "metrics.jsonl")]
    return Outcome(int(path.name), read_arrays(path), rows)  # type: ignore[union-attr]


def read_arrays(checkpoint: epath.PathLike) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, `params/...`, `rest/opt_state/...`, on the host; a PRNG key as integers."""
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    stored = ocp.checkpointables_metadata(epath.Path(checkpoint)).metadata
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), stored)
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(epath.Path(checkpoint), abstract))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _on_host(x) for path, x in leaves}


def compare(found: Outcome, reference: Outcome) -> Difference:
    """The difference of `found` from `reference`."""
    names = sorted(found.arrays.keys() | reference.arrays.keys())
    params = [name for name in names if name.startswith("params/")]
    texts = ([json.dumps(row) for row in outcome.rows] for outcome in (found, reference))  # as text, NaN equals itself
    return Difference(
        bits=sum(_differing_bits(found.arrays.get(name), reference.arrays.get(name)) for name in names),
        total_bits=sum(8 * x.nbytes for x in reference.arrays.values()),
        largest=max(_distance(found.arrays.get(name), reference.arrays.get(name)) for name in params),
        rows=sum(a != b for a, b in itertools.zip_longest(*texts)),
    )


def _on_host(x: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def _differing_bits(a: np.ndarray | None, b: np.ndarray | None) -> int:
    if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return 8 * max(x.nbytes for x in (a, b) if x is not None)
    both = (np.frombuffer(x.tobytes(), np.uint8) for x in (a, b))
    return int(np.bitwise_count(np.bitwise_xor(*both)).sum())


def _distance(a: np.ndarray | None, b: np.ndarray | None) -> float:
    if a is None or b is None or a.shape != b.shape:
        return float("inf")
    return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)), initial=0.0))
