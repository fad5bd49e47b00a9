"""The tokenizer of the run that this one starts from, that of a pretrained model's folder, or else bytes."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from transformer.data.tokenizers.bytes import Bytes
from transformer.storage import expand
from transformer.tokenizer import TOKENIZERS, TokenizerKind
from transformer.types import UserError
from transformer.validation import require


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class Auto(TokenizerKind):
    """That of the run in training.init_from, that of a folder, else bytes."""

    kind = "auto"

    folder: str = ""
    """A folder with the tokenizer of a pretrained model (tokenizer.json or tokenizer.model, and what names its special ids)."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The folder."""
        return (expand(self.folder),) if self.folder else ()

    def train(self, texts: Iterable[str]) -> Any:
        """That of the folder, else bytes."""
        if not self.folder:
            return Bytes().train(texts)
        return _folders().open_folder(self.folder)

    def load(self, content: str) -> Any:
        """A run records what it used."""
        del content
        raise UserError(
            "A run must say which tokenizer it has, its config has data.tokenizer.kind=auto; put a copy back."
        )

    def filled(self) -> TokenizerKind:
        """What the folder's is, else bytes."""
        return _folders().from_folder(self.folder)[0] if self.folder else Bytes()

    def going_on(self, recorded: TokenizerKind) -> TokenizerKind:
        """The other run's, which must be the folder's."""
        require(
            not self.folder or recorded == self or recorded == self.filled(),
            f"A run keeps its tokenizer, that of data.tokenizer.folder={self.folder} differs in kind or special ids; leave "
            "the folder out, or start a new run.",
        )
        return recorded


def _folders() -> Any:
    # Every config loads this file, few read such a folder, and the libraries that do so take their time.
    from transformer.data.tokenizers import folder  # noqa: PLC0415

    return folder
