"""What general-purpose compressors make of a text: the bar a language model's bits per byte stand against."""

import lzma
import zlib
from collections.abc import Iterable
from typing import Any

MOST_BYTES = 16_000_000
"""Compressors are given so much of a text at most: xz takes half a minute for it, and its window is half as large."""
_GZIP = 16 + zlib.MAX_WBITS  # zlib's number for the format of gzip


def compressed_bits_per_byte(texts: Iterable[str], most: int = MOST_BYTES) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz` (its default preset) on the texts, joined and encoded as UTF-8.

    A compressor starts from nothing and learns as it reads; a trained model has seen other text before. Both spend
    these bits on the same bytes, but of a long text compressors are given the beginning alone.

    Args:
        texts: read no further than is needed, and not kept.
        most: bytes that are compressed at most.

    Returns:
        Bits per byte of `gzip` and `xz`, and the `bytes` that were compressed.

    Example:
        >>> scores = compressed_bits_per_byte(["to be or not to be " * 100])
        >>> sorted(scores), scores["bytes"]
        (['bytes', 'gzip', 'xz'], 1900)
    """
    compressors: dict[str, Any] = {
        "gzip": zlib.compressobj(9, zlib.DEFLATED, _GZIP),
        "xz": lzma.LZMACompressor(),
    }
    sizes, total = dict.fromkeys(compressors, 0), 0
    for text in texts:
        data = text.encode()[: most - total]
        total += len(data)
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.compress(data))
        if total == most:
            break
    if not total:
        raise ValueError("Compressors need at least one byte of text, got none.")
    for name, compressor in compressors.items():
        sizes[name] += len(compressor.flush())
    return {**{name: 8 * size / total for name, size in sizes.items()}, "bytes": total}


def describe_compressed(scores: dict[str, float]) -> str:
    """What compressors make of the text that a model was scored on, for people; `scores` are of `compressed_bits_per_byte`.

    >>> describe_compressed({"gzip": 2.5, "xz": 2.25, "bytes": 1000})
    'on the same bytes gzip -9 2.5, xz 2.25'
    >>> describe_compressed({"gzip": 2.5, "xz": 2.25, "bytes": MOST_BYTES})
    'on its first 16,000,000 bytes gzip -9 2.5, xz 2.25'
    """
    which = "the same" if scores["bytes"] < MOST_BYTES else f"its first {int(scores['bytes']):,}"
    return f"on {which} bytes gzip -9 {scores['gzip']:.4g}, xz {scores['xz']:.4g}"
