"""Which documents are for training, validation and testing, and how long ones are cut into pieces."""

from collections.abc import Iterator

from transformer.data.documents import Corpus, Document

SPLITS = ("train", "validation", "test")
_ROUNDING = 1e-9


def split_documents(
    corpus: Corpus, split: str, *, validation_fraction: float, test_fraction: float
) -> Iterator[Document]:
    """Documents of a split, in order: whole ones at an even stride, or the stretches of the only one there is."""
    if corpus.count == 1:
        for document in corpus.documents():
            yield from _stretch(document, split, validation_fraction, test_fraction)
        return
    assigned = assign(corpus.count, validation_fraction, test_fraction)
    for document, its_split in zip(corpus.documents(), assigned, strict=True):
        if its_split == split:
            yield document


def assign(count: int, validation_fraction: float, test_fraction: float) -> list[str]:
    """The split of each of `count` documents, spread evenly by error diffusion, the first to validation.

    >>> assign(8, 0.25, 0.125)
    ['validation', 'test', 'train', 'train', 'validation', 'train', 'train', 'train']
    """
    fractions = {"validation": validation_fraction, "test": test_fraction}
    # Start full, so that a small corpus has a validation document at all.
    credit = {split: 1.0 - fraction for split, fraction in fractions.items()}
    splits = []
    for _ in range(count):
        for split, fraction in fractions.items():
            credit[split] += fraction
        due = [split for split in fractions if fractions[split] > 0 and credit[split] >= 1 - _ROUNDING]
        splits.append(due[0] if due else "train")
        if due:
            credit[due[0]] -= 1
    return splits


def _stretch(document: Document, split: str, validation_fraction: float, test_fraction: float) -> Iterator[Document]:
    length = len(document.text)
    first = int(length * (1 - validation_fraction - test_fraction))
    second = int(length * (1 - test_fraction))
    start, stop = {"train": (0, first), "validation": (first, second), "test": (second, length)}[split]
    if start < stop:
        prompt = document.prompt if start == 0 else ""
        yield document._replace(text=document.text[start:stop], prompt=prompt)


def cut(text: str, record_bytes: int) -> Iterator[str]:
    """Consecutive pieces of at most `record_bytes` bytes, cut after a newline in their second half or else anywhere.

    >>> list(cut("one\\ntwo\\nthree", 9))
    ['one\\ntwo\\n', 'three']
    """
    data = text.encode()
    start = 0
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
    yield data[start:].decode()
