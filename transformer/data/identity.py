"""Hashes that tell one corpus from another by its content."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

_SAMPLED_EXAMPLES = 1024


class ContentHash:
    """SHA-256 of a sequence of tuples of strings, bytes and numbers, each told from its neighbours."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, *parts: str | bytes | int | float) -> None:
        """Append a tuple."""
        self._digest.update(len(parts).to_bytes(8, "big"))
        for part in parts:
            self._add(part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass"))

    def add_text(self, num_bytes: int, chunks: Iterable[bytes], prompt: str) -> None:
        """As `add(text, prompt)`, of a text of so many bytes that comes in pieces."""
        self._digest.update((2).to_bytes(8, "big") + num_bytes.to_bytes(8, "big"))
        for chunk in chunks:
            self._digest.update(chunk)
        self._add(prompt.encode("utf-8", "surrogatepass"))

    def _add(self, data: bytes) -> None:
        self._digest.update(len(data).to_bytes(8, "big"))
        self._digest.update(data)

    def ended(self, *parts: str | bytes | int | float) -> str:
        """The digest behind a last tuple."""
        self.add(*parts)
        return self.hexdigest()

    def hexdigest(self) -> str:
        """Of everything added so far."""
        return self._digest.hexdigest()


def sampled(count: int) -> Sequence[int]:
    """Indices of the examples that stand for a large split: evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_EXAMPLES)).round().astype(int)).tolist()
