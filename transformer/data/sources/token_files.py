"""Files of token ids as sources: nanoGPT's `train.bin`, and the shards of llm.c and modded-nanoGPT."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from etils import epath

from transformer.config import DataConfig
from transformer.data.files import is_there, kind_of
from transformer.data.identity import ContentHash
from transformer.data.prepare import data_directory
from transformer.data.records import RandomAccess
from transformer.data.seen import stamp
from transformer.data.source import Source
from transformer.data.source_kind import SourceKind
from transformer.data.sources.globs import is_pattern, matching
from transformer.data.tasks import Run
from transformer.data.token_stream import Part, TokenStream
from transformer.storage import expand, resolved
from transformer.types import UserError
from transformer.validation import counted, require

_SUFFIX = ".bin"
_SPLIT = re.compile(r"(?:^|[_-])(train|val|validation|test)(?:[_-]\d+)?\.bin")
_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class TokenFiles(SourceKind):
    """A .bin file, a pattern of such files, or a folder with `train.bin` or `..._train_000001.bin`, perhaps with a `val` file."""

    def accepts(self, name: str) -> bool:
        """Recognize a file by its suffix, and a folder by the names in it."""
        path = epath.Path(expand(name))
        if kind_of(path) == _SUFFIX and not path.is_dir():
            return is_there(name) or is_pattern(name)
        return path.is_dir() and any(_SPLIT.search(child.name) for child in path.iterdir())

    def title(self, name: str) -> tuple[str, str]:
        """Name the corpus after the file or folder."""
        path = epath.Path(expand(name))
        return (path.name if is_pattern(name) else resolved(name).name), "1.0.0"

    def documents(self, name: str, config: DataConfig) -> Iterator[Any]:
        """Refuse: token files hold no text."""
        del config
        raise _no_text(name)

    def open_text(self, name: str, config: DataConfig, run: Run | None = None) -> Source:
        """Open the ids, which are used unchanged; there is nothing to prepare."""
        del run
        streams = {split: TokenStream(paths) for split, paths in _files(name).items()}
        digests = {split: self._digest(name, split, stream, config) for split, stream in streams.items()}
        parts = _parts(streams, digests, config)
        sizes = {split: part.stop - part.start for split, part in parts.items()}
        longest = max(2, config.record_bytes // streams["train"].dtype.itemsize)
        index = data_directory(config) / "token_index"
        title = self.title(name)[0]
        description = ", ".join(f"{split} {counted(size, 'token')}" for split, size in sizes.items())

        @functools.lru_cache(len(parts))
        def encoded(split: str, tokenizer: Any) -> Sequence[Any]:
            return parts[split].records(tokenizer, longest, index)

        return Source(
            title,
            self._fingerprint(digests, config),
            sizes,
            f"{title}: {description}",
            lambda split: _NoText(title),
            encoded=encoded,
        )

    def fingerprint(self, name: str, config: DataConfig) -> str:
        """The fingerprint of the source that `open_text` opens."""
        files = _files(name).items()
        return self._fingerprint(
            {split: self._digest(name, split, TokenStream(paths), config) for split, paths in files}, config
        )

    def _fingerprint(self, digests: Mapping[str, str], config: DataConfig) -> str:
        content = ContentHash()
        carved = (config.validation_fraction, config.test_fraction) if len(digests) == 1 else ()
        content.add("ids", *(part for item in sorted(digests.items()) for part in item), *carved)
        return content.hexdigest()

    def _digest(self, name: str, split: str, stream: TokenStream, config: DataConfig) -> str:
        seen = stamp(name, (type(self).__qualname__, split), data_directory(config), [f.path for f in stream.files])
        known = seen.known()
        if known is None:
            known = stream.digest(self.title(name)[0])
            seen.note(known)
        return known


class _NoText(RandomAccess[Any]):
    """A placeholder for records without text; reading one is an error."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __len__(self) -> int:
        return 0

    def _read(self, index: int) -> NoReturn:
        raise IndexError(index)

    def __iter__(self) -> Iterator[Any]:
        raise _no_text(self._name)


def _no_text(name: str) -> UserError:
    return UserError(
        f"A vocabulary is trained on text, {name} has ids. Give the tokenizer that made them: its folder "
        "(data.tokenizer.folder), a model that has it (training.init_from), data.tokenizer.kind=bytes, or ids alone "
        "(data.tokenizer.kind=ids)."
    )


def _files(name: str) -> dict[str, list[epath.Path]]:
    """The files of each split, in the order of their names."""
    path = epath.Path(expand(name))
    if not path.is_dir():
        packed = path.name.lower().rpartition(_SUFFIX)[2]
        require(packed == "", f"A file of ids must not be compressed, {name} is: unpack it first.")
        found = [path] if is_there(name) else matching(name)
        require(len(found) > 0, f"A pattern must match a file, {name} matches none.")
        return {"train": found}
    splits: dict[str, list[epath.Path]] = {}
    for child in sorted(path.iterdir()):
        named = _SPLIT.search(child.name)
        if named and not child.name.startswith("."):
            splits.setdefault(_SPLITS[named[1]], []).append(child)
    require("train" in splits, f"A folder of ids must have a file for training, {path} has none named train.")
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def _parts(streams: Mapping[str, TokenStream], digests: Mapping[str, str], config: DataConfig) -> dict[str, Part]:
    """The splits with files of their own; a single stream is split as the config says, from its end."""
    if len(streams) > 1:
        return {split: Part(stream, 0, len(stream), digests[split]) for split, stream in streams.items()}
    (stream,), (digest,) = streams.values(), digests.values()
    shares = {"validation": config.validation_fraction, "test": config.test_fraction}
    held_out = {split: max(1, int(len(stream) * share)) for split, share in shares.items() if share > 0}
    start = len(stream) - sum(held_out.values())
    require(
        start > 0,
        f"A source must leave ids for each split, {stream.files[0].path} has {len(stream):,}: add some, or set "
        "data.validation_fraction=0.",
    )
    parts = {"train": Part(stream, 0, start, digest)}
    for split, size in held_out.items():
        parts[split] = Part(stream, start, start + size, digest)
        start += size
    return parts
