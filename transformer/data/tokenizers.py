"""Text to token ids and back: UTF-8 bytes, or characters, byte pairs, word pieces or words of a corpus."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int

from transformer.config import DataConfig
from transformer.data.files import without_surrogates
from transformer.types import UserError
from transformer.validation import require

FILE_NAME = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
TRAINED = ("bpe", "wordpiece", "words")
"""Kinds with a `tokenizer_size`."""
_DEFAULT_SIZE = 4096
_UNKNOWN = "<|unknown|>"
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
        """UTF-8 bytes each id stands for, 0 for special ids: what bits per byte divides by."""
        ...


@runtime_checkable
class Tokenizer(Vocabulary, Protocol):
    """What the pipeline, the trainer and generation need to know of a tokenizer."""

    @property
    def kind(self) -> str:
        """As `data.tokenizer` names it; of a pair, that for targets."""
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


def _known(ids: Ids, vocab_size: int) -> np.ndarray:
    flat = np.asarray(ids, dtype=np.int64).reshape(-1)
    return flat[(flat >= 0) & (flat < vocab_size)]


def _write(directory: epath.PathLike, text: str) -> None:
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FILE_NAME).write_text(text)


class ByteTokenizer:
    """The 256 bytes of UTF-8, then end-of-text."""

    kind = "bytes"
    vocab_size = 257
    end_of_text = 256

    def __init__(self) -> None:
        self.token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Bytes of `text`."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """Text of bytes; what is not UTF-8 becomes U+FFFD."""
        return _known(ids, 256).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def save(self, directory: epath.PathLike) -> None:
        """Write what `load_tokenizer` reads."""
        _write(directory, json.dumps({"kind": "bytes"}))


class CharacterTokenizer:
    """End-of-text (0), unknown (1), then the characters of the training split in code point order."""

    kind = "characters"
    end_of_text = 0
    unknown = 1

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size = 2 + len(characters)
        # Unknown counts 0 bytes: it stands for no particular character, so a score may not claim to have predicted one.
        self.token_bytes = np.array([0, 0] + [len(c.encode()) for c in characters], np.int32)
        points = np.array([ord(c) for c in characters], np.int64)
        self._id_of_point = np.full(points.max(initial=0) + 2, self.unknown, np.int32)
        self._id_of_point[points] = np.arange(2, self.vocab_size)
        self._text_of_id = np.array(["", "\N{REPLACEMENT CHARACTER}", *characters], dtype=object)

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharacterTokenizer":
        """The characters of `texts`."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls("".join(sorted(characters)))

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """One id a character."""
        points = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
        return self._id_of_point[np.minimum(points, len(self._id_of_point) - 1)]

    def decode(self, ids: Ids) -> str:
        """Text of characters; the unknown one becomes U+FFFD."""
        return "".join(self._text_of_id[_known(ids, self.vocab_size)])

    def save(self, directory: epath.PathLike) -> None:
        """Write what `load_tokenizer` reads."""
        _write(directory, json.dumps({"kind": "characters", "characters": self.characters}))


class _Trained:
    """What tokenizers of the `tokenizers` library have in common."""

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        # A document may contain the text "<|endoftext|>": it is then text, not the end.
        model.encode_special_tokens = True
        self._model = model
        self.vocab_size = model.get_vocab_size()

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Ids of `text`."""
        # Unlike `encode`, this lets other threads run meanwhile: the one that feeds the device must not wait.
        return np.array(self._model.encode_batch_fast([without_surrogates(text)])[0].ids, np.int32)

    def decode(self, ids: Ids) -> str:
        """Text of ids; what is not UTF-8 becomes U+FFFD."""
        return self._model.decode(_known(ids, self.vocab_size).tolist())

    def save(self, directory: epath.PathLike) -> None:
        """Write the JSON of the `tokenizers` library."""
        _write(directory, self._model.to_str())


class BpeTokenizer(_Trained):
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

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Merges learnt from `texts`; a small corpus gives fewer than `vocab_size` entries."""
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        model.add_special_tokens([END_OF_TEXT])
        return cls(model)


