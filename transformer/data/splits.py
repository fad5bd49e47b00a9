"""The assignment of text to training, validation and test splits, and the division of long documents into pieces."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from transformer.data.documents import CONVERSATION, Corpus, Document
from transformer.data.long_text import LongText, Text, chunks
from transformer.types import UserError

SPLITS = ("train", "validation", "test")
SPLIT_RULE = 2  # part of a corpus's identity: another rule gives other splits of the same text
_TOLERANCE = 0.2  # relative error of a share, beyond which documents are cut
_GOLDEN_RATIO = 0.6180339887498949
_ROUNDING = 1e-9

Parts = Int[np.ndarray, "documents 3"]
"""Bytes of each document in training, validation and test, which are consecutive parts of it in this order."""


def split_documents(corpus: Corpus, parts: Parts) -> Iterator[tuple[str, Document]]:
    """Each document, in order, with its split: whole, or as several parts by `parts`; the prompt belongs to the first part."""
    for document, of_document in itertools.zip_longest(corpus.documents(), parts):
        if document is None or of_document is None:
            raise UserError(
                f"A source must stay as it is while it is prepared, the number of texts in {corpus.name} changed; start again."
            )
        yield from split_document(document, of_document)


def split_document(document: Document, of_document: Int[np.ndarray, " 3"]) -> Iterator[tuple[str, Document]]:
    """A document with its split: whole, or as several parts by its row of `Parts`."""
    if np.count_nonzero(of_document) == 1 or document.prompt == CONVERSATION:  # whole, in the split of its largest part
        yield SPLITS[of_document.argmax()], document
        return
    prompt = document.prompt
    for split, size, part in zip(SPLITS, of_document, _parts(document.text, of_document.tolist()), strict=True):
        if size > 0 and part:
            yield split, document._replace(text=part, prompt=prompt)
            prompt = ""


def divide(sizes: Sequence[int] | np.ndarray, validation_fraction: float, test_fraction: float) -> Parts:
    """The number of bytes of each document in each split, such that each split has its share of the text.

    Whole documents at an even stride are held out. If that misses a share by more than a fifth, documents are chosen by size, as
    evenly spaced as possible, and missing bytes are cut from the end of the longest document. A lone document is cut. Training
    and each requested split receive at least one byte.

    Args:
        sizes: bytes of the documents.
        validation_fraction: share of all bytes.
        test_fraction: share of all bytes; training has the remaining share.

    >>> divide([10, 10, 10, 10], 0.25, 0).tolist()
    [[0, 10, 0], [10, 0, 0], [10, 0, 0], [10, 0, 0]]
    >>> divide([31, 4], 0.1, 0).tolist()
    [[31, 0, 0], [0, 4, 0]]
    >>> divide([100], 0.1, 0.1).tolist()
    [[80, 10, 10]]
    """
    whole = np.zeros((len(sizes), 3), np.int64)
    whole[np.arange(len(sizes)), assign(len(sizes), validation_fraction, test_fraction)] = sizes
    total = int(np.sum(sizes))
    second = int(total * (1 - test_fraction))
    wanted = {1: second - int(total * (1 - validation_fraction - test_fraction)), 2: total - second}
    wanted = {
        column: max(1, wanted[column])
        for column, fraction in ((1, validation_fraction), (2, test_fraction))
        if fraction > 0
    }
    if sum(wanted.values()) == total:
        wanted[max(wanted, key=wanted.__getitem__)] -= 1
    training = max(0, total - sum(wanted.values()))
    # The two errors must not add up to too much of training's share.
    slack = {column: min(_TOLERANCE * size, _TOLERANCE / 2 * training) for column, size in wanted.items()}
    if all(abs(whole[:, column].sum() - size) <= slack[column] for column, size in wanted.items()):
        return whole
    parts = np.zeros_like(whole)
    parts[:, 0] = sizes
    for column, size in wanted.items():
        _fill(parts, column, size, slack[column])
    return parts


def _fill(parts: Parts, column: int, size: int, slack: float) -> None:
    """Move `size` bytes, within `slack`, from training to another split: whole documents, then a part of one."""
    whole = parts[:, 0] == parts.sum(axis=1)
    lengths, taken = parts[:, 0].copy(), 0
    # Otherwise all documents that are short for their number would be held out, to compensate for one that is too long.
    most = max(1, round(2 * len(parts) * size / max(1, parts.sum())))
    longest_first, longest = np.argsort(-lengths, kind="stable"), 0
    for index in np.argsort(np.arange(len(parts)) * _GOLDEN_RATIO % 1.0, kind="stable"):
        missing, length = size - taken, lengths[index]
        if missing <= slack or (most <= 0 and parts[longest_first[longest], 0] >= 2 * missing):
            break
        if whole[index] and 0 < length < 2 * missing and taken + length <= size + slack:
            parts[index, 0], parts[index, column] = 0, length
            taken, most = taken + length, most - 1
            while longest + 1 < len(parts) and parts[longest_first[longest], 0] == 0:
                longest += 1
    if size - taken > slack:
        index = parts[:, 0].argmax()
        cut_off = min(size - taken, parts[index, 0])
        parts[index, 0] -= cut_off
        parts[index, column] += cut_off


def hold_out(classes: Int[np.ndarray, " n"], fraction: float) -> Int[np.ndarray, " m"]:
    """The indices of held-out examples, ascending: a share of each class, drawn at random with a fixed seed.

    A class with two or more examples has one on either side, the largest classes first, as long as one and a half times the share
    is not exceeded. The only example of a class stays in training.

    Args:
        classes: the classes of the examples; all equal for examples without classes.
        fraction: share of all examples; of two or more examples, at least one is held out.

    >>> hold_out(np.array([0] * 18 + [1] * 2), 0.1).tolist()
    [1, 18]
    """
    _, of_class, counts = np.unique(classes, return_inverse=True, return_counts=True)
    if len(counts) == len(classes):  # one example per class
        of_class, counts = np.zeros_like(of_class), np.array([len(classes)])
    total, available = len(classes), counts - 1
    largest_first = np.argsort(-counts, kind="stable")
    several = largest_first[available[largest_first] > 0]
    wanted = max(1, round(fraction * total), min(len(several), int(1.5 * fraction * total)))
    wanted = min(wanted, available.sum())
    taken = np.zeros_like(counts)
    taken[several[:wanted]] = 1
    missing = np.maximum(fraction * counts - taken, 0)
    spread = np.floor(missing * (wanted - taken.sum()) / max(missing.sum(), 1e-9)).astype(int)
    taken = np.minimum(taken + spread, available)
    while taken.sum() < wanted:
        taken[np.argmax(np.where(taken < available, fraction * counts - taken, -np.inf))] += 1
    random = np.random.RandomState(0)
    members = np.split(np.argsort(of_class, kind="stable"), np.cumsum(counts)[:-1])
    drawn = [part[random.permutation(len(part))[:count]] for part, count in zip(members, taken, strict=True)]
    return np.sort(np.concatenate(drawn))


def assign(count: int, validation_fraction: float, test_fraction: float) -> list[int]:
    """The split (an index of `SPLITS`) of each of `count` documents, evenly spaced by error diffusion; validation comes first.

    >>> assign(8, 0.25, 0.125)
    [1, 2, 0, 0, 1, 0, 0, 0]
    """
    fractions = {1: validation_fraction, 2: test_fraction}
    # Start full, which gives even a small corpus a validation document.
    credit = {split: 1.0 - fraction for split, fraction in fractions.items()}
    splits = []
    for _ in range(count):
        for split, fraction in fractions.items():
            credit[split] += fraction
        due = [split for split in fractions if fractions[split] > 0 and credit[split] >= 1 - _ROUNDING]
        splits.append(due[0] if due else 0)
        if due:
            credit[due[0]] -= 1
    return splits


def _parts(text: Text, sizes: Sequence[int]) -> Sequence[Text]:
    """Consecutive parts of about these sizes in bytes, each of at least one character if there are enough."""
    if isinstance(text, LongText):
        return text.parts(sizes)
    data, parts, start = text.encode(), [], 0
    for index, size in enumerate(sizes):
        stop = len(data[: sum(sizes[: index + 1])].decode(errors="ignore"))
        later = sum(size > 0 for size in sizes[index + 1 :])
        stop = max(start, min(max(stop, start + (size > 0)), len(text) - later))
        parts.append(text[start:stop])
        start = stop
    return parts


def cut(text: Text, record_bytes: int) -> Iterator[str]:
    """Consecutive pieces of at most `record_bytes` bytes, cut after a newline in their second half or else anywhere.

    >>> list(cut("one\\ntwo\\nthree", 9))
    ['one\\ntwo\\n', 'three']
    """
    data = b""
    for chunk in chunks(text):
        data, start = data + chunk, 0
        while len(data) - start > record_bytes:
            stop = start + record_bytes
            newline = data.rfind(b"\n", start + record_bytes // 2, stop)
            if newline >= 0:
                stop = newline + 1
            else:
                while data[stop] & 0xC0 == 0x80:  # inside a character
                    stop -= 1
            yield data[start:stop].decode()
            start = stop
        data = data[start:]
    yield data.decode()
