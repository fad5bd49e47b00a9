"""The tokenizer of a pretrained model's Hugging Face folder: its files, and the special ids that they name."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from etils import epath

from transformer.data.tokenizers.base import Tokenizer
from transformer.data.tokenizers.pieces import Pieces, read_proto, wrapped
from transformer.data.tokenizers.pretrained import (
    CHAT_FILE,
    Pretrained,
    SpecialIds,
    read_fields,
    read_model,
    table_of,
)
from transformer.storage import expand, is_file
from transformer.tokenizer import FILE_NAME
from transformer.types import UserError
from transformer.validation import require, shown

_LARGEST, _LARGEST_CONFIG = 2**29, 2**25  # bytes
_NAMED = ("tokenizer_config.json", "special_tokens_map.json")
_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model")
_AS_THEY_ARE = ("llama", "codellama", "gemma", "t5", "mt5", "pretrained", "tokenizersbackend", "")
_WITH_END = ("t5", "mt5")
_USUAL = {"bos": "<s>", "eos": "</s>"}
_PROBES = ("a", "A", "1", "the", "\N{HIRAGANA LETTER A}")


class _Folder(NamedTuple):
    """The content of a folder's small files."""

    path: epath.Path
    tokens: Mapping[str, str]
    """The text of a special token by its role, such as eos_token."""
    config: Mapping[str, Any]
    generation: Mapping[str, Any]


def from_folder(directory: epath.PathLike) -> tuple[SpecialIds, dict[str, bytes]]:
    """The tokenizer of a folder: its kind with the special ids, and unchanged copies of the files for the run directory.

    Args:
        directory: a folder with `tokenizer.json`, and optionally `tokenizer_config.json`, `special_tokens_map.json`,
            `generation_config.json` and `config.json`.

    Raises:
        UserError: there is no tokenizer, or a file is invalid.

    Example:
        `kind, files = from_folder("SmolLM2-135M")`; then `kind.load(files["tokenizer.json"].decode())` is the tokenizer.
    """
    folder = _read(epath.Path(expand(directory)))
    model = next((folder.path / name for name in _MODELS if (folder.path / name).exists()), None)
    whole = (folder.path / FILE_NAME).exists()
    require(
        whole or model is not None,
        f"A pretrained tokenizer must be a {FILE_NAME} or a SentencePiece tokenizer.model, {folder.path} has neither; load the "
        "folder with transformers.AutoTokenizer and save it again (save_pretrained), which writes one.",
    )
    path = folder.path / FILE_NAME if whole or model is None else model
    content = _bytes(path, _LARGEST)
    try:
        kind, content = _library(folder, content) if whole else _pieces(folder, content)
        kind.load(content.decode())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path} must be a file of the library that reads it: {error!s:.200}") from None
    return kind, {FILE_NAME: content, **_chat(folder)}


def open_folder(directory: epath.PathLike) -> Tokenizer:
    """The tokenizer of a folder, as a run that starts from the folder uses it.

    Raises:
        UserError: as `from_folder`.
    """
    kind, files = from_folder(directory)
    with tempfile.TemporaryDirectory() as aside:
        for name, content in files.items():
            (epath.Path(aside) / name).write_bytes(content)
        return kind.open(aside)


def _library(folder: _Folder, content: bytes) -> tuple[SpecialIds, bytes]:
    read_fields(content)
    model = read_model(content)
    special = {t.content: index for index, t in model.get_added_tokens_decoder().items() if t.special}
    vocabulary = model.get_vocab(with_added_tokens=True)
    return Pretrained(**_special_ids(folder, vocabulary, special, _template(model))), content


def _pieces(folder: _Folder, content: bytes) -> tuple[SpecialIds, bytes]:
    """A SentencePiece model, with the ids that its `transformers` class adds around a text, and the added tokens."""
    named = str(_fields(folder.path / _NAMED[0]).get("tokenizer_class") or folder.config.get("model_type") or "")
    family = named.lower().removesuffix("fast").removesuffix("tokenizer")
    require(
        family in _AS_THEY_ARE,
        f"A SentencePiece model without a {FILE_NAME} is read where its ids are the indices of its pieces, not so or not known "
        f"for {named!r}; load the folder with transformers.AutoTokenizer and save it again (save_pretrained).",
    )
    settings = _fields(folder.path / _NAMED[0])
    vocabulary = {piece.piece: index for index, piece in enumerate(read_proto(content).pieces)}
    decoder = settings.get("added_tokens_decoder") or {}
    require(isinstance(decoder, dict), f"added_tokens_decoder must be an object of fields, got {shown(decoder)}.")
    listed = {str(token["content"]): int(index) for index, token in decoder.items()}
    added = {text: index for text, index in listed.items() if vocabulary.get(text) != index}
    wrong = [text for text, index in added.items() if index < len(vocabulary)]
    require(not wrong, f"Added tokens must come after the {len(vocabulary)} pieces, {shown(wrong[:1])} does not.")
    content = wrapped(content, added, bool(settings.get("legacy", family not in ("llama", "codellama"))))
    known = vocabulary | added
    found = {role: known.get(folder.tokens.get(f"{role}_token", usual)) for role, usual in _USUAL.items()}
    adds = {"bos": settings.get("add_bos_token") is True, "eos": settings.get("add_eos_token") is True}
    if family in _WITH_END:
        adds = {"bos": False, "eos": True}
    begin, end = (tuple(i for i in (found[role],) if adds[role] and i is not None) for role in ("bos", "eos"))
    special = {text: index for text, index in known.items() if text in ("<pad>", "<mask>", "[MASK]", "</s>")}
    return Pieces(**_special_ids(folder, known, special, (begin, end))), content


