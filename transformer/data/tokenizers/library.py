"""Tokenizers of the `tokenizers` library: what they have in common, and those of words."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int

from transformer.data.files import without_surrogates
from transformer.data.tokenizers.base import END_OF_TEXT, Ids, known_ids, write_tokenizer
from transformer.validation import require

UNKNOWN = "<|unknown|>"


class LibraryTokenizer:
    """What tokenizers of the `tokenizers` library have in common."""

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        # A document may contain the text "<|endoftext|>": it is then text, not the end.
        model.encode_special_tokens = True
        self._model = model
        self.vocab_size = model.get_vocab_size()

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Ids of `text`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
        """Ids of each text."""
        # Unlike `encode`, this lets other threads run meanwhile: the one that feeds the device must not wait.
        encodings = self._model.encode_batch_fast([without_surrogates(text) for text in texts])
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Ids) -> str:
        """Text of ids; what is not UTF-8 becomes U+FFFD."""
        return self._model.decode(known_ids(ids, self.vocab_size).tolist())

    def to_json(self) -> str:
        """The file of the `tokenizers` library."""
        return self._model.to_str()

    def save(self, directory: epath.PathLike) -> None:
        """Write the JSON of the `tokenizers` library."""
        write_tokenizer(directory, self.to_json())


def read_library(content: str, kind: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a file, whose model must be of a kind.

    Raises:
        ValueError: it is of another, or no such file.
    """
    fields = json.loads(content)
    model = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(model, dict) or model.get("type") != kind:
        raise ValueError(f"it has {content[:80]!r}")
    return tokenizers.Tokenizer.from_str(content)


class WordTokenizer(LibraryTokenizer):
    """Lower-case words, or pieces of them (WordPiece, as in Devlin et al. 2019); end-of-text is 0, unknown 1.

    Case, accents and spaces are lost, so that `decode` gives a likeness of the text and bits per byte mean nothing.
    """

    end_of_text = 0
    unknown = 1

    def __init__(self, model: tokenizers.Tokenizer, kind: str) -> None:
        super().__init__(model)
        self.kind = kind
        self.token_bytes = np.zeros(self.vocab_size, np.int32)


def train_words(model: Any, trainer: Any, texts: Iterable[str], size: int) -> Any:
    """A model of lower-case words, trained.

    Raises:
        UserError: the vocabulary has no room for each character as a piece that begins a word and one that goes on with it.
    """
    model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.train_from_iterator(texts, trainer)
    needed = model.get_vocab_size()
    require(
        needed <= size,
        f"data.tokenizer.size must be at least {needed} for the characters of these texts, got {size}; "
        "data.tokenizer.kind=words can have fewer.",
    )
    return model


SPECIAL: Any = {"special_tokens": [END_OF_TEXT, UNKNOWN], "show_progress": False}
"""Arguments of the trainer of words: the first two ids, and no bar."""
