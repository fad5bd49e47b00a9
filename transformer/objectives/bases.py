"""What objectives with logits over a vocabulary have in common, and those that say something of a whole text."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from transformer.data.forms.examples import buckets, by_length, padded
from transformer.objective import Objective, Trained
from transformer.validation import require_at_least

_BATCHES_AT_ONCE = 64  # that texts are sorted within, by length


@dataclasses.dataclass(frozen=True)
class TokenObjective(Objective):
    """An objective over a vocabulary."""

    loss_chunks: int = 1
    """Parts of each row whose logits are computed, and forgotten, one after another: memory for those of one part only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "loss_chunks")

    def in_chunks(self, count: int) -> Objective:
        """The same loss, whose logits are computed in so many parts."""
        return dataclasses.replace(self, loss_chunks=count)


def rows_of_texts(
    objective: Objective, run: Trained, texts: Sequence[str], batch_size: int, compute: Callable[..., Any]
) -> Iterator[np.ndarray]:
    """What a model computes of each text, in order; those of similar length are read together.

    Args:
        objective: encodes the texts.
        run: the trained model.
        texts: none of them blank.
        batch_size: texts that are read together.
        compute: `(model, params, tokens_BT, segment_ids_BT)` -> float32 [B, ...].
    """
    data, at_once = run.config.data, _BATCHES_AT_ONCE * batch_size
    for start in range(0, len(texts), at_once):
        encoded = [objective.encode(text, run.tokenizer, data) for text in texts[start : start + at_once]]
        found: list[Any] = [None] * len(encoded)
        for indices in by_length(encoded, batch_size):
            length = next(bucket for bucket in buckets(data) if bucket >= len(encoded[indices[-1]]))
            tokens_BT, segment_ids_BT = padded([encoded[index] for index in indices], batch_size, length)
            rows = np.asarray(compute(run.model, run.params, tokens_BT, segment_ids_BT))
            for index, row in zip(indices, rows, strict=False):  # the last rows only fill up the batch
                found[index] = row
        yield from found
