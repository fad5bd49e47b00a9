"""The default tokenizer: from the run in training.init_from, from a pretrained model's folder, or bytes."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NoReturn

from transformer.data.tokenizers.base import Tokenizer
from transformer.data.tokenizers.bytes import Bytes
from transformer.storage import expand
from transformer.tokenizer import TOKENIZERS, TokenizerKind
from transformer.types import UserError
from transformer.validation import require


@TOKENIZERS.register
@dataclasses.dataclass(frozen=True)
class Auto(TokenizerKind):
    """The tokenizer of the run in training.init_from or of a folder; without either, bytes."""

    kind = "auto"

    folder: str = ""
    """Folder of a pretrained model's tokenizer (tokenizer.json or tokenizer.model, and the files that name its special ids)."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The folder, if one is set."""
        return (expand(self.folder),) if self.folder else ()

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Load the folder's tokenizer, else use bytes of text; a source of ids, which has no text, refuses to be read."""
        if not self.folder:
            next(iter(texts), None)
            return Bytes().train(texts)
        return _folders().open_folder(self.folder)

    def load(self, content: str) -> NoReturn:
        """Refuse: a run records the tokenizer that it resolved to."""
        del content
        raise UserError(
            "A run must say which tokenizer it has, its config has data.tokenizer.kind=auto; put a copy back."
        )

    def filled(self) -> TokenizerKind:
        """The kind of the folder's tokenizer, else bytes."""
        return _folders().from_folder(self.folder)[0] if self.folder else Bytes()

    def going_on(self, recorded: TokenizerKind) -> TokenizerKind:
        """The tokenizer of the other run, which must equal the folder's, if one is set."""
        require(
            not self.folder or recorded == self or recorded == self.filled(),
            f"A run keeps its tokenizer, the one in data.tokenizer.folder={self.folder} differs in kind or special ids; leave "
            "the folder out, or start a new run.",
        )
        return recorded


def _folders() -> Any:
    # Every config loads this file, but few read such a folder, and the libraries for it load slowly.
    from transformer.data.tokenizers import folder  # noqa: PLC0415

    return folder
