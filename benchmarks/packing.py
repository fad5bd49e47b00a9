"""Packing of documents into training rows by this package and by Grain's packers; prints one JSON line for each.

    python benchmarks/packing.py [--tokens 8_000_000] [--seconds 5]

Arrays of token ids in memory, in a shuffled order, are packed into rows of 1,024 tokens (documents of about 100 tokens) or 2,048
tokens (log-normal lengths around 1,000, some of them much longer). All packers have the same arrays.

    fill               share of positions with a token of a document
    pieces_a_document  mean number of rows that hold a part of a document
    tokens_a_core      tokens of documents a second of processor time; 16 rows a batch, the state read every ten batches

Grain's first and best fit refuse documents longer than a row; these are cut into rows first.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from transformer.config import DataConfig
from transformer.data.encoded import Encoded
from transformer.data.pipeline import train_batches
from transformer.data.source import Source
from transformer.data.tokenizers.bytes import Bytes

BATCH, MOST, BINS = 16, 32, 128
LENGTHS = {"100 tokens": 1024, "1,000 tokens": 2048}


def documents(kind: str, tokens: int) -> list[np.ndarray]:
    """Documents of random ids, each after the id that starts a document."""
    random = np.random.default_rng(0)
    median, spread = (100, 0.5) if kind == "100 tokens" else (600, 1.0)
    found, count = [], 0
    while count < tokens:
        length = int(np.clip(random.lognormal(np.log(median), spread), 2, 100_000))
        found.append(np.concatenate([[256], random.integers(0, 256, length)]).astype(np.uint16))
        count += length
    return found


class InMemory:
    """Documents as `data.tokens` gives stored ones."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: Any) -> Encoded:
        return Encoded(self.arrays[index].astype(np.int32), np.zeros(0, np.uint32), True)

    def sizes(self) -> np.ndarray:
        """Targets of each."""
        return np.array([len(array) - 1 for array in self.arrays])


def ours(arrays: list[np.ndarray], length: int, best_fit: bool) -> Any:
    """Batches of the package."""
    source = Source("made up", "0", {"train": len(arrays)}, "", lambda split: [], encoded=lambda *_: InMemory(arrays))
    config = DataConfig(sequence_length=length, batch_size=BATCH, max_segments=MOST, best_fit=best_fit)
    return train_batches(config, Bytes().train(()), sources=[source])


def grains(arrays: list[np.ndarray], length: int, packer: str) -> Any:
    """Batches of one of Grain's packers, of aligned inputs and targets."""
    pieces = [array[start : start + length + 1] for array in arrays for start in range(0, len(array) - 1, length)]
    pairs = [{"inputs": piece[:-1], "targets": piece[1:]} for piece in (arrays if packer == "concat" else pieces)]
    parent = grain.MapDataset.source(pairs).shuffle(seed=0).repeat().to_iter_dataset()
    struct = {"inputs": length, "targets": length}
    make = grain.experimental
    if packer == "concat":
        packed: Any = make.ConcatThenSplitIterDataset(parent, length_struct=struct)
    else:
        kind = make.FirstFitPackIterDataset if packer == "first_fit" else make.BestFitPackIterDataset
        packed = kind(parent, length_struct=struct, num_packing_bins=BINS, max_sequences_per_bin=MOST)
    return iter(packed.batch(BATCH))


def measure(batches: Any, arrays: list[np.ndarray], seconds: float, is_ours: bool) -> dict[str, float]:
    """Fill, cut documents and rate."""
    next(batches)
    begun, processor, tokens, positions, segments, starts = time.perf_counter(), time.process_time(), 0, 0, 0, 0
    while time.perf_counter() - begun < seconds:
        for batch in itertools.islice(batches, 10):
            ids, inputs = (
                (batch.segment_ids, batch.inputs) if is_ours else (batch["inputs_segment_ids"], batch["inputs"])
            )
            tokens, positions = tokens + int(np.count_nonzero(ids)), positions + ids.size
            segments += int(ids.max(axis=1).sum())
            starts += int(np.count_nonzero(inputs == 256))  # the id that each document starts with
        json.dumps(batches.get_state(), default=repr)
    used = time.process_time() - processor
    # A document in n pieces has n segments and one start.
    return {"fill": tokens / positions, "pieces_a_document": segments / starts, "tokens_a_core": tokens / used}


def compare(tokens: int, seconds: float) -> Iterator[dict[str, Any]]:
    """All packers on both kinds of documents."""
    for kind, length in LENGTHS.items():
        arrays = documents(kind, tokens)
        longer = sum(len(array) - 1 > length for array in arrays) / len(arrays)
        made = {
            "in order": lambda arrays=arrays, length=length: (ours(arrays, length, best_fit=False), True),
            "best fit": lambda arrays=arrays, length=length: (ours(arrays, length, best_fit=True), True),
            **{
                f"grain {packer}": lambda arrays=arrays, length=length, packer=packer: (
                    grains(arrays, length, packer),
                    False,
                )
                for packer in ("concat", "first_fit", "best_fit")
            },
        }
        for name, make in made.items():
            batches, is_ours = make()
            found = measure(batches, arrays, seconds, is_ours)
            line = {"documents": kind, "row": length, "longer_than_a_row": longer, "packer": name, **found}
            yield {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in line.items()}


def main() -> None:
    """Print a line for each packer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    for line in compare(options.tokens, options.seconds):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
