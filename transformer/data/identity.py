"""Hashes that tell one corpus from another by its content."""

import hashlib
from collections.abc import Sequence

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
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
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
