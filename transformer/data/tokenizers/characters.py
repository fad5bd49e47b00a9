"""The characters of a corpus as tokens."""

import dataclasses
import json
from collections.abc import Iterable

import numpy as np
from etils import epath
from jaxtyping import Int

from transformer.data.tokenizers.base import Ids, known_ids, saved_fields, write_tokenizer
from transformer.tokenizer import TOKENIZERS, TokenizerKind


class CharacterTokenizer:
    """End-of-text (0), unknown (1), then the characters of the training split in code point order."""

    kind = "characters"
    end_of_text = 0
    unknown = 1

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size = 2 + len(characters)
        # Unknown counts 0 bytes: it stands for no particular character, so it must not count as a predicted byte.
        self.token_bytes = np.array([0, 0] + [len(c.encode()) for c in characters], np.int32)
        points = np.array([ord(c) for c in characters], np.int64)
        self._id_of_point = np.full(points.max(initial=0) + 2, self.unknown, np.int32)
        self._id_of_point[points] = np.arange(2, self.vocab_size)
        self._text_of_id = np.array(["", "\N{REPLACEMENT CHARACTER}", *characters], dtype=object)

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """One id per character."""
        points = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
        return self._id_of_point[np.minimum(points, len(self._id_of_point) - 1)]

    def decode(self, ids: Ids) -> str:
        """The text of ids; the unknown character becomes U+FFFD."""
        return "".join(self._text_of_id[known_ids(ids, self.vocab_size)])

    def save(self, directory: epath.PathLike) -> None:
        """Write the file that `load_tokenizer` reads."""
        write_tokenizer(directory, json.dumps({"kind": "characters", "characters": self.characters}))


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class Characters(TokenizerKind):
    """The characters of the training split."""

    kind = "characters"

    def train(self, texts: Iterable[str]) -> CharacterTokenizer:
        """The characters that occur."""
        characters = set[str]()
        for text in texts:
            characters.update(text)
        return CharacterTokenizer("".join(sorted(characters)))

    def load(self, content: str) -> CharacterTokenizer:
        """Read the saved characters."""
        return CharacterTokenizer(saved_fields(content, self.kind)["characters"])
