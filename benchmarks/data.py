"""Time and memory from text to batches; prints one JSON line for each size and phase.

    python benchmarks/data.py [--megabytes 10 200] [--document-bytes 4000] [--vocab-size 4096] [--keep FOLDER]

Each phase runs in a new process. All phases of a size share one .jsonl corpus:

    prepare      open the corpus for the first time
    open         open it again, in a new process
    vocabulary   train byte pairs on the training split
    tokens       the first batch, which includes tokenizing the text
    encode       the same texts, by the `tokenizers` library alone
    read         batches with their state, packed (`tokens_per_second`)
    rival        the same job by `datasets` and `tokenizers`, if installed: text to tokens, then rows of one length

`peak_mb` is the largest resident memory of the process, and `children_mb` of its child processes. 2,000 megabytes take some
minutes and three times as much disk space.
"""

import argparse
import importlib.util
import itertools
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

PHASES = ("prepare", "open", "vocabulary", "tokens", "encode", "read", "rival")
READ_SECONDS = 10


def write_corpus(path: pathlib.Path, megabytes: float, document_bytes: int) -> None:
    """Documents of made-up words with frequencies as in a language."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(random.choice(letters, size)) for size in random.integers(2, 9, 20_000)]
    left = megabytes * 1e6
    with path.open("w") as file:
        while left > 0:
            drawn = random.zipf(1.3, document_bytes // 5) % len(words)
            lines = (" ".join(words[i] for i in drawn[start : start + 12]) for start in range(0, len(drawn), 12))
            text = ".\n".join(lines)[:document_bytes]
            file.write(json.dumps({"text": text}) + "\n")
            left -= len(text)


def run_phase(phase: str, corpus: pathlib.Path, vocab_size: int) -> dict[str, Any]:
    """Run a phase and measure its time."""
    from transformer.config import DataConfig  # noqa: PLC0415  # each phase has the imports that it needs
    from transformer.data.pipeline import train_batches  # noqa: PLC0415
    from transformer.data.registry import open_source  # noqa: PLC0415
    from transformer.data.source import split_text  # noqa: PLC0415
    from transformer.data.tokenizers import load_tokenizer  # noqa: PLC0415
    from transformer.data.tokenizers.bpe import BytePairs  # noqa: PLC0415

    folder, kind = corpus.parent, BytePairs(size=vocab_size)
    config = DataConfig(
        source=(str(corpus),), data_dir=str(folder / "prepared"), sequence_length=1024, batch_size=16, tokenizer=kind
    )
    texts = list(split_text(open_source(str(corpus), config), "train")) if phase == "encode" else []
    begun = time.perf_counter()
    if phase in ("prepare", "open"):
        open_source(str(corpus), config)
        return {"seconds": time.perf_counter() - begun}
    if phase == "vocabulary":
        train_vocabulary(config).save(folder / "tokenizer")
        return {"seconds": time.perf_counter() - begun}
    tokenizer: Any = load_tokenizer(folder / "tokenizer", kind)
    begun = time.perf_counter()
    if phase == "encode":
        count = 0
        for some in range(0, len(texts), 1000):
            count += sum(len(e.ids) for e in tokenizer._model.encode_batch_fast(texts[some : some + 1000]))
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "tokens_per_second": count / seconds}
    batches = train_batches(config, tokenizer)
    next(batches)
    if phase == "tokens":
        return {"seconds": time.perf_counter() - begun}
    begun, count = time.perf_counter(), 0
    processor = time.process_time()
    while time.perf_counter() - begun < READ_SECONDS:
        for batch in itertools.islice(batches, 10):
            count += batch.inputs.size
        json.dumps(batches.get_state())
    used = time.process_time() - processor
    return {"seconds": used, "tokens_per_second": count / (time.perf_counter() - begun), "tokens_a_core": count / used}


def train_vocabulary(config: Any) -> Any:
    """The tokenizer of the training split, as in a run."""
    from transformer.data.datasets import open_data  # noqa: PLC0415
    from transformer.objectives.next_token import NextToken  # noqa: PLC0415

    return open_data(config, NextToken()).make_tokenizer()


def run_rival(corpus: pathlib.Path) -> dict[str, Any]:
    """`datasets` with `tokenizers`: text to tokens on all processors, then rows of 1,024 tokens in a shuffled order."""
    import datasets  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    import tokenizers  # noqa: PLC0415

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = tokenizers.Tokenizer.from_file(str(corpus.parent / "tokenizer" / "tokenizer.json"))
    datasets.disable_progress_bars()
    begun = time.perf_counter()

    def encode(some: Any) -> dict[str, Any]:
        return {"ids": [e.ids for e in model.encode_batch_fast(some["text"])]}

    def rows(some: Any) -> dict[str, Any]:
        joined = np.concatenate([np.asarray(ids, np.uint16) for ids in some["ids"]])
        return {"row": list(joined[: len(joined) // 1024 * 1024].reshape(-1, 1024))}

    whole: Any = datasets.load_dataset("json", data_files=str(corpus), cache_dir=str(corpus.parent / "rival"))["train"]
    encoded = whole.map(encode, batched=True, remove_columns=["text"], num_proc=os.cpu_count())
    seconds = time.perf_counter() - begun
    packed = encoded.map(rows, batched=True, remove_columns=["ids"], num_proc=os.cpu_count())
    prepared = time.perf_counter() - begun
    packed, count, begun = packed.shuffle(seed=0).with_format("numpy"), 0, time.perf_counter()
    for batch in packed.iter(batch_size=16):
        count += batch["row"].size
        if time.perf_counter() - begun > READ_SECONDS:
            break
    read = time.perf_counter() - begun
    return {"tokens_seconds": seconds, "seconds": prepared, "tokens_per_second": count / read}


def main() -> None:
    """Run every phase of every size in child processes; or one phase, in a child process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 200])
    parser.add_argument("--document-bytes", type=int, default=4000)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--phases", nargs="+", default=PHASES)
    parser.add_argument("--keep", type=pathlib.Path)
    parser.add_argument("--phase")
    options = parser.parse_args()
    if options.phase:
        found = (
            run_rival(options.keep)
            if options.phase == "rival"
            else run_phase(options.phase, options.keep, options.vocab_size)
        )
        peak = {who: resource.getrusage(of).ru_maxrss / 1e3 for who, of in _WHOSE.items()}
        print(json.dumps(found | peak))
        return
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as aside:
            folder = (options.keep or pathlib.Path(aside)) / f"{megabytes:g}"
            folder.mkdir(parents=True, exist_ok=True)
            corpus = folder / "corpus.jsonl"
            if not corpus.exists():
                write_corpus(unfinished := corpus.with_suffix(".unfinished"), megabytes, options.document_bytes)
                unfinished.rename(corpus)
            for phase in options.phases:
                line = {"phase": phase, "megabytes": megabytes, "document_bytes": options.document_bytes}
                print(json.dumps(line | _measure(phase, corpus, options.vocab_size)), flush=True)


_WHOSE = {"peak_mb": resource.RUSAGE_SELF, "children_mb": resource.RUSAGE_CHILDREN}


def _measure(phase: str, corpus: pathlib.Path, vocab_size: int) -> dict[str, Any]:
    if phase == "rival" and importlib.util.find_spec("datasets") is None:
        return {"skipped": "datasets is not installed"}
    command = [sys.executable, __file__, "--phase", phase, "--keep", str(corpus), "--vocab-size", str(vocab_size)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: float(f"{value:.4g}") for name, value in found.items()}


if __name__ == "__main__":
    main()
