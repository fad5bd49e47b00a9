"""Processes of one run read with one vocabulary: process 0 makes it, and the others are given it."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = """
import hashlib, json, sys
import jax

folder, port, process, objective, broken = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))

from transformer.config import Config, DataConfig, ParallelConfig
from transformer.data.datasets import TextData
from transformer.data.example_data import ExampleData
from transformer.data.tokenizers.wordpiece import WordPieces
from transformer.objective import OBJECTIVES
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.runs.recipe import make_run
from transformer.types import UserError

made = []
for kind in (TextData, ExampleData):
    def make(self, make=kind.make_tokenizer):
        made.append(1)
        return make(self)
    kind.make_tokenizer = make
size = 5 if broken == "broken" else 300
source = f"{folder}/{'text' if objective == 'next_token' else 'pairs'}.jsonl"
data = DataConfig(
    source=(source,),
    data_dir=f"{folder}/prepared{process}",
    tokenizer=WordPieces(size=size),
    share_vocabulary=objective == "next_token",
    sequence_length=16,
    batch_size=4,
)
model = ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=1)),))
config = Config(model=model, data=data, objective=OBJECTIVES.find(objective)(), parallel=ParallelConfig(data=2))
try:
    tokenizer = make_run(config).tokenizer
    tables = [one.to_json() for one in (getattr(tokenizer, "source", None), getattr(tokenizer, "target", tokenizer)) if one]
    print(json.dumps({"tables": tables, "made": len(made)}))
except UserError as error:
    print(json.dumps({"error": str(error), "made": len(made)}))
"""


@pytest.fixture
def folder(tmp_path):
    words = [f"{a}{b}{c}" for a in "aeioustr" for b in "lmnpq" for c in "xyzwv"]
    texts = [" ".join(words[i % 7 :: 7]) for i in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pairs = [{"source": text, "target": text[::-1]} for text in texts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


def in_two_processes(folder, *arguments):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), port, str(process), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.parametrize(("objective", "count"), [("next_token", 1), ("seq2seq", 2)])
def test_process_0_makes_the_vocabulary_of_all(folder, objective, count):
    first, second = in_two_processes(folder, objective, "")
    assert first["tables"] == second["tables"]
    assert len(first["tables"]) == count
    assert (first["made"], second["made"]) == (1, 0)


def test_what_process_0_cannot_make_is_the_error_of_all(folder):
    first, second = in_two_processes(folder, "next_token", "broken")
    assert first["error"] == second["error"]
    assert "data.tokenizer.size must be at least" in first["error"]
    assert (first["made"], second["made"]) == (1, 0)
