"""The tokenizer of a folder of a pretrained model, as Hugging Face lays it out: its files, and the special ids they name."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from etils import epath

from transformer.data.tokenizers.pretrained import (
    Pretrained,
    PretrainedTokenizer,
    SpecialIds,
    read_fields,
    read_model,
    table_of,
)
from transformer.storage import expand
from transformer.tokenizer import FILE_NAME
from transformer.types import UserError
from transformer.validation import require, shown

_LARGEST, _LARGEST_CONFIG = 2**29, 2**25  # bytes
_NAMED = ("tokenizer_config.json", "special_tokens_map.json")
_PROBES = ("a", "A", "1", "the", "\N{HIRAGANA LETTER A}")


class _Folder(NamedTuple):
    """What the small files of a folder say."""

    path: epath.Path
    tokens: Mapping[str, str]
    """Role of a special token, as eos_token -> its text."""
    config: Mapping[str, Any]
    generation: Mapping[str, Any]


def from_folder(directory: epath.PathLike) -> tuple[SpecialIds, dict[str, bytes]]:
    """The tokenizer of a folder: its kind with the special ids, and the files of the run's record, byte for byte.

    Args:
        directory: with a `tokenizer.json`, and perhaps `tokenizer_config.json`, `special_tokens_map.json`,
            `generation_config.json` and `config.json`.

    Raises:
        UserError: there is none, or a file is not as it must be.

    Example:
        `kind, files = from_folder("SmolLM2-135M")`; then `kind.load(files["tokenizer.json"].decode())` is the tokenizer.
    """
    folder = _read(epath.Path(expand(directory)))
    require(
        (folder.path / FILE_NAME).exists(),
        f"A pretrained tokenizer must be a {FILE_NAME}, {folder.path} has none; load the folder with "
        "transformers.AutoTokenizer and save it again (save_pretrained), which writes one.",
    )
    content = _bytes(folder.path / FILE_NAME, _LARGEST)
    try:
        read_fields(content)
        model = read_model(content)
        kind = Pretrained(**_special_ids(folder, model))
        PretrainedTokenizer(content, kind)
    except UserError as error:
        raise UserError(f"{folder.path / FILE_NAME}: {error}") from None
    except Exception as error:
        raise UserError(f"{folder.path / FILE_NAME} must be a file of the tokenizers library: {error!s:.200}") from None
    return kind, {FILE_NAME: content}


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
    size = path.stat().length
    require(size <= most, f"{path} must have at most {most:,} bytes, it has {size:,}.")
    return path.read_bytes()


def _fields(path: epath.Path) -> dict[str, Any]:
    """The object of a JSON file; nothing where it is missing."""
    if not path.exists():
        return {}
    try:
        fields = json.loads(_bytes(path, _LARGEST_CONFIG).decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be JSON, but is not ({error}).") from None
    require(isinstance(fields, dict), f"{path} must be an object of fields, got {shown(fields)}.")
    return fields


# ---- Special ids -----------------------------------------------------------------------------------------------------


def _special_ids(folder: _Folder, model: tokenizers.Tokenizer) -> dict[str, Any]:
    known_V = table_of(model.get_vocab(with_added_tokens=True))

    def known(values: Any) -> list[int]:
        """Those of an id, or of a list, that a token has: a config may name others."""
        flat = values if isinstance(values, list) else [values]
        return [
            i for i in flat if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < len(known_V) and known_V[i]
        ]

    def of(role: str) -> list[int]:
        """The id of a special token, by its name, else by the model's config."""
        index = model.token_to_id(folder.tokens[f"{role}_token"]) if f"{role}_token" in folder.tokens else None
        return [index] if index is not None else known(folder.config.get(f"{role}_token_id"))

    begin, end = _template(model)
    ends = of("eos") or of("sep") or known(folder.generation.get("eos_token_id")) or list(end[-1:])
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
        "pad": first(of("pad")),
        "decoder_start": first(starts),
        "mask": first(of("mask")),
    }


def _template(model: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the file's post-processor puts before a text and after it: found by what it makes of one."""
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
    """Texts, some of which have tokens."""
    yield from _PROBES
    yield from (model.decode([index]) for index in range(min(256, model.get_vocab_size())))
