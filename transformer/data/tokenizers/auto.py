"""The tokenizer of the run that this one starts from, else bytes."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from transformer.data.tokenizers.bytes import Bytes
from transformer.tokenizer import TOKENIZERS, TokenizerKind
from transformer.types import UserError


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class Auto(TokenizerKind):
    """That of the run in training.init_from, else bytes."""

    kind = "auto"

    def train(self, texts: Iterable[str]) -> Any:
        """Bytes."""
        return Bytes().train(texts)

    def load(self, content: str) -> Any:
        """A run records what it used."""
        del content
        raise UserError(
            "A run must say which tokenizer it has, its config has data.tokenizer.kind=auto; put a copy back."
        )

    def filled(self) -> TokenizerKind:
        """Bytes."""
        return Bytes()

    def going_on(self, recorded: TokenizerKind) -> TokenizerKind:
        """The other run's."""
        return recorded
