"""Training text of a vocabulary: the texts of a training split, or a sample evenly spaced over it, in pieces."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from transformer.data.documents import plain_text
from transformer.data.identity import sampled
from transformer.data.source import Record, Source, split_text
from transformer.data.tokenizers.long import in_pieces

Item = TypeVar("Item")

_PIECE = 1 << 16


def vocabulary_texts(sources: Sequence[Source], limit: int) -> Iterator[str]:
    """The training text of sources, or about `limit` bytes of it: pieces of evenly spaced documents."""
    parts = [source.records("train") for source in sources]
    chosen = evenly_spaced(parts, _record_bytes, limit)
    whole = itertools.chain.from_iterable(split_text(source, "train") for source in sources)
    texts = whole if chosen is None else (plain_text(record.prompt, record.text) for record in chosen)
    return (piece for text in texts for piece in in_pieces(text, _PIECE))


def evenly_spaced(parts: Sequence[Sequence[Item]], size: Callable[[Item], int], limit: int) -> Iterator[Item] | None:
    """About `limit` bytes of items, evenly spaced over all parts; None if the parts have no more than that.

    >>> list(evenly_spaced([["ab"] * 3, list("cdef")], len, 5))
    ['ab', 'd', 'f']
    """
    items = itertools.chain.from_iterable(map(_each, parts))
    if all(total <= limit for total in itertools.accumulate(map(size, items))):
        return None
    total = 0.0
    for part in parts:
        indices = sampled(len(part))
        total += len(part) * sum(size(part[index]) for index in indices) / max(1, len(indices))
    share = limit / max(total, limit)
    return (
        part[index] for part in parts for index in range(len(part)) if int((index + 1) * share) > int(index * share)
    )


def _each(part: Sequence[Item]) -> Iterator[Item]:
    return (part[index] for index in range(len(part)))


def _record_bytes(record: Record) -> int:
    return len(record.text.encode()) + len(record.prompt.encode())
