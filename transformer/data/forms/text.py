"""Running text: documents packed into rows, or windows of them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer.config import DataConfig
from transformer.data.tokenizers import Tokenizer
from transformer.form import FORMS, Form, Shown
from transformer.ops.masks import AttentionMask
from transformer.types import Array, Batch
from transformer.validation import counted

if TYPE_CHECKING:
    from transformer.data.datasets import Dataset, Reader

_COLOURS = ("green", "cyan", "magenta", "yellow", "blue")
_MASK_SIZE = 24


@FORMS.register
@dataclasses.dataclass(frozen=True)
class RunningText(Form):
    """Running text."""

    kind = "text"
    title = "running text"
    noun = "token"
    settings = (
        "data.weights",
        "data.separator",
        "data.text_key",
        "data.prompt_key",
        "data.test_fraction",
        "data.pack",
        "data.max_segments",
        "data.best_fit",
        "data.limit",
        "data.num_streams",
        "data.record_bytes",
    )
    needs_name = False
    prepares = (
        "validation",
        "separator",
        "text_key",
        "prompt_key",
        "validation_fraction",
        "test_fraction",
        "record_bytes",
    )
    prepares += ("tokenizer", "tokenizer_size", "tokenizer_bytes", "beam_pipeline_options")

    def open(self, reader: "Reader") -> "Dataset":
        """Open the documents, read in streams; local text is prepared now unless it already is."""
        return reader.running_text()

    def fingerprints(self, reader: "Reader") -> list[str]:
        """Fingerprints of the sources; local text is not prepared."""
        return reader.text_fingerprints()

    def prepare(self, reader: "Reader", name: str, files: Mapping[str, Sequence[str]]) -> str:
        """Prepare the text as training does."""
        config = dataclasses.replace(reader.config, source=tuple(files["train"]))
        return dataclasses.replace(reader, config=config).running_text().description

    def max_segments(self, data: DataConfig) -> int:
        """Most documents in a packed row."""
        return data.max_segments

    def show(
        self, batch: Batch, tokenizer: Tokenizer, class_names: Sequence[str], prefix_BT: Array | None = None
    ) -> Iterator[Shown]:
        """Rows with one colour per document, and a picture of the attention mask of the first row."""
        if batch.segment_ids is None:
            batch = batch._replace(segment_ids=np.ones(batch.inputs.shape, np.int32))
        for row in range(len(batch.inputs)):
            count = int(np.sum(batch.weights[row] > 0))
            documents = counted(len(set(batch.segment_ids[row].tolist()) - {0}), "document")
            of_targets = f"{count} of {counted(len(batch.inputs[row]), 'target')} {'counts' if count == 1 else 'count'}"
            yield Shown(f"row {row}: {documents}, {of_targets}", [list(_documents(batch, row, tokenizer))])
        yield _mask_picture(batch.segment_ids[0], None if prefix_BT is None else np.asarray(prefix_BT)[0])


def _documents(batch: Batch, row: int, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """The text of a row: one colour per document, dim for tokens without loss."""
    segments, weights = batch.segment_ids[row], batch.weights[row] > 0
    starts = np.flatnonzero(np.diff(segments, prepend=-1) | np.diff(weights.astype(int), prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(segments)], strict=True):
        if segments[start] == 0:
            yield f"({counted(int(end - start), 'token')} of padding)", "dim"
            continue
        style = _COLOURS[segments[start] % len(_COLOURS)] + ("" if weights[start] else " dim")
        yield tokenizer.decode(batch.inputs[row, start:end]), style


def _mask_picture(segments_T: np.ndarray, prefix_T: np.ndarray | None) -> Shown:
    """The attention mask (■) where documents of the row meet or a prefix ends, else at the start of the row."""
    prefix_T = np.zeros(len(segments_T), bool) if prefix_T is None else prefix_T
    borders = np.flatnonzero((np.diff(segments_T) != 0) | np.diff(prefix_T))
    start = int(max(0, min(borders[0] - _MASK_SIZE // 2, len(segments_T) - _MASK_SIZE))) if len(borders) else 0
    columns = slice(start, start + _MASK_SIZE)
    part = np.asarray(segments_T[None, columns])
    mask = AttentionMask(causal=True, query_segment_ids=part, key_segment_ids=part, key_prefix=prefix_T[None, columns])
    allowed = np.asarray(mask.to_bool(*part.shape[-1:] * 2))[0, 0]
    lines = [[("".join("■ " if cell else "· " for cell in line), "")] for line in allowed]
    return Shown(f"attention among tokens {start} to {start + part.shape[1] - 1} of row 0", lines)
