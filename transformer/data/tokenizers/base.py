"""What a tokenizer is, and how a run's directory holds one, or one for sources and one for targets."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Int

from transformer.tokenizer import FILE_NAME, TokenizerKind
from transformer.types import UserError
from transformer.validation import require

END_OF_TEXT = "<|endoftext|>"
_SOURCE = "source_tokenizer"

Ids = Sequence[int] | Int[np.ndarray, " n"] | Any


@runtime_checkable
class Vocabulary(Protocol):
    """What a model and its loss need to know of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        ...

    @property
    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """UTF-8 bytes each id stands for, 0 for special ids: what bits per byte divides by.

        Where a tokenizer puts a space before each text that the text has not, `end_of_text` has -1 for it.
        """
        ...


@runtime_checkable
class Tokenizer(Vocabulary, Protocol):
    """What the pipeline, the trainer and generation need to know of a tokenizer.

    It may also have `begin`, `end` and `stop` (tuples of ids), `decoder_start`, `mask`, `sentinels` and `known`, as those of
    pretrained models do; `transformer.tokenizer` has what they mean, and what holds without them.
    """

    @property
    def kind(self) -> str:
        """As `data.tokenizer.kind` names it; of a pair, that for targets."""
        ...

    @property
    def end_of_text(self) -> int:
        """The id that ends a document, and that stands before its first token."""
        ...

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Ids of `text`, without end-of-text; a lone surrogate, which has no UTF-8 form, becomes `?`."""
        ...

    def decode(self, ids: Ids) -> str:
        """Text of any integers: special ids are dropped, as are those outside the vocabulary."""
        ...

    def save(self, directory: epath.PathLike) -> None:
        """Write what `load_tokenizer` reads."""
        ...


AnyVocabulary = TypeVar("AnyVocabulary", bound=Vocabulary)


def known_ids(ids: Ids, vocab_size: int) -> np.ndarray:
    """The ids that are of a vocabulary."""
    flat = np.asarray(ids, dtype=np.int64).reshape(-1)
    return flat[(flat >= 0) & (flat < vocab_size)]


def write_tokenizer(directory: epath.PathLike, text: str) -> None:
    """Write the file that the `load` of a tokenizer's kind is given."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FILE_NAME).write_text(text)


class PairTokenizer:
    """A tokenizer of targets that has another one, for sources, beside it."""

    def __init__(self, source: Tokenizer, target: Tokenizer) -> None:
        self.source, self.target, self.kind = source, target, target.kind
        self.vocab_size, self.end_of_text, self.token_bytes = target.vocab_size, target.end_of_text, target.token_bytes

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Ids of a target."""
        return self.target.encode(text)

    def decode(self, ids: Ids) -> str:
        """Text of a target."""
        return self.target.decode(ids)

    def save(self, directory: epath.PathLike) -> None:
        """Write the one for targets as every tokenizer is, and the other beside it."""
        self.source.save(epath.Path(directory) / _SOURCE)
        self.target.save(directory)


def source_tokenizer(tokenizer: AnyVocabulary) -> AnyVocabulary:
    """The one that reads sources: that of a pair, else itself."""
    return getattr(tokenizer, "source", tokenizer)


def describe_entries(tokenizer: Tokenizer) -> str:
    """The size of a vocabulary, or of both of a pair."""
    entries, reader = f"{tokenizer.vocab_size:,} entries", source_tokenizer(tokenizer)
    return entries if reader is tokenizer else f"{reader.vocab_size:,} entries for sources, {entries} for targets"


def note_unknown(tokenizer: Tokenizer, tokens: Ids, note: Callable[[str], None]) -> None:
    """Say how many words or characters of a prompt training did not see: they all look alike to the model."""
    unknown = int(np.sum(np.asarray(tokens) == getattr(tokenizer, "unknown", -1)))
    if unknown:
        verb = "is" if unknown == 1 else "are"
        note(
            f"{unknown} of the prompt's {len(tokens)} tokens {verb} not in the model's vocabulary, and {verb} read as unknown."
        )


def load_tokenizer(directory: epath.PathLike, kind: TokenizerKind) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to `directory`, of a kind that the run's config names."""
    if (epath.Path(directory) / _SOURCE).exists():
        return PairTokenizer(_load(epath.Path(directory) / _SOURCE, kind), _load(directory, kind))
    return _load(directory, kind)


def _load(directory: epath.PathLike, kind: TokenizerKind) -> Tokenizer:
    path = epath.Path(directory) / FILE_NAME
    require(path.exists(), f"A run directory must hold {FILE_NAME}, which training writes; {directory} does not.")
    try:
        return kind.open(directory)
    except UserError:
        raise
    except Exception as error:  # the library raises nothing more special, and one's own what it likes
        raise UserError(
            f"{path} must describe a tokenizer of the kind {kind.kind!r} as training writes it: {error}."
        ) from None


def saved_fields(content: str, kind: str) -> dict[str, Any]:
    """The fields of a file that says its kind.

    Raises:
        ValueError: it says another, or is no such file.
    """
    fields = json.loads(content)
    if not isinstance(fields, dict) or fields.get("kind") != kind:
        raise ValueError(f"it has {content[:80]!r}")
    return fields
