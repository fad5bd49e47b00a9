"""What the CPU's matrix products do to the program of a TPU: nothing; prints one JSON line.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 python benchmarks/tpu_program.py

Needs no TPU, only its compiler (`pip install -e ".[plan]"`). The training step of `benchmarks/train_step.py` is compiled for
four chips of a v5e, with and without `training.cpu_kernels`, and the copies, transposes and products of the two optimised
programs are counted.
"""

import argparse
import json
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from train_step import make_config

from transformer.models.init import init_params
from transformer.objectives.next_token import next_token
from transformer.parallel.mesh import DATA_AXIS, batch_sharding, replicated_sharding
from transformer.tasks import make_model
from transformer.training.optimizer import make_optimizer
from transformer.training.state import create_state
from transformer.training.step import make_train_step
from transformer.types import Batch

OPERATIONS = ("copy", "transpose", "convolution", "dot", "fusion", "all-reduce", "all-gather")


def compile_step(mesh: Mesh, *, cpu_kernels: bool, dtype: str) -> Any:
    """The step, compiled for absent devices."""
    config = make_config(dtype, cpu_kernels, "auto")
    model = make_model(config.model, cpu_kernels=cpu_kernels)
    params, _ = init_params(model, jax.random.key(0))
    optimizer, schedule = make_optimizer(config.optimizer, config.training.steps, params)
    objective = next_token(model, config.objective, np.ones(config.model.vocab_size))
    rows, whole = batch_sharding(mesh), replicated_sharding(mesh)
    step = jax.jit(
        make_train_step(objective, optimizer, schedule, accumulate_steps=1, ema_decay=0.0),
        in_shardings=(whole, rows),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, np.int32)
    batch = Batch(tokens, tokens, jax.ShapeDtypeStruct(shape, np.float32), tokens, tokens)
    state = jax.eval_shape(lambda: create_state(params, optimizer, jax.random.key(1)))
    with jax.set_mesh(mesh):
        return step.lower(state, batch).compile()


def count(compiled: Any) -> dict[str, int]:
    """Operations of the optimised program, and the memory it needs beside its arguments."""
    text = compiled.as_text()
    counts = {name: len(re.findall(rf" {name}\(", text)) for name in OPERATIONS}
    return {**counts, "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}


def main() -> None:
    """Compile both and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2", help="TPU topology")
    parser.add_argument("--dtype", default="bfloat16", help="compute type")
    options = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    mesh = Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))
    with_kernels, without = (
        count(compile_step(mesh, cpu_kernels=choice, dtype=options.dtype)) for choice in (True, False)
    )
    print(
        json.dumps(
            {
                "benchmark": "tpu_program",
                "jax": jax.__version__,
                "topology": options.topology,
                "dtype": options.dtype,
                "cpu_kernels": with_kernels,
                "plain": without,
            }
        )
    )


if __name__ == "__main__":
    main()
