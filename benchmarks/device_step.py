"""The trainer's step of GPT-2 124M: tokens a second, MFU, compile time, memory.

MFU has one formula for this project and for PyTorch: `flops_per_token` x tokens a second / peak. `flops_per_token` is
`6 (N - positions) + 12 L D T`, with N = 124.4M parameters. It counts three passes over the parameters without the table of
positions. As in nanoGPT, it counts all T x T pairs of attention, although half of them are masked. The peak is the data
sheet's (`published_peak_flops`: 989 TFLOP/s for an H100). Packed rows have fewer pairs to compute, and are counted alike.

The steps are the trainer's (`transformer.parts.Steps`), with batches of its pipeline. The text is random, with words as frequent
as in real text (1 / rank); a document has 0.4 of a row's tokens on average. With `data.pack`, rows have several documents;
otherwise one. Layers are not scanned and nothing is recomputed.
"""

import dataclasses
import pathlib
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np
from device_report import Report, seconds_of

from transformer.cli.arguments import load_config
from transformer.config import Config
from transformer.data.datasets import data_of
from transformer.parts import Steps, resolve
from transformer.training.hardware import published_peak_flops


class Shape(NamedTuple):
    """Sizes of the model and its rows, for counts of operations."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    length: int

    @property
    def flops_per_token(self) -> float:
        """Of a training step, by the formula above; feed-forward layers are four times as wide."""
        vocabulary, layers, width = self.vocab_size * self.width, self.layers, self.width
        block = 12 * width**2 + 13 * width  # products and biases, two norms
        return 6.0 * (vocabulary + layers * block + 2 * width) + 12.0 * layers * width * self.length


GPT2, TINY = Shape(50_257, 12, 768, 12, 1024), Shape(257, 1, 32, 2, 64)


def speed(shape: Shape, rows: int, seconds: float, card: str) -> dict[str, Any]:
    """Tokens a second and MFU of a step with so many rows."""
    tokens, peak = rows * shape.length / seconds, published_peak_flops(card)
    return {
        "step_ms": round(1e3 * seconds, 3),
        "tokens_per_s": round(tokens),
        "mfu": round(shape.flops_per_token * tokens / peak, 4) if peak else None,
    }


class Numbers:
    """A tokenizer of words that are numbers, which are their ids; the last id ends a text."""

    kind = "numbers"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_text = vocab_size, vocab_size - 1
        self.token_bytes = np.full(vocab_size, 4, np.int32)

    def encode(self, text: str) -> np.ndarray:
        """The numbers."""
        return np.array(text.split(), np.int32)

    def decode(self, ids: Any) -> str:
        """Numbers again."""
        return " ".join(str(int(i)) for i in ids)

    def save(self, directory: Any) -> None:
        """Nothing: no run is kept."""


def random_ids(size: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Ids below the last, the n-th about as frequent as 1 / n, int64 [size]."""
    ranks = np.random.default_rng(seed).random(size)
    return np.minimum((vocab_size - 1) ** ranks - 1, vocab_size - 2).astype(np.int64)


def write_corpus(folder: pathlib.Path, shape: Shape) -> pathlib.Path:
    """A file of documents, separated by a line `--`; enough for several batches, held-out part and all."""
    path = folder / f"corpus_{shape.vocab_size}.txt"
    if not path.exists():
        tokens = 256 * shape.length
        random, ids, start, texts = np.random.default_rng(1), random_ids(tokens, shape.vocab_size).astype(str), 0, []
        while start < tokens:
            stop = start + 1 + int(random.exponential(0.4 * shape.length))
            texts.append(" ".join(ids[start:stop]))
            start = stop
        path.write_text("\n--\n".join(texts))
    return path


def gpt2_config(folder: pathlib.Path, *, tiny: bool, rows: int, pack: bool) -> Config:
    """The run of configs/gpt2_124m.py on the random corpus: one device, one micro-batch, layers unrolled, no recomputation."""
    shape, path = TINY if tiny else GPT2, pathlib.Path(__file__).resolve().parent.parent / "configs" / "gpt2_124m.py"
    config = load_config(f"{path}:debug" if tiny else str(path))
    data = dataclasses.replace(
        config.data,
        source=(str(write_corpus(folder, shape)),),
        separator="--",
        data_dir=str(folder / "data"),
        sequence_length=shape.length,
        batch_size=rows,
        pack=pack,
    )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, vocab_size=shape.vocab_size, num_layers=shape.layers, scan_layers=False, remat="none"
        ),
        data=data,
        optimizer=dataclasses.replace(config.optimizer, accumulate_steps=1),
        parallel=dataclasses.replace(config.parallel, data=1),
    )