# ---- Files -----------------------------------------------------------------------------------------------------------


def _read(path: epath.Path) -> _Folder:
    require(path.is_dir(), f"A pretrained tokenizer must be a folder, {path} is none.")
    tokens: dict[str, str] = {}
    for name in _NAMED:
        for role, token in _fields(path / name).items():
            text = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(text, str):
                tokens.setdefault(role, text)
    return _Folder(path, tokens, _fields(path / "config.json"), _fields(path / "generation_config.json"))


def _bytes(path: epath.Path, most: int) -> bytes:
    require(is_file(path), f"{path} must be a regular file, or a link to one.")  # reading a pipe would wait
    size = path.stat().length
    require(size <= most, f"{path} must have at most {most:,} bytes, it has {size:,}.")
    return path.read_bytes()


def _fields(path: epath.Path) -> dict[str, Any]:
    """The object of a JSON file; empty if the file is missing."""
    if not path.exists():
        return {}
    try:
        fields = json.loads(_bytes(path, _LARGEST_CONFIG).decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be JSON, but is not ({error}).") from None
    require(isinstance(fields, dict), f"{path} must be an object of fields, got {shown(fields)}.")
    return fields


def _chat(folder: _Folder) -> dict[str, bytes]:
    """The chat templates in files, else those in `tokenizer_config.json`: one text, or several with names."""
    files = {"default": folder.path / "chat_template.jinja"}
    more = folder.path / "additional_chat_templates"
    if more.is_dir():
        files |= {path.name.removesuffix(".jinja"): path for path in more.glob("*.jinja")}
    templates: Any = {name: _text(path) for name, path in files.items() if path.exists()}
    where = folder.path / _NAMED[0]
    if not templates:
        found: Any = _fields(where).get("chat_template")
        templates = {"default": found} if isinstance(found, str) else found or {}
    if isinstance(templates, list):
        named = [part for part in templates if isinstance(part, dict)]
        templates = {part.get("name"): part.get("template") for part in named}
    strange = not isinstance(templates, dict) or any(
        not isinstance(text, str) for pair in templates.items() for text in pair
    )
    require(
        not strange,
        f"The chat_template of {where} must be a text, or a list of name and template, got {shown(templates)}.",
    )
    if not templates:
        return {}
    return {CHAT_FILE: json.dumps({"templates": templates, "tokens": folder.tokens}, indent=1).encode()}


def _text(path: epath.Path) -> str:
    try:
        return _bytes(path, _LARGEST_CONFIG).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be text in UTF-8, but is not ({error}).") from None


# ---- Special ids -----------------------------------------------------------------------------------------------------


def _special_ids(
    folder: _Folder,
    vocabulary: Mapping[str, int],
    special: Mapping[str, int],
    around: tuple[tuple[int, ...], tuple[int, ...]],
) -> dict[str, Any]:
    known_V = table_of(dict(vocabulary))

    def known(values: Any) -> list[int]:
        """The ids, of one id or a list, that have a token: a config may name others."""
        flat = values if isinstance(values, list) else [values]
        return [
            i for i in flat if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < len(known_V) and known_V[i]
        ]

    def of(role: str, *usual: str) -> list[int]:
        """The id of a special token: from its declared name, else the model's config, else its usual names."""
        index = vocabulary.get(folder.tokens.get(f"{role}_token", ""))
        if index is not None:
            return [index]
        return known(folder.config.get(f"{role}_token_id")) or [i for i in map(special.get, usual) if i is not None]

    begin, end = around
    ends = of("eos") or of("sep") or known(folder.generation.get("eos_token_id")) or list(end[-1:]) or of("eos", "</s>")
    require(
        len(ends) > 0,
        f"A pretrained tokenizer must say which token ends a text, {folder.path} names no eos_token and no sep_token that it "
        "has; add one to tokenizer_config.json.",
    )
    stop = known(folder.generation.get("eos_token_id", folder.config.get("eos_token_id")))
    starts = known(folder.generation.get("decoder_start_token_id", folder.config.get("decoder_start_token_id")))
    first: Any = lambda ids: ids[0] if ids else -1  # noqa: E731
    return {
        "begin": begin,
        "end": end,
        "end_of_text": ends[0],
        "stop": tuple(dict.fromkeys((*stop, ends[0]))),
        "pad": first(of("pad", "[PAD]", "<pad>")),
        "decoder_start": first(starts),
        "mask": first(of("mask", "[MASK]", "<mask>")),
    }


def _template(model: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the file's post-processor adds before and after a text, found by encoding a text."""
    for text in _probes(model):
        own = model.encode(text, add_special_tokens=False).ids
        if not own:
            continue
        whole = model.encode(text)
        start = len(whole.special_tokens_mask) - len("".join(map(str, whole.special_tokens_mask)).lstrip("1"))
        require(
            whole.ids[start : start + len(own)] == own and sum(whole.special_tokens_mask) + len(own) == len(whole.ids),
            f"A pretrained tokenizer must put ids before and after a text, this one makes {shown(whole.ids)} of {shown(own)}.",
        )
        return tuple(whole.ids[:start]), tuple(whole.ids[start + len(own) :])
    return (), ()


def _probes(model: tokenizers.Tokenizer) -> Iterator[str]:
    """Texts to try; some of them encode to tokens."""
    yield from _PROBES
    yield from (model.decode([index]) for index in range(min(256, model.get_vocab_size())))
