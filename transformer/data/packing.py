"""How documents share training rows, computed from their sizes: in order or best fit, and the amounts of cuts and padding."""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from transformer.data.encoded import Encoded
from transformer.validation import counted

ROWS_OF_CHUNK = 128  # packed together by best fit: rows are 99 % full; with 64, 98 %, and with 256, 99.5 %
_REGIONS = 8
_MOST_TOKENS = 1 << 20
_MUCH = 0.1  # padding above this share gets a hint


# ---- In their order --------------------------------------------------------------------------------------------------


def packed_tokens(sizes: Iterable[int], length: int, most: int) -> int:
    """Tokens of consecutive records of these sizes, and the padding at the end of rows with `most` records (0: any number).

    >>> packed_tokens([3, 1, 1, 6], length=8, most=0), packed_tokens([3, 1, 1, 6], length=8, most=3)
    (11, 14)
    """
    total = segment = 0
    for size in sizes:
        if size > 0 and segment == most > 0:
            total, segment = -(-total // length) * length, 0
        rows = (total + size) // length - total // length
        total += size
        # A record that ends exactly at the end of a row has no part in the next row.
        segment = (int(total % length > 0) if rows else segment + 1) if size else segment
    return total


def _parts_in_order(sizes: Iterable[int], length: int, most: int) -> Iterator[list[int]]:
    """For each record, the sizes of its parts in different rows, packed in order as in `packed_tokens`."""
    column = segment = 0
    for size in sizes:
        parts = list[int]()
        while size > 0:
            if column == length or segment == most > 0:
                column = segment = 0
            parts.append(min(size, length - column))
            size, column, segment = size - parts[-1], column + parts[-1], segment + 1
        yield parts


# ---- Best fit --------------------------------------------------------------------------------------------------------


def best_fit(sizes: Sequence[int], length: int, most: int) -> list[list[int]]:
    """Rows of at most `most` parts (0: any number), by best-fit decreasing: each part, longest first, goes into the fullest row.

    >>> best_fit([3, 1, 5, 2, 4], length=8, most=0), best_fit([3, 1, 5, 2, 4], length=8, most=2)
    ([[2, 0], [4, 3, 1]], [[2, 0], [4, 3], [1]])
    """
    rows = list[list[int]]()
    room = list[tuple[int, int]]()  # free tokens of each row that accepts more, in ascending order
    for part in np.argsort(np.negative(sizes), kind="stable").tolist():
        size = sizes[part]
        at = bisect.bisect_left(room, (size, 0))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(part)
        if left > size and len(rows[row]) != most:
            bisect.insort(room, (left - size, row))
    return rows


def row_parts(size: int, length: int) -> list[int]:
    """The parts of a record, which is cut only if it is longer than a row.

    >>> row_parts(8, length=8), row_parts(19, length=8)
    ([8], [8, 8, 3])
    """
    return [min(length, size - start) for start in range(0, size, length)]


def best_fit_tokens(sizes: Sequence[int], length: int, most: int, streams: int) -> int:
    """Tokens and padding of one epoch of records, packed by best fit in chunks of about `ROWS_OF_CHUNK` rows per stream."""
    rows = 0
    for stream in range(streams):
        tokens, parts = 0, list[int]()
        for size in sizes[stream::streams]:
            tokens += size
            parts += row_parts(size, length)
            if tokens >= ROWS_OF_CHUNK * length:
                rows, tokens, parts = rows + len(best_fit(parts, length, most)), 0, []
        rows += len(best_fit(parts, length, most))
    return rows * length


# ---- Statistics of a sample -------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """A document of a sample."""

    sizes: list[int]
    """Targets of the records that were read."""
    whole: bool
    """Whether the document is one record."""


def sample_documents(records: Sequence[Encoded], at_most: int) -> list[Document]:
    """Documents from eight parts of a split: about `at_most` records, or a million tokens if that is less."""
    found = list[Document]()
    regions = max(1, min(_REGIONS, len(records)))
    for region in range(regions):
        start, stop = (len(records) * part // regions for part in (region, region + 1))
        documents, tokens = [Document([], True)], 0
        for record in map(records.__getitem__, range(start, min(stop, start + -(-at_most // regions)))):
            sizes = [*documents[-1].sizes, record.num_targets]
            documents[-1] = Document(sizes, record.last and len(sizes) == 1)
            documents += [Document([], True)] * record.last
            tokens += record.num_targets
            if tokens > _MOST_TOKENS // regions:
                break
        if start > 0 and not records[start - 1].last:
            # Drop the last document, which is incomplete, unless it is the only one.
            documents = [document for document in documents[1:] if document.sizes] or [
                documents[0]._replace(whole=False)
            ]
        found += [document for document in documents if sum(document.sizes) > 0]
    return found


class Packing(NamedTuple):
    """The effect of packing on documents."""

    padding: float
    """The fraction of tokens in rows that is padding."""
    cut: float
    """The fraction of documents that is cut."""
    lost: float
    """Lost context: earlier tokens of a target's document that are not in its row; the mean over all targets."""


def packing_of(documents: Sequence[Document], length: int, most: int, streams: int) -> Packing:
    """The statistics of documents packed in order (0 streams), or distributed over streams and packed by best fit."""
    sizes = [size for document in documents for size in document.sizes]
    if streams > 0:
        total = best_fit_tokens(sizes, length, most, streams)
        parts: Iterator[list[int]] = (row_parts(size, length) for size in sizes)
    else:
        total, parts = packed_tokens(sizes, length, most), _parts_in_order(sizes, length, most)
    cut = lost = 0
    for document in documents:
        of_document = list(itertools.chain.from_iterable(itertools.islice(parts, len(document.sizes))))
        cut += not document.whole or len(of_document) > 1
        before = 0
        for part in of_document:
            lost, before = lost + before * part, before + part
    return Packing(1 - sum(sizes) / total, cut / len(documents), lost / sum(sizes))


def describe_packing(documents: Sequence[Document], length: int, most: int, streams: int) -> str:
    """`packing_of` as a line, followed by a hint if padding is high; empty without documents."""
    if not documents:
        return ""
    found = packing_of(documents, length, most, streams)
    line = (
        f"rows of {counted(len(documents), 'document')}: {found.padding:.0%} padding, {found.cut:.0%} cut, mean context lost "
        f"{counted(round(found.lost), 'token')}"
    )
    if found.padding < _MUCH:
        return line
    if most > 0 and packing_of(documents, length, 0, streams).padding < found.padding - _MUCH / 2:
        remedy = (
            f"A row ends after {most} documents; a larger data.max_segments packs more (0: any number, for which attention on a "
            "GPU has no fused kernel)."
        )
    elif streams > 1:
        remedy = f"Each of {streams} streams fills few rows; a smaller data.num_streams packs more."
    else:
        return line
    return f"{line}\n{remedy}"
