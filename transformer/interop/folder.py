"""A Hugging Face folder: its config, its model family, and its tensors in one file or several."""

import dataclasses
import hashlib
import json
import mmap
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from transformer.interop.family import FAMILIES, Keys, ModelFamily, Pretrained
from transformer.interop.tensors import DTYPES, Stored, map_file, read_header
from transformer.model_kinds import POOLINGS
from transformer.storage import expand
from transformer.types import Json, UserError
from transformer.validation import did_you_mean, require, shown

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
_MOST_CONFIG, _MOST_INDEX = 16_000_000, 64_000_000  # bytes
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|h5|msgpack)")


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the folder of a pretrained model, rather than of a run."""
    root = pathlib.Path(expand(path))
    if not root.is_dir() or (root / "checkpoints").exists():
        return False
    values = _quietly(root / CONFIG)
    return isinstance(values, dict) and "model_type" in values


def _quietly(path: pathlib.Path) -> Any:
    try:
        return read_json(path, _MOST_CONFIG)
    except (UserError, OSError):
        return None


def read_small(path: pathlib.Path, most: int = _MOST_CONFIG) -> str:
    """The text of a small file.

    Raises:
        UserError: it is missing, not a regular file, too large, or not text.
    """
    require(
        path.is_file(), f"A pretrained model must have a file {path.name}, {path.parent} has none; copy all its files."
    )
    size = path.stat().st_size
    require(size <= most, f"{path} must have at most {most:,} bytes, it has {size:,}.")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} must be text (JSON in UTF-8), but is damaged ({f'{error}':.100}); copy it again."
        ) from error


def read_json(path: pathlib.Path, most: int = _MOST_CONFIG) -> Json:
    """The content of a small JSON file.

    Raises:
        UserError: it is missing, too large, or not JSON.
    """
    text = read_small(path, most)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be JSON, but is damaged ({f'{error}':.100}); copy it again.") from error


class Folder:
    """A pretrained model on disk; weights are read on access.

    Args:
        path: the folder.

    Raises:
        UserError: it is no such folder, or its model is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(expand(path))
        require(
            self.path.is_dir(),
            f"A pretrained model must be a folder, {self.path} is none. Nothing is downloaded: `hf download NAME --local-dir "
            "DIR` makes a folder of a published model.",
        )
        require(
            not (self.path / "checkpoints").is_dir(),
            f"A pretrained model must be a folder with {CONFIG} and weights, {self.path} is the directory of a run; use it as "
            "it is.",
        )
        require(
            (self.path / CONFIG).exists() or not (self.path / "adapter_config.json").exists(),
            f"{self.path} has an adapter of PEFT, not a model; import its base, and then this with --base and the base's run.",
        )
        self.values = self._config()
        name = self.values["model_type"]
        self.family: ModelFamily = FAMILIES.find(name)()
        self.bare = False
        """Whether tensor names lack the prefix of models with a head."""
        self.tensors = self._open_weights()
        """The tensors by name, from the headers of all files."""
        self.pretrained: Pretrained
        self.keys: Keys
        self.pretrained, self.keys = self.family.pretrained(self.values, str(self.path / CONFIG), self.tensors)
        if self.pretrained.objective == "embedding":
            self.pretrained = sentence_encoder(self.path, self.pretrained)
        self._maps: dict[str, mmap.mmap] = {}

    @property
    def architecture(self) -> str:
        """The class named in the config, or else the family's first."""
        return (self.values.get("architectures") or [next(iter(self.family.architectures))])[0]

    def _config(self) -> dict[str, Any]:
        path = self.path / CONFIG
        values = read_json(path)
        require(isinstance(values, dict), f"{path} must be an object of keys, got {shown(values)}.")
        name = values.get("model_type")
        require(
            isinstance(name, str) and name in FAMILIES.names,
            f"{path}: model_type must be one of {', '.join(FAMILIES.names)}, got {shown(name)}"
            f"{did_you_mean(str(name), list(FAMILIES.names))}",
        )
        return values

    def _open_weights(self) -> dict[str, Stored]:
        index = self.path / INDEX
        files = [WEIGHTS] if not index.exists() else self._pieces(index)
        if index.exists() and (self.path / WEIGHTS).exists() and WEIGHTS not in files:
            raise UserError(
                f"{self.path} must have {WEIGHTS} or {INDEX}, it has both; remove the one that is not meant."
            )
        tensors: dict[str, Stored] = {}
        for name in files:
            found, _ = read_header(self._file(name))
            twice = sorted(set(found) & set(tensors))
            require(
                not twice, f"{self.path} must have each tensor once, {shown(twice[:1])} is in {name} and another piece."
            )
            tensors |= found
        if index.exists():
            self._compare(index, tensors)
        return self._renamed(tensors)

    def _file(self, name: str) -> pathlib.Path:
        path = self.path / name
        if not path.exists():
            pickled = sorted(found.name for found in self.path.iterdir() if _PICKLES.fullmatch(found.name))
            remedy = (
                f"it has {pickled[0]}, which is never read: loading it can run code. Convert it with transformers' "
                "save_pretrained, which writes safetensors"
                if pickled
                else "copy all its files"
            )
            raise UserError(f"A pretrained model must have its weights in {name}, {self.path} has not; {remedy}.")
        # Links are followed, because Hugging Face caches consist of links; the target must be a regular file.
        require(os.path.isfile(path), f"{path} must be a regular file, or a link to one.")
        return path

    def _pieces(self, index: pathlib.Path) -> list[str]:
        values = read_json(index, _MOST_INDEX)
        names = values.get("weight_map") if isinstance(values, dict) else None
        require(
            isinstance(names, dict) and len(names) > 0 and all(isinstance(name, str) for name in names.values()),
            f"{index} must have a weight_map, a file for each tensor, got {shown(names)}.",
        )
        assert isinstance(names, dict)
        files = sorted(set(names.values()))
        strange = [name for name in files if not _PLAIN.fullmatch(name) or not name.endswith(".safetensors")]
        require(not strange, f"{index} must name plain files of this folder, got {shown(strange[:1])}.")
        return files

    def _compare(self, index: pathlib.Path, tensors: Mapping[str, Stored]) -> None:
        names: dict[str, str] = read_json(index, _MOST_INDEX)["weight_map"]
        wrong = [
            name
            for name in sorted({*names, *tensors})
            if name not in tensors or os.path.basename(tensors[name].file) != names.get(name)
        ]
        require(
            not wrong,
            f"{index} must say in which piece each tensor is, {shown(wrong[:1])} is not there, or in another one; copy all "
            "files of one version.",
        )

    def _renamed(self, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        """The tensors with current suffixes, and with the prefix of models with a head."""
        found: dict[str, Stored] = {}
        self.bare = bare = not any(name.startswith(self.family.prefix) for name in tensors)
        for name, tensor in tensors.items():
            new = name
            for old, now in self.family.renamed.items():
                new = new.removesuffix(old) + now if new.endswith(old) else new
            new = f"{self.family.prefix}{new}" if bare and not self.family.outside_prefix(new) else new
            require(
                new not in found,
                f"{self.path} must have each tensor once, it has {name:.80} and another for {new:.80}.",
            )
            found[new] = tensor
        return found

    def view(self, tensor: Stored) -> np.ndarray:
        """A tensor as a view of its memory-mapped file."""
        if tensor.file not in self._maps:
            self._maps[tensor.file] = map_file(tensor.file)
        return tensor.view(self._maps[tensor.file])

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file that is read: the config, the weights and the tokenizer."""
        names = [CONFIG, INDEX, WEIGHTS, *(self._pieces(self.path / INDEX) if (self.path / INDEX).exists() else ())]
        names += sorted(p.name for p in self.path.iterdir() if p.suffix in (".json", ".model", ".jinja", ".txt"))
        return {name: _sha256(self.path / name) for name in dict.fromkeys(names) if os.path.isfile(self.path / name)}


_SENTENCE_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLINGS = {"cls_token": "first", "mean_tokens": "mean", "max_tokens": "max"}


def sentence_encoder(root: pathlib.Path, found: Pretrained) -> Pretrained:
    """The model with the pooling and the longest text from a sentence encoder's `modules.json`.

    Without such a file, the pooling is the mean, without normalization.

    Raises:
        UserError: it names modules that are not supported.
    """
    path = root / "modules.json"
    if not path.exists():
        return found._replace(settings={"normalize": False})
    modules = read_json(path)
    known = isinstance(modules, list) and all(
        isinstance(module, dict) and isinstance(module.get("type"), str) and isinstance(module.get("path"), str)
        for module in modules
    )
    names = tuple(module["type"].rpartition(".")[2] for module in modules) if known else ()
    require(
        names in (_SENTENCE_MODULES, _SENTENCE_MODULES[:2]),
        f"{path} must list {', '.join(_SENTENCE_MODULES[:2])} and perhaps Normalize, in turn, got {shown(names or modules)}.",
    )
    folder = modules[1]["path"]
    require(_PLAIN.fullmatch(folder) is not None, f"{path} must name plain folders of this one, got {shown(folder)}.")
    values = read_json(root / folder / CONFIG)
    require(isinstance(values, dict), f"{root / folder / CONFIG} must be an object of keys, got {shown(values)}.")
    name = values.get("pooling_mode")
    chosen = [mode for mode in values if mode.startswith("pooling_mode_") and values[mode] is True]
    modes = [f"{name}_token{'s' * (name != 'cls')}"] if isinstance(name, str) else [m[13:] for m in chosen]
    require(
        len(modes) == 1 and modes[0] in _POOLINGS,
        f"{root / folder / CONFIG} must choose one pooling of {', '.join(_POOLINGS)}, got {shown(modes)}.",
    )
    pooling = POOLINGS.find(_POOLINGS[modes[0]])()
    model = dataclasses.replace(found.model, pooling=pooling)
    longest = _longest_text(root, found.model.max_length)
    return found._replace(model=model, settings={"normalize": len(names) == 3}, longest_text=longest)


def _longest_text(root: pathlib.Path, length: int) -> int:
    """The longest text of a sentence encoder, according to its files.

    Raises:
        UserError: it changes texts in a way that is not supported.
    """
    values: dict[str, Any] = {}
    for path in [*sorted(root.glob("sentence_*_config.json")), root / "config_sentence_transformers.json"]:
        found = read_json(path) if path.exists() else {}
        require(isinstance(found, dict), f"{path} must be an object of keys, got {shown(found)}.")
        values = found | values
    for name, neutral in {"do_lower_case": False, "default_prompt_name": None}.items():
        require(
            values.get(name, neutral) in (neutral, None),
            f"{root} must not change the texts of a sentence encoder, it has {name}={shown(values.get(name))}; remove that "
            "from a copy, and change your texts so.",
        )
    longest = values.get("max_seq_length") or 0
    require(
        type(longest) is int and 0 <= longest <= (length or longest),
        f"{root}: max_seq_length must be a number of at most {length} tokens, got {shown(longest)}.",
    )
    return longest


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_dtypes(tensors: Mapping[str, Stored]) -> dict[str, list[str]]:
    """The names of the tensors of each type."""
    found: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.dtype, []).append(name)
    return found


def common_dtype(tensors: Mapping[str, Stored], where: object) -> np.dtype:
    """The type of all tensors.

    Raises:
        UserError: they have several types, or one that parameters cannot have.
    """
    found = stored_dtypes(tensors)
    counts = ", ".join(f"{len(names)} of {dtype}" for dtype, names in found.items())
    require(
        len(found) == 1 and next(iter(found), "") in ("F32", "F16", "BF16"),
        f"The parameters of a model must have one type of float32, float16 or bfloat16, {where} has {counts}; choose with "
        "--dtype.",
    )
    return DTYPES[next(iter(found))]
