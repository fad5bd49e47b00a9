"""Random SIGKILLs of six kinds of run, each compared with an undisturbed run; prints one JSON line.

    python benchmarks/kills.py [--kills 60] [--directory /tmp/transformer-kills]

The kinds are pmap and fsdp on two devices, a classifier, a translator, Transformer-XL, and Muon in float16. They are tiny models
with dropout that save every fourth step and evaluate every fifteenth. Half of the kills come at a uniformly random moment of a
process, imports and compilation included, and the other half only after the first step. The same command then resumes the run.
At its end, every bit of the last checkpoint and every metric row without timings is compared, and the next run begins. Every
process is recorded in DIRECTORY/lives.jsonl, from which a stopped benchmark continues.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.data.tokenizers.words import Words
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.classification import Classification
from transformer.objectives.next_token import NextToken
from transformer.objectives.seq2seq import Seq2Seq
from transformer.ops.positions.transformer_xl import TransformerXLPositions
from transformer.optimizers.adamw import AdamW
from transformer.optimizers.muon import Muon
from transformer.runs.compare import compare, read_outcome
from transformer.schedules.linear import LinearSchedule
from transformer.training.folders import committed_steps

KINDS = ("pmap", "fsdp", "classifier", "translator", "transformer_xl", "muon_float16")
STEPS = 150
LIVES = "lives.jsonl"
WORDS = ("to", "be", "or", "not", "that", "is", "the", "question", "whether", "it", "nobler", "in", "mind", "suffer")


def get_config(kind: str = "pmap") -> Config:
    """The run of a kind; this file is the config file of its runs."""
    model: dict[str, Any] = {"num_layers": 1, "embed_dim": 16, "dropout": 0.1}
    data: dict[str, Any] = {"source": ("text",), "sequence_length": 32}
    optimizer: dict[str, Any] = {"accumulate_steps": 2, "schedule": LinearSchedule(warmup_steps=5), "ema_decay": 0.9}
    rule, objective, parallel = AdamW, NextToken(), ParallelConfig(data=1)
    training: dict[str, Any] = {}
    if kind not in ("classifier", "translator"):
        data["record_bytes"], training["sample_length"] = 512, 8
    if kind == "pmap":
        parallel = ParallelConfig(strategy="pmap")
    elif kind == "fsdp":
        parallel = ParallelConfig(fsdp=2)
    elif kind == "classifier":
        objective = Classification()
        data |= {"source": ("labelled",), "tokenizer": Words(size=300)}
    elif kind == "translator":
        objective = Seq2Seq()
        data |= {"source": ("pairs",), "tokenizer": Words(size=300), "buckets": (16, 32)}
    elif kind == "transformer_xl":
        model |= {"positions": TransformerXLPositions(), "memory_length": 32}
    elif kind == "muon_float16":
        model["dtype"] = "float16"
        rule = Muon
        optimizer |= {"learning_rate": 0.02, "b2": 0.99}
    return Config(
        model=ModelConfig(pattern=(BlockConfig(AttentionConfig(num_heads=2, dropout=0.1)),), **model),
        data=DataConfig(batch_size=8, data_dir="prepared", **data),
        objective=objective,
        optimizer=rule(**optimizer),
        parallel=parallel,
        training=TrainingConfig(steps=STEPS, log_every=3, eval_every=15, checkpoint_every=4, **training),
    )


def make_data(directory: pathlib.Path) -> None:
    """Text, labelled texts and pairs, prepared below `directory`."""
    words = random.Random(0)

    def sentence() -> str:
        return " ".join(words.choice(WORDS) for _ in range(words.randint(4, 12)))

    (directory / "text").mkdir(parents=True)
    for index in range(30):
        (directory / "text" / f"{index}.txt").write_text(" ".join(sentence() for _ in range(8)))
    labelled = ({"text": f"{sentence()} {label}", "label": label} for label in ("good", "bad", "fair") * 60)
    (directory / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    pairs = ({"source": text, "target": text.upper()} for text in (sentence() for _ in range(200)))
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for kind in ("labelled", "pairs"):
        command = ["prepare", f"{kind}.jsonl", "--kind", kind, "--name", kind, "--data-dir", "prepared"]
        with start(directory, command, "prepare.log") as process:
            assert process.wait() == 0, (directory / "prepare.log").read_text()


def start(directory: pathlib.Path, arguments: list[str], log: str, devices: int = 1) -> subprocess.Popen[bytes]:
    """Start a command of the package in a new process with so many CPU devices."""
    environment = os.environ | {
        "COLUMNS": "1000",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    with (directory / log).open("a") as file:
        command = [sys.executable, "-m", "transformer", *arguments]
        return subprocess.Popen(command, cwd=directory, env=environment, stdout=file, stderr=subprocess.STDOUT)


def train(directory: pathlib.Path, kind: str, name: str) -> subprocess.Popen[bytes]:
    """One process of a run."""
    arguments = ["train", f"{pathlib.Path(__file__).absolute()}:{kind}", "--workdir", name]
    return start(directory, arguments, f"{name}.log", devices=2 if kind in ("pmap", "fsdp") else 1)


def live(directory: pathlib.Path, kind: str, name: str, kill_within: float) -> dict[str, Any]:
    """A life that a SIGKILL may end, at a random moment of so many seconds; with 0 it is left alone."""
    metrics, checkpoints = directory / name / "metrics.jsonl", directory / name / "checkpoints"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    begin, anywhere = time.monotonic(), random.random() < 0.5
    process = train(directory, kind, name)

    def under_way() -> bool:
        return metrics.exists() and metrics.stat().st_mtime_ns > before

    if kill_within:
        while not anywhere and process.poll() is None and not under_way():
            time.sleep(0.002)
        try:
            process.wait(timeout=random.uniform(0, kill_within if anywhere else kill_within / 2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    status = process.wait()
    valid = committed_steps(checkpoints)
    names = {path.name for path in checkpoints.iterdir()} if checkpoints.exists() else set()
    saving = {name for name in names if not name.endswith(".damaged")} - {str(step) for step in valid}
    return {
        "kind": kind,
        "run": name,
        "status": status,
        "seconds": round(time.monotonic() - begin, 2),
        "step": max(valid, default=0),
        "moment": "saving" if saving else "under way" if under_way() else "starting",
    }


def attack(directory: pathlib.Path, kind: str, kills: int, lives: list[dict[str, Any]]) -> dict[str, int]:
    """Kill runs of a kind so many times in all, let the last one finish, and compare those that did."""
    reference = f"{kind}-undisturbed"
    while True:
        own = [life for life in lives if life["kind"] == kind]
        killed, finished = (sum(life["status"] == status for life in own) for status in (-signal.SIGKILL, 0))
        failed = len(own) - killed - finished
        name = f"{kind}-{finished}" if finished else reference
        if failed or (killed >= kills and not any(life["run"] == name for life in own)):
            break
        # The first life compiles; later ones find its programs.
        length = min((life["seconds"] for life in own if life["status"] == 0), default=0.0)
        lives.append(live(directory, kind, name, length if killed < kills else 0.0))
        with (directory / LIVES).open("a") as file:
            file.write(json.dumps(lives[-1]) + "\n")
    expected = read_outcome(directory / reference)
    found = [compare(read_outcome(directory / f"{kind}-{index}"), expected) for index in range(1, finished)]
    return {
        "kills": killed,
        "runs": len(found),
        "failed": failed,
        "differing_bits": sum(difference.bits for difference in found),
        "differing_rows": sum(difference.rows for difference in found),
    }


def main() -> None:
    """Kill, compare, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="number of kills of all kinds together")
    default = pathlib.Path(tempfile.gettempdir()) / "transformer-kills"
    parser.add_argument("--directory", type=pathlib.Path, default=default, help="of the runs")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="several processes may share a directory"
    )
    options = parser.parse_args()
    directory = options.directory.absolute()
    if not (directory / LIVES).exists():
        make_data(directory)
        (directory / LIVES).touch()
    lives = [json.loads(line) for line in (directory / LIVES).read_text().splitlines()]
    kinds = {kind: attack(directory, kind, -(-options.kills // len(KINDS)), lives) for kind in options.kinds}
    killed = [life for life in lives if life["status"] == -signal.SIGKILL and life["kind"] in options.kinds]
    result = {
        "benchmark": "kills",
        "jax": jax.__version__,
        **{name: sum(of_kind[name] for of_kind in kinds.values()) for name in next(iter(kinds.values()))},
        "moments": collections.Counter(life["moment"] for life in killed),
        "seconds": round(sum(life["seconds"] for life in lives)),
        "kinds": kinds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
