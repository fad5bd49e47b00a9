"""Compression of a text by general-purpose compressors, as a baseline for a language model's bits per byte."""

import lzma
import zlib
from collections.abc import Iterable
from typing import Any

MOST_BYTES = 16_000_000
"""Limit of the compressed text: xz takes half a minute for it, and its window is half as large."""
_GZIP = 16 + zlib.MAX_WBITS  # zlib's code for the gzip format


def compressed_bits_per_byte(texts: Iterable[str], most: int = MOST_BYTES) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz` (its default preset) on the texts, joined and encoded as UTF-8.

    A compressor starts without knowledge and learns while reading; a trained model has seen other text before. Both encode the
    same bytes, except for a long text, whose beginning alone is compressed.

    Args:
        texts: read only as far as needed, and not stored.
        most: limit of the compressed bytes.

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
    """The compressors' results on a scored text, for people; `scores` come from `compressed_bits_per_byte`.

    >>> describe_compressed({"gzip": 2.5, "xz": 2.25, "bytes": 1000})
    'on the same bytes gzip -9 2.5, xz 2.25'
    >>> describe_compressed({"gzip": 2.5, "xz": 2.25, "bytes": MOST_BYTES})
    'on its first 16,000,000 bytes gzip -9 2.5, xz 2.25'
    """
    which = "the same" if scores["bytes"] < MOST_BYTES else f"its first {int(scores['bytes']):,}"
    return f"on {which} bytes gzip -9 {scores['gzip']:.4g}, xz {scores['xz']:.4g}"