class WordTokenizer(_Trained):
    """Lower-case words, or pieces of them (WordPiece, as in Devlin et al. 2019); end-of-text is 0, unknown 1.

    Case, accents and spaces are lost, so that `decode` gives a likeness of the text and bits per byte mean nothing.
    """

    end_of_text = 0
    unknown = 1

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        super().__init__(model)
        self.kind = "wordpiece" if isinstance(model.model, tokenizers.models.WordPiece) else "words"
        self.token_bytes = np.zeros(self.vocab_size, np.int32)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, pieces: bool) -> "WordTokenizer":
        """The most frequent words, or the pieces most frequently merged.

        Raises:
            UserError: there is no room for each character as a piece that begins a word and one that goes on with it.
        """
        model: Any
        special: Any = {"special_tokens": [END_OF_TEXT, _UNKNOWN], "show_progress": False}
        if pieces:
            model = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=_UNKNOWN, max_input_chars_per_word=100))
            trainer: Any = tokenizers.trainers.WordPieceTrainer(vocab_size=vocab_size, **special)
            model.decoder = tokenizers.decoders.WordPiece()
        else:
            model = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=_UNKNOWN))
            trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=vocab_size, **special)
        model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        model.train_from_iterator(texts, trainer)
        needed = model.get_vocab_size()
        require(
            needed <= vocab_size,
            f"DataConfig.tokenizer_size must be at least {needed} for the characters of these texts, got {vocab_size}; "
            "data.tokenizer=words can have fewer.",
        )
        return cls(model)


class PairTokenizer:
    """A tokenizer of targets that has another one, for sources, beside it."""

    def __init__(self, source: Tokenizer, target: Tokenizer) -> None:
        self.source, self._target, self.kind = source, target, target.kind
        self.vocab_size, self.end_of_text, self.token_bytes = target.vocab_size, target.end_of_text, target.token_bytes

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Ids of a target."""
        return self._target.encode(text)

    def decode(self, ids: Ids) -> str:
        """Text of a target."""
        return self._target.decode(ids)

    def save(self, directory: epath.PathLike) -> None:
        """Write the one for targets as every tokenizer is, and the other beside it."""
        self.source.save(epath.Path(directory) / _SOURCE)
        self._target.save(directory)


def source_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The one that reads sources: itself, if a vocabulary is shared."""
    return tokenizer.source if isinstance(tokenizer, PairTokenizer) else tokenizer


def make_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer `config` asks for, trained on `texts`, the documents of the training split."""
    size = config.tokenizer_size or _DEFAULT_SIZE
    match config.tokenizer:
        case "auto" | "bytes":
            return ByteTokenizer()
        case "characters":
            return CharacterTokenizer.train(texts)
        case "bpe":
            return BpeTokenizer.train(texts, size)
        case "wordpiece" | "words":
            return WordTokenizer.train(texts, size, pieces=config.tokenizer == "wordpiece")


def with_tokenizer(config: DataConfig, tokenizer: Tokenizer) -> DataConfig:
    """The config with what it left open filled in: the kind that is used, and the size of one that is trained."""
    size = config.tokenizer_size or (_DEFAULT_SIZE if tokenizer.kind in TRAINED else 0)
    return dataclasses.replace(config, tokenizer=tokenizer.kind, tokenizer_size=size)


def load_tokenizer(directory: epath.PathLike) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to `directory`."""
    if (epath.Path(directory) / _SOURCE).exists():
        return PairTokenizer(_load(epath.Path(directory) / _SOURCE), _load(directory))
    return _load(directory)


def _load(directory: epath.PathLike) -> Tokenizer:
    path = epath.Path(directory) / FILE_NAME
    if not path.exists():
        raise UserError(f"A run directory must hold {FILE_NAME}, which training writes; {directory} does not.")
    text = path.read_text()
    match json.loads(text):
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "characters", "characters": characters}:
            return CharacterTokenizer(characters)
        case {"model": {"type": "BPE"}}:
            return BpeTokenizer(tokenizers.Tokenizer.from_str(text))
        case {"model": {"type": "WordPiece" | "WordLevel"}}:
            return WordTokenizer(tokenizers.Tokenizer.from_str(text))
    raise UserError(f"{path} must describe a tokenizer of this library; it was not written by training.")
