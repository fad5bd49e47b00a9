"""Two processes import and export a pretrained folder: each reads its own shards, and the files equal one process's files."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

import transformer
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.runs.export import export_model
from transformer.runs.train import train

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = """
import json, sys
from transformer.parallel import distributed
from transformer.parallel_config import ParallelConfig
number = int(sys.argv[2])
distributed.start(ParallelConfig(coordinator=sys.argv[1], num_processes=2, process_id=number))
from transformer.interop import table
from transformer.runs.export import export_model
from transformer.runs.pretrained import import_model
read, fill = [0], table.Source.fill
def counted(self, index, out):
    read[0] += out.nbytes
    fill(self, index, out)
table.Source.fill = counted
import_model("folder", "run")
print(json.dumps({"read": read[0]}))
export_model("run", "out")
"""


def test_each_process_reads_its_own_shards(tmp_path):
    block = BlockConfig(AttentionConfig(num_heads=4), FeedForwardConfig(32, "silu", gated=True), RMSNorm())
    (tmp_path / "text.txt").write_text("a cold day in April\n" * 99)
    config = Config(
        model=ModelConfig(num_layers=2, embed_dim=16, pattern=(block,)),
        data=DataConfig(source=(str(tmp_path / "text.txt"),), sequence_length=16, batch_size=8),
        training=TrainingConfig(steps=1, eval_every=0, sample_length=0),
        workdir=str(tmp_path / "first"),
    )
    train(config)
    export_model(tmp_path / "first", tmp_path / "folder")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, f"localhost:{port}", str(number)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = [line for out, _ in outputs for line in out.splitlines() if line.startswith('{"read"')]
    reads = [json.loads(line)["read"] for line in lines]
    assert len(reads) == 2
    first = transformer.load(tmp_path / "first")
    whole = sum(x.nbytes for x in jax.tree.leaves(first.params))
    # Norms, of 16 numbers each, are whole on every device.
    assert all(0.5 * whole <= read <= 0.53 * whole + 4096 for read in reads)
    jax.tree.map(np.testing.assert_array_equal, first.params, transformer.load(tmp_path / "run").params)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes(), name
