"""How text becomes tokens: the base of every kind of tokenizer, the package's and one's own."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from transformer.kinds import Family, Kind
from transformer.validation import require

TOKENIZERS = Family(
    "data.tokenizer",
    {
        "auto": "transformer.data.tokenizers.auto",
        "bytes": "transformer.data.tokenizers.bytes",
        "characters": "transformer.data.tokenizers.characters",
        "bpe": "transformer.data.tokenizers.bpe",
        "wordpiece": "transformer.data.tokenizers.wordpiece",
        "words": "transformer.data.tokenizers.words",
    },
)
_DEFAULT_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class TokenizerKind(Kind):
    """What a config says of a tokenizer. Its fields are its settings.

    One's own derives from this, has a name (`kind`), is made known by `TOKENIZERS.register`, and must bring `train` and `load`.
    The tokenizers that these give have the members of `transformer.Tokenizer`.
    """

    family = TOKENIZERS

    def train(self, texts: Iterable[str]) -> Any:
        """The tokenizer for the documents of a training split."""
        raise NotImplementedError(f"{type(self).__name__} must define train().")

    def load(self, content: str) -> Any:
        """The tokenizer that a run has saved.

        Args:
            content: of the file that the tokenizer's `save` wrote.

        Raises:
            UserError: it is not of this kind.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load().")

    def filled(self) -> "TokenizerKind":
        """With what it leaves open as it is used."""
        return self

    def going_on(self, recorded: "TokenizerKind") -> "TokenizerKind":
        """With what it leaves open as another run has it."""
        del recorded
        return self


@dataclasses.dataclass(frozen=True)
class SizedTokenizer(TokenizerKind):
    """A tokenizer with a vocabulary of a size that is asked for."""

    fewest: ClassVar[int] = 3
    """Entries of the smallest vocabulary: end-of-text, unknown and a word."""

    size: int = 0
    """Entries of the vocabulary, at most; 0: as in training.init_from, else 4096."""

    def __post_init__(self) -> None:
        require(
            self.size == 0 or self.fewest <= self.size <= 2**24,
            f"{type(self).__name__}.size must be from {self.fewest} to 2^24 for the tokenizer {self.kind!r}, or 0 for the "
            f"default, got {self.size}.",
        )

    def filled(self) -> "SizedTokenizer":
        """With the default size."""
        return dataclasses.replace(self, size=self.size or _DEFAULT_SIZE)

    def going_on(self, recorded: TokenizerKind) -> TokenizerKind:
        """With the size of another run."""
        return recorded if self.size == 0 and recorded.kind == self.kind else self
