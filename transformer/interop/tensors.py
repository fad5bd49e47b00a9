"""Files in the safetensors format: read as views of the memory-mapped file, and written one tensor after the other.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, the header, and the bytes of
all tensors without a gap. The safetensors library copies each tensor that it reads, and needs all of them in memory to write.
Here, a process reads the bytes of its own shards only.
"""

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from transformer.types import UserError
from transformer.validation import require, shown

FLOATS = ("F64", "F32", "F16", "BF16")
"""The members of `DTYPES` that parameters may have."""
DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Types by their names in a header. Tensors of 8-bit floats are refused when read."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's limit
_METADATA = "__metadata__"
_MOST_AXES = 64  # numpy's limit
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,15}")


class Stored(NamedTuple):
    """The description of a tensor in the header of its file."""

    file: str
    dtype: str
    """The type's name in headers."""
    shape: tuple[int, ...]
    start: int
    """The offset of its bytes in the file."""
    end: int

    def view(self, mapped: mmap.mmap) -> np.ndarray:
        """The tensor as a read-only view of its memory-mapped file: bytes are read on access.

        Raises:
            UserError: its type is not one of `DTYPES`, or the file has been truncated.
        """
        require(
            self.dtype in DTYPES,
            f"A tensor must be of a type that is known ({', '.join(DTYPES)}), {self.file} has one of {self.dtype}; use a folder "
            "that is not quantised.",
        )
        require(
            self.end <= len(mapped), f"{self.file} must have {self.end} bytes as when it was opened, not {len(mapped)}."
        )
        dtype = DTYPES[self.dtype]
        count = (self.end - self.start) // dtype.itemsize
        return np.frombuffer(mapped, dtype, count, self.start).reshape(self.shape)


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """A file mapped to memory for reading."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file by name, and its metadata; only the header is read.

    Raises:
        UserError: the file is truncated, or its header violates the format.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        whole = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        size = int.from_bytes(prefix, "little") if len(prefix) == 8 else -1
        require(
            2 <= size <= _MAX_HEADER and 8 + size <= whole,
            f"{name} must be a whole safetensors file, but is truncated, or no such file ({whole} bytes, a header of {size}).",
        )
        header = _parsed(file.read(size), name)
    metadata = header.pop(_METADATA, {})
    require(
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()),
        f"{name}: the metadata must be texts, got {shown(metadata)}.",
    )
    tensors = {key: _described(value, key, name, 8 + size) for key, value in header.items()}
    end = 8 + size
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        require(
            tensor.start == end,
            f"{name}: tensors must follow each other without gap or overlap, one begins at byte {tensor.start} where {end} was "
            "due; the file is damaged.",
        )
        end = tensor.end
    require(
        end == whole,
        f"{name} must end with its last tensor, at byte {end}, but has {whole} bytes; it is truncated or damaged. Copy it again.",
    )
    return tensors, metadata


def _parsed(content: bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len(dict(pairs)) == len(pairs), f"{name}: the header must name each tensor once; the file is damaged.")
        return dict(pairs)

    try:
        header = json.loads(content, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError):
        header = None
    require(
        isinstance(header, dict), f"{name} must begin with a header in JSON; the file is damaged, or no safetensors."
    )
    assert isinstance(header, dict)
    return header


def _described(value: Any, key: str, name: str, begin: int) -> Stored:
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    whole = [
        isinstance(numbers, list) and all(type(x) is int and 0 <= x < 2**63 for x in numbers)
        for numbers in (shape, offsets)
    ]
    require(
        isinstance(dtype, str)
        and whole[0]
        and len(shape) <= _MOST_AXES
        and _DTYPE.fullmatch(dtype) is not None
        and all(whole)
        and len(offsets) == 2
        and offsets[0] <= offsets[1],
        f"{name}: a tensor must have a dtype, a shape and data_offsets, {key!r:.80} has {shown(value)}; the file is damaged.",
    )
    if dtype in DTYPES:
        needed = math.prod(shape) * DTYPES[dtype].itemsize
        require(
            offsets[1] - offsets[0] == needed,
            f"{name}: {key!r:.80} must have {shown(needed)} bytes for {dtype} {shown(shape)}, got {offsets[1] - offsets[0]}; the "
            "file is damaged.",
        )
    return Stored(name, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


class Planned(NamedTuple):
    """A tensor to write, with known type and shape; its values are fetched later."""

    dtype: np.dtype
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]
    """Fetches the values; called once, while the file is written."""

    @property
    def num_bytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(file: IO[bytes] | None, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors, in order. Without a file, the tensors are still fetched, as every process must."""
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.num_bytes
        header[name] = {
            "dtype": _NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-(8 + len(content)) % 64)  # aligns the first tensor for devices
    if file is not None:
        file.write(len(content).to_bytes(8, "little") + content)
    for tensor in tensors.values():
        values = tensor.values()
        if file is not None:
            _write(file, np.ascontiguousarray(values, tensor.dtype))


def _write(file: IO[bytes], values: np.ndarray) -> None:
    flat = values.reshape(-1).view(np.uint8)
    for start in range(0, len(flat), 2**26):
        file.write(flat[start : start + 2**26].data)


def pieces(tensors: Mapping[str, Planned], limit: int) -> list[dict[str, Planned]]:
    """Tensors in groups of at most `limit` bytes, in order; a larger tensor is a group by itself."""
    found: list[dict[str, Planned]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if found[-1] and size + tensor.num_bytes > limit:
            found.append({})
            size = 0
        found[-1][name] = tensor
        size += tensor.num_bytes
    return found


def total_bytes(tensors: Iterable[Planned]) -> int:
    """The total size of the tensors."""
    return sum(tensor.num_bytes for tensor in tensors)
