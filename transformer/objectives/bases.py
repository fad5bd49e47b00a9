"""Bases of objectives with logits over a vocabulary, and of those that predict from a whole text."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from transformer.data.forms.examples import buckets, by_length, padded
from transformer.objective import Objective
from transformer.trained import Trained
from transformer.validation import require, require_at_least

_BATCHES_AT_ONCE = 64  # texts are sorted by length within this many batches


@dataclasses.dataclass(frozen=True)
class TokenObjective(Objective):
    """An objective over a vocabulary."""

    loss_chunks: int = 1
    """Number of chunks of each row whose logits are computed one after another: memory for the logits of one chunk only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "loss_chunks")

    def in_chunks(self, count: int) -> Objective:
        """The same loss, with logits computed in this many chunks."""
        return dataclasses.replace(self, loss_chunks=count)


def read_whole(ids_N: np.ndarray, room: int, what: str = "A text") -> np.ndarray:
    """Ids of a text that fits in the model; a longer one is refused, not cut."""
    require(
        len(ids_N) <= room,
        f"{what} to look at must have at most the {room} tokens that the model reads, got {len(ids_N)} (special tokens "
        "included); shorten it.",
    )
    return np.asarray(ids_N, np.int32)


def refuse_target(objective: Objective, target: str | None) -> None:
    """Raise UserError for a target: it is for models that read two texts."""
    require(
        target is None,
        f"A target is for translators and prefix language models, got one for a run of {objective.kind}; leave it out.",
    )


def rows_of_texts(
    objective: Objective, run: Trained, texts: Sequence[str], batch_size: int, compute: Callable[..., Any]
) -> Iterator[np.ndarray]:
    """A model's output for each text, in their order; texts of similar length are batched together.

    Args:
        objective: encodes the texts.
        run: the trained model.
        texts: none of them blank.
        batch_size: texts per batch.
        compute: `(model, params, tokens_BT, segment_ids_BT)` -> float32 [B, ...].
    """
    data, at_once = run.config.data, _BATCHES_AT_ONCE * batch_size
    for start in range(0, len(texts), at_once):
        encoded = [objective.encode(text, run.tokenizer, data) for text in texts[start : start + at_once]]
        found: list[Any] = [None] * len(encoded)
        for indices in by_length(encoded, batch_size):
            length = next(bucket for bucket in buckets(data) if bucket >= len(encoded[indices[-1]]))
            tokens_BT, segment_ids_BT = padded([encoded[index] for index in indices], batch_size, length)
            rows = np.asarray(compute(run.model, run.params, run.place(tokens_BT), run.place(segment_ids_BT)))
            for index, row in zip(indices, rows, strict=False):  # the last rows fill up the batch
                found[index] = row
        yield from found
