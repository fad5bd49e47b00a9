"""Prefix language modelling: next-token cross-entropy after a prefix that is read in both directions."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from transformer.data.draws import random_at
from transformer.data.forms.text import RunningText
from transformer.form import Shown
from transformer.models.decoder import Decoder
from transformer.objective import OBJECTIVES
from transformer.objectives.bases import read_whole
from transformer.objectives.continuation import ContinuesText
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import chunked, predicted_statistics
from transformer.tokenizer import prompt_ids
from transformer.trained import Trained
from transformer.types import Batch, LossOutput, Noise, PyTree, Reading

if TYPE_CHECKING:
    import flax.linen as nn

    from transformer.data.tokenizers import Tokenizer, Vocabulary

_KEY = 8  # separates these random numbers from others with the same seed


@OBJECTIVES.register
@dataclasses.dataclass(frozen=True)
class PrefixLM(ContinuesText):
    """Cross-entropy of the tokens after a prefix, which is read in both directions: the prompt, or a random part of the text
    (Liu et al. 2018; Raffel et al. 2020, section 3.2.1)."""

    kind = "prefix_lm"
    reads = "text"
    model_class = Decoder

    def loss(
        self,
        model: "nn.Module",
        vocabulary: "Vocabulary",
        params: PyTree,
        carry: PyTree,
        batch: Batch,
        key: Array,
        train: bool,
    ) -> LossOutput:
        """The loss of a `Decoder` with `bidirectional_prefix`.

        Its statistics are sums over the targets after the prefixes (`predicted_statistics`). They leave out bytes: compressors'
        scores cover all of a text, and would not be comparable.
        """
        predicted, routing = model.apply(
            {"params": params},
            batch.inputs,
            positions_BT=batch.positions,
            segment_ids_BT=batch.segment_ids,
            prefix_BT=prefix_tokens(batch.weights, batch.segment_ids),
            train=train,
            rngs={"dropout": key} if train else {},
            head=not chunked(self),
            mutable="routing",
        )
        statistics = predicted_statistics(model, params, predicted, batch.targets, batch.weights, self)
        statistics = add_routing(statistics, routing, self)
        return (statistics["objective"], statistics["weight"]), (carry, jax.lax.stop_gradient(statistics))

    def model_settings(self, vocabulary: "Vocabulary | None", class_names: tuple[str, ...]) -> Mapping[str, Any]:
        """The decoder reads the prefix in both directions."""
        return {"bidirectional_prefix": True}

    def changes(self, tokenizer: "Tokenizer", length: int, seed: int) -> Mapping[str, Any]:
        """Each row gets a random prefix."""
        return {"noise": random_prefixes(seed)}

    def reading(self, run: Trained, text: str, target: str | None = None) -> Reading:
        """The text as a prefix; the target (by default nothing) follows it."""
        prefix_T = np.array(prompt_ids(run.tokenizer, text))
        ids_T = np.concatenate([prefix_T, run.tokenizer.encode(target or "")])
        ids_T = read_whole(ids_T, run.config.model.max_length, "A text with what follows it")
        prefix_BT = (np.arange(len(ids_T)) < len(prefix_T))[None]
        options = {"prefix_BT": prefix_BT}
        return Reading(
            {"decoder": ids_T}, (ids_T[None],), options, predicts="next token", of="decoder", first=len(prefix_T) - 1
        )

    def reads_texts(self, segment_ids_BT: Array | np.ndarray) -> tuple[str, Mapping[str, Any]]:
        """The whole text is a prefix."""
        return "__call__", {"segment_ids_BT": segment_ids_BT, "prefix_BT": segment_ids_BT > 0}

    def show(self, batch: Batch, tokenizer: "Tokenizer", class_names: Sequence[str]) -> Iterator[Shown]:
        """Rows of text, and a mask in which prefixes are read in both directions."""
        prefix_BT = np.asarray(prefix_tokens(batch.weights, batch.segment_ids))
        return RunningText().show(batch, tokenizer, class_names, prefix_BT)


def random_prefixes(seed: int) -> Noise:
    """Set the weight of the first targets of each segment to 0; their number is uniform, and at least one target remains.

    The prefix is not stored: it is every token before the first target with weight > 0 (Raffel et al. 2020, section 3.2.3). A
    segment that begins with a prompt already has one.
    """

    def noise(batch: Batch, row: int, place: tuple[int, ...]) -> None:
        segments_T, weights_T = batch.segment_ids[row], batch.weights[row]
        draws_T = random_at(seed, _KEY, *place).uniform(size=len(weights_T))
        for segment in range(1, segments_T.max() + 1):
            (columns,) = np.nonzero(segments_T == segment)
            if weights_T[columns[0]] > 0:
                weights_T[columns[: int(draws_T[segment - 1] * len(columns))]] = 0

    return noise


def prefix_tokens(
    weights_BT: Float[Array | np.ndarray, "B T"], segment_ids_BT: Int[Array | np.ndarray, "B T"] | None = None
) -> Bool[Array, "B T"]:
    """True for inputs in a prefix: from the start of each segment (or row) through the input of the first target that counts.
    >>> prefix_tokens(jnp.array([[0.0, 0, 1, 1, 0, 1]]), jnp.array([[1, 1, 1, 1, 2, 2]])).astype(int).tolist()
    [[1, 1, 1, 0, 1, 1]]
    """
    counted_BT = (weights_BT > 0).astype(jnp.int32)
    before_BT = jnp.cumsum(counted_BT, axis=1) - counted_BT
    if segment_ids_BT is None:
        return before_BT == 0
    starts_BT = jnp.diff(segment_ids_BT, axis=1, prepend=-1) != 0
    # It never decreases: its value at the latest start is the maximum over the starts so far.
    at_start_BT = jax.lax.cummax(jnp.where(starts_BT, before_BT, 0), axis=1)
    return before_BT == at_start_BT
