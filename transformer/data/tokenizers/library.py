"""The base of tokenizers of the `tokenizers` library, and the word tokenizer."""

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
    """Base of tokenizers of the `tokenizers` library."""

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        # A document may contain the text "<|endoftext|>": there it is text, not the end of the document.
        model.encode_special_tokens = True
        self._model = model
        self.vocab_size = model.get_vocab_size()

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Ids of `text`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
        """Ids of each text."""
        # Unlike `encode`, this call releases the GIL, and the thread that feeds the device need not wait.
        encodings = self._model.encode_batch_fast([without_surrogates(text) for text in texts])
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Ids) -> str:
        """The text of ids; invalid UTF-8 becomes U+FFFD."""
        return self._model.decode(known_ids(ids, self.vocab_size).tolist())

    def to_json(self) -> str:
        """The JSON file of the `tokenizers` library."""
        return self._model.to_str()

    def save(self, directory: epath.PathLike) -> None:
        """Write the JSON file of the `tokenizers` library."""
        write_tokenizer(directory, self.to_json())


def read_library(content: str, kind: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a file, whose model must be of the given kind.

    Raises:
        ValueError: the model is of another kind, or the content is no such file.
    """
    fields = json.loads(content)
    model = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(model, dict) or model.get("type") != kind:
        raise ValueError(f"it has {content[:80]!r}")
    return tokenizers.Tokenizer.from_str(content)


class WordTokenizer(LibraryTokenizer):
    """Lower-case words or word pieces (WordPiece, as in Devlin et al. 2019); end-of-text is 0, unknown 1.

    Case, accents and spaces are lost: `decode` only approximates the text, and bits per byte are meaningless.
    """

    end_of_text = 0
    unknown = 1

    def __init__(self, model: tokenizers.Tokenizer, kind: str) -> None:
        super().__init__(model)
        self.kind = kind
        self.token_bytes = np.zeros(self.vocab_size, np.int32)


def train_words(
    model: tokenizers.Tokenizer, trainer: tokenizers.trainers.Trainer, texts: Iterable[str], size: int
) -> tokenizers.Tokenizer:
    """Train a model of lower-case words.

    Raises:
        UserError: the vocabulary is too small for every character, each once as the start of a word and once as a continuation.
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


SPECIAL: dict[str, Any] = {"special_tokens": [END_OF_TEXT, UNKNOWN], "show_progress": False}
"""Trainer arguments: the first two ids, and no progress bar."""
