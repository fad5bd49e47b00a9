"""How text becomes tokens: the base of every kind of tokenizer, and the special ids that stand around a text."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from etils import epath

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
        "ids": "transformer.data.tokenizers.ids",
        "pretrained": "transformer.data.tokenizers.pretrained",
        "sentencepiece": "transformer.data.tokenizers.pieces",
    },
)
FILE_NAME = "tokenizer.json"
_DEFAULT_SIZE = 4096


@dataclasses.dataclass(frozen=True)
class TokenizerKind(Kind):
    """What a config says of a tokenizer. Its fields are its settings.

    One's own derives from this, has a name (`kind`), is made known by `TOKENIZERS.register`, and must bring `train` and `load`.
    The tokenizers that these give have the members of `transformer.Tokenizer`.
    """

    family = TOKENIZERS
    sampled: ClassVar[bool] = False
    """Whether about `data.tokenizer_bytes` of a large training split are enough, in pieces of documents."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Files and folders that its settings name."""
        return ()

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

    def open(self, directory: epath.PathLike) -> Any:
        """The tokenizer that a run has saved in a directory: by default, `load` of its file alone."""
        return self.load((epath.Path(directory) / FILE_NAME).read_bytes().decode())

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

    sampled = True
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


# ---- Special ids -----------------------------------------------------------------------------------------------------
#
# A tokenizer of a pretrained model has `begin`, `end`, `stop`, `decoder_start`, `mask` and `sentinels`. One that this package
# trains has none of these, and `end_of_text` in their places.


def prompt_start(tokenizer: Any) -> tuple[int, ...]:
    """Ids that stand before a prompt."""
    return tuple(getattr(tokenizer, "begin", (tokenizer.end_of_text,)))


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """A prompt as a language model reads it; an empty one is what stands before a document, never nothing."""
    return [*prompt_start(tokenizer), *tokenizer.encode(text).tolist()] or [document_start(tokenizer)]


def document_start(tokenizer: Any) -> int:
    """The id that stands before each document of a language model's rows."""
    return (prompt_start(tokenizer) or (tokenizer.end_of_text,))[-1]


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids at which generation ends."""
    return tuple(getattr(tokenizer, "stop", ())) or (tokenizer.end_of_text,)


def around_text(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after a text that an encoder reads, such as a classifier's."""
    return prompt_start(tokenizer), tuple(getattr(tokenizer, "end", ()))


def encoder_ids(tokenizer: Any, text: str) -> np.ndarray:
    """A text as an encoder reads it, uncut, int32 [n]."""
    begin, end = around_text(tokenizer)
    return np.concatenate([begin, tokenizer.encode(text), end]).astype(np.int32)


def around_source(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after a source that an encoder-decoder reads."""
    return tuple(getattr(tokenizer, "begin", ())), tuple(getattr(tokenizer, "end", (tokenizer.end_of_text,)))


def target_start(tokenizer: Any) -> int:
    """The id that stands before a target of an encoder-decoder."""
    start = getattr(tokenizer, "decoder_start", -1)
    return tokenizer.end_of_text if start < 0 else start


def never_hidden(tokenizer: Any) -> tuple[int, ...]:
    """Ids that masking leaves as they are: those around a text."""
    begin, end = around_text(tokenizer)
    return tuple(dict.fromkeys((*begin, *end, tokenizer.end_of_text)))


def mask_id(tokenizer: Any) -> int:
    """The id of the mask: its own, else the one after all others."""
    own = getattr(tokenizer, "mask", -1)
    return tokenizer.vocab_size if own < 0 else own


def sentinel_ids(tokenizer: Any, count: int) -> np.ndarray:
    """Ids that stand for hidden spans, int [count]: its own in their order, then those after all others."""
    own = list(getattr(tokenizer, "sentinels", ()))[:count]
    return np.array([*own, *range(tokenizer.vocab_size, tokenizer.vocab_size + count - len(own))])


def known_tokens(tokenizer: Any) -> np.ndarray:
    """Which ids below `vocab_size` a token has, bool [V]: all, but for holes in the table of a pretrained tokenizer."""
    known = getattr(tokenizer, "known", None)
    return np.ones(tokenizer.vocab_size, bool) if known is None else known


def drawable(tokenizer: Any, num_rows: int, extra: int = 0) -> np.ndarray | None:
    """Which rows of a model's table a token has, bool [num_rows], so that no other is drawn; None where all have one.

    Args:
        tokenizer: of the model.
        num_rows: of its table, which may be padded.
        extra: ids after the tokenizer's that the objective uses.
    """
    known = np.concatenate([known_tokens(tokenizer), np.ones(extra, bool)])[:num_rows]
    allowed = np.pad(known, (0, num_rows - len(known)))
    return None if allowed.all() else allowed
