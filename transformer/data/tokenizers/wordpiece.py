"""Lower-case word pieces of a corpus as tokens."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import tokenizers

from transformer.data.tokenizers.library import SPECIAL, UNKNOWN, WordTokenizer, read_library, train_words
from transformer.tokenizer import TOKENIZERS, SizedTokenizer


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class WordPieces(SizedTokenizer):
    """The most frequent lower-case word pieces of the training split."""

    kind = "wordpiece"

    def train(self, texts: Iterable[str]) -> WordTokenizer:
        """Learn the word pieces of texts."""
        size = self.filled().size
        model: Any = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=UNKNOWN, max_input_chars_per_word=100))
        model.decoder = tokenizers.decoders.WordPiece()
        trainer: Any = tokenizers.trainers.WordPieceTrainer(vocab_size=size, **SPECIAL)
        return WordTokenizer(train_words(model, trainer, texts, size), self.kind)

    def load(self, content: str) -> WordTokenizer:
        """Read the file of the `tokenizers` library."""
        return WordTokenizer(read_library(content, "WordPiece"), self.kind)
