"""What a vocabulary is trained on: the texts of a training split, or a sample that is spread over it, in pieces."""

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
    """The training text of sources, or about `limit` bytes of it: pieces of documents that are evenly spread."""
    parts = [source.records("train") for source in sources]
    chosen = spread(parts, _record_bytes, limit)
    whole = itertools.chain.from_iterable(split_text(source, "train") for source in sources)
    texts = whole if chosen is None else (plain_text(record.prompt, record.text) for record in chosen)
    return (piece for text in texts for piece in in_pieces(text, _PIECE))


def spread(parts: Sequence[Sequence[Item]], size: Callable[[Item], int], limit: int) -> Iterator[Item] | None:
    """About `limit` bytes of items, evenly spread over all parts; None if they have no more than that.

    >>> list(spread([["ab"] * 3, list("cdef")], len, 5))
    ['ab', 'd', 'f']
    """
    items = itertools.chain.from_iterable(map(_each, parts))
    if all(total <= limit for total in itertools.accumulate(map(size, items))):
        return None
    total = 0.0
    for part in parts:
        places = sampled(len(part))
        total += len(part) * sum(size(part[place]) for place in places) / max(1, len(places))
    share = limit / max(total, limit)
    return (
        part[place] for part in parts for place in range(len(part)) if int((place + 1) * share) > int(place * share)
    )


def _each(part: Sequence[Item]) -> Iterator[Item]:
    return (part[place] for place in range(len(part)))


def _record_bytes(record: Record) -> int:
    return len(record.text.encode()) + len(record.prompt.encode())
