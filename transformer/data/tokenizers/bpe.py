"""Byte-pair tokens of a corpus."""

import dataclasses
from collections.abc import Iterable

import numpy as np
import tokenizers

from transformer.data.tokenizers.base import END_OF_TEXT
from transformer.data.tokenizers.library import LibraryTokenizer, read_library
from transformer.tokenizer import TOKENIZERS, SizedTokenizer
from transformer.types import UserError


class BpeTokenizer(LibraryTokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2), end-of-text last."""

    kind = "bpe"

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        super().__init__(model)
        end_of_text = model.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise UserError(f"A byte-pair vocabulary must hold {END_OF_TEXT!r}, this one has {self.vocab_size} others.")
        self.end_of_text = end_of_text
        # In the byte-level alphabet one character of a token stands for one byte.
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        for token, index in model.get_vocab().items():
            self.token_bytes[index] = 0 if index == end_of_text else len(token)


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class BytePairs(SizedTokenizer):
    """Byte pairs learnt from the training split."""

    kind = "bpe"
    fewest = 257  # every byte and end-of-text

    def train(self, texts: Iterable[str]) -> BpeTokenizer:
        """Learn merges from texts; a small corpus gives fewer entries than `size`."""
        size = self.filled().size
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size - 1,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        model.add_special_tokens([END_OF_TEXT])
        return BpeTokenizer(model)

    def load(self, content: str) -> BpeTokenizer:
        """Read the file of the `tokenizers` library."""
        return BpeTokenizer(read_library(content, "BPE"))
