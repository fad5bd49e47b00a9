"""A tokenizer for token ids without a known vocabulary: an id's text is its number."""

import dataclasses
import json
from collections.abc import Iterable

import numpy as np
from etils import epath
from jaxtyping import Int

from transformer.data.tokenizers.base import Ids, known_ids, saved_fields, write_tokenizer
from transformer.tokenizer import TOKENIZERS, TokenizerKind
from transformer.validation import require


class IdTokenizer:
    """Ids from 0, one of which ends documents. No id has bytes, so there is no score per byte."""

    kind = "ids"

    def __init__(self, settings: "IdNumbers") -> None:
        self.vocab_size, self.end_of_text, self.settings = settings.vocab_size, settings.end_of_text, settings
        self.begin = (settings.end_of_text if settings.begin < 0 else settings.begin,)
        self.token_bytes = np.zeros(self.vocab_size, np.int32)

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """The ids written in a text, separated by white space; anything that is not the number of an id is skipped."""
        numbers = [int(word) for word in text.split() if word.isascii() and word.isdecimal() and len(word) < 9]
        return known_ids(numbers, self.vocab_size).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """The ids as numbers; ids that begin or end documents are dropped."""
        shown = known_ids(ids, self.vocab_size)
        return " ".join(map(str, shown[~np.isin(shown, (self.end_of_text, *self.begin))].tolist()))

    def save(self, directory: epath.PathLike) -> None:
        """Write what `load_tokenizer` reads."""
        write_tokenizer(directory, json.dumps({"kind": self.kind}))


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class IdNumbers(TokenizerKind):
    """Ids without text, as in token files (.bin); the default vocabulary size is GPT-2's."""

    kind = "ids"

    vocab_size: int = 50257
    """Number of ids; every id is smaller."""
    end_of_text: int = 50256
    """The id that ends a document, or stands between two documents."""
    begin: int = -1
    """The id that begins a document; -1 means `end_of_text`."""

    def __post_init__(self) -> None:
        require(1 <= self.vocab_size <= 2**24, f"IdNumbers.vocab_size must be from 1 to 2^24, got {self.vocab_size}.")
        require(
            0 <= self.end_of_text < self.vocab_size and -1 <= self.begin < self.vocab_size,
            f"IdNumbers.end_of_text and begin must be ids below vocab_size={self.vocab_size}, got {self.end_of_text} and "
            f"{self.begin}; if no id ends a document, increase vocab_size by one and let end_of_text be the last id.",
        )

    def train(self, texts: Iterable[str]) -> IdTokenizer:
        """Nothing to learn."""
        del texts
        return IdTokenizer(self)

    def load(self, content: str) -> IdTokenizer:
        """Nothing to read."""
        saved_fields(content, self.kind)
        return IdTokenizer(self)
