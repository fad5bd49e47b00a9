"""Time and memory from labelled texts to batches; prints one JSON line for each size and phase.

    python benchmarks/examples.py [--megabytes 10 100] [--text-bytes 1000] [--vocab-size 4096] [--keep FOLDER]

Each phase runs in a new process, on one .jsonl file of made-up texts of two classes:

    first        open the file for the first time, which stores its examples
    open         open it again
    memory       open it where nothing can be written: its examples are read into memory
    tokens       the first batch, which includes tokenizing the texts
    read         batches of examples encoded when they are read, and of stored tokens; `times` is the ratio of their speeds

`peak_mb` is the largest resident memory of the process, and `imports_mb` its memory before it opens anything.
"""

import argparse
import dataclasses
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

from data import write_corpus

PHASES = ("first", "open", "memory", "tokens", "read")
READ_SECONDS = 8


def run_phase(phase: str, corpus: pathlib.Path, vocab_size: int) -> dict[str, Any]:
    """Run a phase and measure its time."""
    from transformer.config import DataConfig  # noqa: PLC0415
    from transformer.data import example_store  # noqa: PLC0415
    from transformer.data.datasets import open_data  # noqa: PLC0415
    from transformer.data.tokenizers import load_tokenizer  # noqa: PLC0415
    from transformer.data.tokenizers.bpe import BytePairs  # noqa: PLC0415
    from transformer.objectives.classification import Classification  # noqa: PLC0415

    folder, kind = corpus.parent, BytePairs(size=vocab_size)
    config = DataConfig(
        source=(str(corpus),), data_dir=str(folder / "prepared"), sequence_length=512, batch_size=32, tokenizer=kind
    )
    if phase == "memory":

        def refuse(*_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        vars(example_store)["_write"] = refuse
        config = dataclasses.replace(config, data_dir=str(folder / "nowhere"))
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    begun = time.perf_counter()
    data: Any = open_data(config, Classification())
    seconds = time.perf_counter() - begun
    found = {"seconds": seconds, "imports_mb": imports}
    if phase in ("first", "open", "memory"):
        return found
    if not (folder / "tokenizer").exists():
        data.make_tokenizer().save(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer", kind)
    if phase == "tokens":
        begun = time.perf_counter()
        next(data.train_batches(tokenizer))
        return found | {"seconds": time.perf_counter() - begun}
    anew = dataclasses.replace(data, source=dataclasses.replace(data.source, tokens=None))
    encoded, stored = (_rate(each.train_batches(tokenizer)) for each in (anew, data))
    return found | {"encoded_tokens_a_core": encoded, "tokens_a_core": stored, "times": stored / encoded}


def _rate(batches: Any) -> float:
    """Tokens for each second of a processor; a chunk of batches is made at once, so that whole chunks are counted."""
    used, count, begun = time.process_time(), 0, time.perf_counter()
    while time.perf_counter() - begun < READ_SECONDS:
        for batch in itertools.islice(batches, 64):
            count += int(batch.segment_ids.sum())
    return count / (time.process_time() - used)


def main() -> None:
    """Run every phase of every size in child processes; or one phase, in a child process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 100])
    parser.add_argument("--text-bytes", type=int, default=1000)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--phases", nargs="+", default=PHASES)
    parser.add_argument("--keep", type=pathlib.Path)
    parser.add_argument("--phase")
    options = parser.parse_args()
    if options.phase:
        found = run_phase(options.phase, options.keep, options.vocab_size)
        print(json.dumps(found | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}))
        return
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as aside:
            folder = (options.keep or pathlib.Path(aside)) / f"{megabytes:g}"
            folder.mkdir(parents=True, exist_ok=True)
            corpus = folder / "corpus.jsonl"
            if not corpus.exists():
                _write_labelled(corpus, megabytes, options.text_bytes)
            for phase in options.phases:
                line = {"phase": phase, "megabytes": megabytes, "text_bytes": options.text_bytes}
                print(json.dumps(line | _measure(phase, corpus, options.vocab_size)), flush=True)


def _write_labelled(path: pathlib.Path, megabytes: float, text_bytes: int) -> None:
    write_corpus(path, megabytes, text_bytes)
    aside = path.with_suffix(".aside")
    with path.open() as texts, aside.open("w") as file:
        for number, line in enumerate(texts):
            file.write(json.dumps(json.loads(line) | {"label": ("no", "yes")[number % 3 > 0]}) + "\n")
    aside.replace(path)
    time.sleep(3)  # a file that has just changed is read again at the next start


def _measure(phase: str, corpus: pathlib.Path, vocab_size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--phase", phase, "--keep", str(corpus), "--vocab-size", str(vocab_size)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: float(f"{value:.4g}") for name, value in found.items()}


if __name__ == "__main__":
    main()
