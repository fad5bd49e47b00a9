"""A long run and many generations in one process: memory, files, threads and compilations; prints one JSON line.

    JAX_PLATFORMS=cpu python benchmarks/soak.py [--steps 5000] [--generations 1000]

A tiny model trains with a save and an evaluation every 25th step and a sample every 250th. Then `generate` is called with
prompts of one to eight tokens. Each part takes forty readings, a second after the start of a save: resident memory (megabytes,
without mapped files), open files, threads, and programs compiled so far.

The second quarter of these readings is compared with the last. `flat` means that mean memory grew by less than 2 %, files and
programs not at all, and threads by less than five (TensorStore's pool fills up). For files and threads, the minimum of a quarter
counts, because a slow save holds some. Events that happen once, such as the first evaluation and each length of prompt, are in
the first quarter.
"""

import argparse
import gc
import io
import json
import pathlib
import random
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.monitoring
from rich.console import Console

from transformer import generate, load
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.generation.sampling import SamplingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.optimizers.adamw import AdamW
from transformer.runs.train import train

READINGS = 40
_COMPILED = "/jax/core/compile/backend_compile_duration"  # also where the program comes from the cache on disk


class Gauge:
    """Readings of this process."""

    def __init__(self) -> None:
        self.programs = 0
        self.readings: list[dict[str, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        self.programs += event == _COMPILED

    def read(self) -> None:
        """Take one."""
        gc.collect()
        status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
        self.readings.append(
            {
                "memory": int(status["RssAnon"].split()[0]) / 1024,
                "files": len(list(pathlib.Path("/proc/self/fd").iterdir())),
                "threads": int(status["Threads"]),
                "programs": self.programs,
            }
        )

    def summary(self) -> dict[str, Any]:
        """Second quarter against last; the next part begins."""
        readings, self.readings = self.readings, []
        quarter = len(readings) // 4
        early, late = readings[quarter : 2 * quarter], readings[-quarter:]
        result: dict[str, Any] = {}
        for name in readings[0]:
            mean = {"memory": statistics.mean, "programs": max}.get(name, min)
            result[name] = [round(mean(reading[name] for reading in part), 1) for part in (early, late)]
        growth = {name: late - early for name, (early, late) in result.items()}
        allowed = {"memory": 0.02 * result["memory"][0], "threads": 4}
        flat = all(more <= allowed.get(name, 0) for name, more in growth.items())
        return {**result, "first_memory": round(readings[0]["memory"], 1), "flat": flat}


def make_config(directory: pathlib.Path, steps: int) -> Config:
    """A tiny run on made-up text."""
    words, text = random.Random(0), directory / "text.txt"
    text.write_text(" ".join(words.choice(("to", "be", "or", "not", "question")) for _ in range(20_000)))
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=16, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(
            source=(str(text),), data_dir=str(directory / "data"), sequence_length=32, batch_size=8, limit=4096
        ),
        optimizer=AdamW(ema_decay=0.9),
        training=TrainingConfig(
            steps=steps, log_every=5, eval_every=25, checkpoint_every=25, sample_every=250, sample_length=16
        ),
        workdir=str(directory / "run"),
    )


def main() -> None:
    """Train, generate, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="of training")
    parser.add_argument("--generations", type=int, default=1000, help="calls of generate")
    options = parser.parse_args()
    gauge, start = Gauge(), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        config = make_config(pathlib.Path(temporary), options.steps)
        every = max(options.steps // READINGS, 1)
        train(
            config,
            hooks=[lambda step, *_: gauge.read() if step % every == 0 else None],
            console=Console(file=io.StringIO()),
        )
        trained, middle = gauge.summary(), time.monotonic()
        model, params, tokenizer, *_ = load(config.workdir)
    for index in range(options.generations):
        prompt = tokenizer.encode("to be or not"[: index % 8 + 1]).tolist()
        generate(model, params, [prompt], max_new_tokens=16, sampling=SamplingConfig(temperature=0.8), seed=index)
        if index % max(options.generations // READINGS, 1) == 0:
            gauge.read()
    result = {
        "benchmark": "soak",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "steps": options.steps,
        "saves_and_evaluations": options.steps // 25,
        "generations": options.generations,
        "training": {**trained, "seconds": round(middle - start)},
        "generating": {**gauge.summary(), "seconds": round(time.monotonic() - middle)},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
