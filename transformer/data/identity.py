"""Hashes that identify corpora by their content."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

_SAMPLED_EXAMPLES = 1024


class ContentHash:
    """SHA-256 of a sequence of tuples of strings, bytes and numbers, with unambiguous boundaries."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, *parts: str | bytes | int | float) -> None:
        """Append a tuple."""
        self._digest.update(len(parts).to_bytes(8, "big"))
        for part in parts:
            self._add(part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass"))

    def add_text(self, num_bytes: int, chunks: Iterable[bytes], prompt: str) -> None:
        """Equivalent to `add(text, prompt)` for a text of `num_bytes` bytes in pieces."""
        self._digest.update((2).to_bytes(8, "big") + num_bytes.to_bytes(8, "big"))
        for chunk in chunks:
            self._digest.update(chunk)
        self._add(prompt.encode("utf-8", "surrogatepass"))

    def _add(self, data: bytes) -> None:
        self._digest.update(len(data).to_bytes(8, "big"))
        self._digest.update(data)

    def ended(self, *parts: str | bytes | int | float) -> str:
        """The digest after a last tuple."""
        self.add(*parts)
        return self.hexdigest()

    def hexdigest(self) -> str:
        """The digest of all tuples so far."""
        return self._digest.hexdigest()


def sampled(count: int) -> Sequence[int]:
    """Indices of the examples that represent a large split: evenly spaced, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_EXAMPLES)).round().astype(int)).tolist()
