"""Tokenizers: the base class of every kind, and the special ids around a text."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from etils import epath

from transformer.kinds import Family, Kind
from transformer.validation import require

if TYPE_CHECKING:
    from transformer.data.tokenizers import Tokenizer, Vocabulary

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
    """The config of a tokenizer. Its fields are its settings.

    A user-defined kind derives from this, has a name (`kind`), and is registered by `TOKENIZERS.register`. It must define `train`
    and `load`, which return objects with the members of `transformer.Tokenizer`.
    """

    family = TOKENIZERS
    sampled: ClassVar[bool] = False
    """Whether it trains on about `data.tokenizer_bytes` of a large training split, in pieces of documents."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Files and folders named by its settings."""
        return ()

    def train(self, texts: Iterable[str]) -> "Tokenizer":
        """A tokenizer trained on the documents of a training split."""
        raise NotImplementedError(f"{type(self).__name__} must define train().")

    def load(self, content: str) -> "Tokenizer":
        """The tokenizer saved by a run.

        Args:
            content: of the file written by the tokenizer's `save`.

        Raises:
            UserError: it is not of this kind.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load().")

    def open(self, directory: epath.PathLike) -> "Tokenizer":
        """The tokenizer saved in a run's directory; by default, `load` of its one file."""
        return self.load((epath.Path(directory) / FILE_NAME).read_bytes().decode())

    def filled(self) -> "TokenizerKind":
        """This kind with unspecified settings filled in by their defaults."""
        return self

    def going_on(self, recorded: "TokenizerKind") -> "TokenizerKind":
        """This kind with unspecified settings filled in from another run."""
        del recorded
        return self


@dataclasses.dataclass(frozen=True)
class SizedTokenizer(TokenizerKind):
    """A tokenizer with a configurable vocabulary size."""

    sampled = True
    fewest: ClassVar[int] = 3
    """Smallest vocabulary: end-of-text, unknown and a word."""

    size: int = 0
    """Largest number of vocabulary entries; 0 means the size in training.init_from, else 4096."""

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
# A tokenizer of a pretrained model has `begin`, `end`, `stop`, `decoder_start`, `mask` and `sentinels`. A tokenizer trained by
# this package has none of these, and uses `end_of_text` instead.


def prompt_start(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """Ids before a prompt."""
    return tuple(getattr(tokenizer, "begin", (tokenizer.end_of_text,)))


def prompt_ids(tokenizer: "Tokenizer", text: str) -> list[int]:
    """A prompt as input of a language model; an empty prompt gives the ids before a document, never nothing."""
    return [*prompt_start(tokenizer), *tokenizer.encode(text).tolist()] or [document_start(tokenizer)]


def document_start(tokenizer: "Tokenizer") -> int:
    """The id before each document in a language model's rows."""
    return (prompt_start(tokenizer) or (tokenizer.end_of_text,))[-1]


def stop_ids(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """Ids at which generation ends."""
    return tuple(getattr(tokenizer, "stop", ())) or (tokenizer.end_of_text,)


def around_text(tokenizer: "Tokenizer") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after a text for an encoder, such as a classifier's."""
    return prompt_start(tokenizer), tuple(getattr(tokenizer, "end", ()))


def encoder_ids(tokenizer: "Tokenizer", text: str) -> np.ndarray:
    """A text as input of an encoder, uncut, int32 [n]."""
    begin, end = around_text(tokenizer)
    return np.concatenate([begin, tokenizer.encode(text), end]).astype(np.int32)


def around_source(tokenizer: "Tokenizer") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after a source for an encoder-decoder."""
    return tuple(getattr(tokenizer, "begin", ())), tuple(getattr(tokenizer, "end", (tokenizer.end_of_text,)))


def target_start(tokenizer: "Tokenizer") -> int:
    """The id before a target of an encoder-decoder."""
    start = getattr(tokenizer, "decoder_start", -1)
    return tokenizer.end_of_text if start < 0 else start


def never_hidden(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """Ids that masking leaves unchanged: the special ids around a text."""
    begin, end = around_text(tokenizer)
    return tuple(dict.fromkeys((*begin, *end, tokenizer.end_of_text)))


def mask_id(tokenizer: "Vocabulary") -> int:
    """The id of the mask: the tokenizer's, else the first id after its vocabulary."""
    own = getattr(tokenizer, "mask", -1)
    return tokenizer.vocab_size if own < 0 else own


def sentinel_ids(tokenizer: "Vocabulary", count: int) -> np.ndarray:
    """Ids that replace hidden spans, int [count]: the tokenizer's in their order, then those after its vocabulary."""
    own = list(getattr(tokenizer, "sentinels", ()))[:count]
    return np.array([*own, *range(tokenizer.vocab_size, tokenizer.vocab_size + count - len(own))])


def known_tokens(tokenizer: "Vocabulary") -> np.ndarray:
    """Which ids below `vocab_size` are tokens, bool [V]: all, except for holes in the table of a pretrained tokenizer."""
    known = getattr(tokenizer, "known", None)
    return np.ones(tokenizer.vocab_size, bool) if known is None else known


def drawable(tokenizer: "Vocabulary", num_rows: int, extra: int = 0) -> np.ndarray | None:
    """Which rows of a model's table are tokens and may be generated, bool [num_rows]; None if all are.

    Args:
        tokenizer: of the model.
        num_rows: rows of the table, which may be padded.
        extra: number of ids after the tokenizer's that the objective uses.
    """
    known = np.concatenate([known_tokens(tokenizer), np.ones(extra, bool)])[:num_rows]
    allowed = np.pad(known, (0, num_rows - len(known)))
    return None if allowed.all() else allowed
