"""The bytes of UTF-8 as tokens."""

import dataclasses
import json
from collections.abc import Iterable

import numpy as np
from etils import epath
from jaxtyping import Int

from transformer.data.tokenizers.base import Ids, known_ids, saved_fields, write_tokenizer
from transformer.tokenizer import TOKENIZERS, TokenizerKind


class ByteTokenizer:
    """The 256 bytes of UTF-8, then end-of-text."""

    kind = "bytes"
    vocab_size = 257
    end_of_text = 256

    def __init__(self) -> None:
        self.token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Bytes of `text`."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """The text of bytes; invalid UTF-8 becomes U+FFFD."""
        return known_ids(ids, 256).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def save(self, directory: epath.PathLike) -> None:
        """Write the file that `load_tokenizer` reads."""
        write_tokenizer(directory, json.dumps({"kind": "bytes"}))


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class Bytes(TokenizerKind):
    """Bytes of UTF-8."""

    kind = "bytes"

    def train(self, texts: Iterable[str]) -> ByteTokenizer:
        """Nothing to learn."""
        del texts
        return ByteTokenizer()

    def load(self, content: str) -> ByteTokenizer:
        """Nothing to read."""
        saved_fields(content, self.kind)
        return ByteTokenizer()