class Made(NamedTuple):
    """A compiled step."""

    steps: Steps
    batch: Any
    compiled: Any
    seconds: float
    attention: str
    documents: float
    """In a row, in the mean."""

    @property
    def memory(self) -> dict[str, float]:
        """Memory of the program, from the compiler."""
        analysis = self.compiled.memory_analysis()
        sizes = {name: getattr(analysis, f"{name}_size_in_bytes", 0) for name in ("temp", "argument")}
        return {f"{name}_gb": round(size / 1e9, 3) for name, size in sizes.items()}


def first_batch(config: Config) -> Any:
    """Of the trainer's pipeline. Not for several threads at once: while it prepares data, standard output is redirected."""
    tokenizer: Any = Numbers(config.model.vocab_size)
    return next(data_of(config).train_batches(tokenizer))


def make(config: Config, host: Any) -> Made:
    """The trainer's step, compiled for such batches."""
    tokenizer: Any = Numbers(config.model.vocab_size)
    config = resolve(config, tokenizer)
    steps = Steps(config, tokenizer)
    batch = steps.runner.place_batch(host)
    lowered = steps.runner.lower(steps.state, batch)
    start = perf_counter()
    compiled = lowered.compile()
    seconds = perf_counter() - start
    starts = float(np.mean(np.sum(np.asarray(host.positions) == 0, axis=1)))
    attention = steps.parts.describe_attention(jax.devices()[0].platform)
    return Made(steps, batch, compiled, seconds, attention, starts)


def run(report: Report) -> None:
    """Steps of 16, 32 and 64 rows, whole and packed; 32 rows first, since comparisons use them."""
    for sizes in ((2,),) if report.tiny else ((32,), (16, 64)):
        run_sizes(report, sizes)


def run_sizes(report: Report, sizes: tuple[int, ...]) -> None:
    """Programs are compiled side by side, then timed one by one."""
    cases = {f"{kind} {rows}": (rows, kind == "packed") for rows in sizes for kind in ("whole", "packed")}
    due = {name: case for name, case in cases.items() if report.is_due(name, needs=40)}
    if not due:
        return
    with ThreadPoolExecutor(len(due)) as pool:
        jobs = {}
        for name, (rows, pack) in due.items():
            config = gpt2_config(report.folder, tiny=report.tiny, rows=rows, pack=pack)
            jobs[name] = pool.submit(make, config, first_batch(config))
    # All have ended here: a step is timed while nothing else runs.
    for name, job in jobs.items():
        rows, pack = due[name]
        report.run(name, lambda job=job: measure(job.result(), report), needs=4, rows=rows, packed=pack)


def measure(made: Made, report: Report) -> dict[str, Any]:
    """Time the step; the batch stays the same."""
    shape, config = TINY if report.tiny else GPT2, made.steps.parts.config
    state = made.steps.init_state()
    start = perf_counter()
    state, first = made.steps.runner.step(state, made.batch)
    sums = {name: float(value) for name, value in first.items()}
    first_seconds = perf_counter() - start

    def step() -> Any:
        nonlocal state
        state, statistics = made.steps.runner.step(state, made.batch)
        return statistics["loss"].block_until_ready

    seconds, rounds = seconds_of(step, calls=1 if report.tiny else 6)
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        **speed(shape, config.data.batch_size, seconds, device.device_kind),
        "rounds_ms": [round(1e3 * t, 3) for t in rounds],
        "attention": made.attention,
        "documents_per_row": round(made.documents, 1),
        "first_loss": round(sums["loss"] / sums["weight"], 4),
        "compile_s": round(made.seconds, 1),
        "first_step_s": round(first_seconds, 1),
        **made.memory,
        "process_peak_gb": None if peak is None else round(peak / 1e9, 2),
    }
