"""What general-purpose compressors make of a text: the bar a language model's bits per byte stand against."""

import gzip
import lzma
from collections.abc import Iterable


def compressed_bits_per_byte(texts: Iterable[str]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz` (its default preset) on the texts, joined and encoded as UTF-8.

    A compressor starts from nothing and learns as it reads; a trained model has seen other text before. Both spend
    these bits on the same bytes.

    Example:
        >>> scores = compressed_bits_per_byte(["to be or not to be " * 100])
        >>> sorted(scores)
        ['gzip', 'xz']
    """
    data = "".join(texts).encode()
    if not data:
        raise ValueError("Compressors need at least one byte of text, got none.")
    return {
        "gzip": 8 * len(gzip.compress(data, compresslevel=9)) / len(data),
        "xz": 8 * len(lzma.compress(data)) / len(data),
    }
