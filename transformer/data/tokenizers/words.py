"""Lower-case words of a corpus as tokens."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import tokenizers

from transformer.data.tokenizers.library import SPECIAL, UNKNOWN, WordTokenizer, read_library, train_words
from transformer.tokenizer import TOKENIZERS, SizedTokenizer


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class Words(SizedTokenizer):
    """The most frequent lower-case words of the training split."""

    kind = "words"

    def train(self, texts: Iterable[str]) -> WordTokenizer:
        """Learn the words of texts."""
        size = self.filled().size
        model: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNKNOWN))
        trainer: Any = tokenizers.trainers.WordLevelTrainer(vocab_size=size, **SPECIAL)
        return WordTokenizer(train_words(model, trainer, texts, size), self.kind)

    def load(self, content: str) -> WordTokenizer:
        """Read the file of the `tokenizers` library."""
        return WordTokenizer(read_library(content, "WordLevel"), self.kind)
