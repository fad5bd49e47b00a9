"""Classification: the cross-entropy of a text's class."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import DataConfig
from transformer.data.forms.labelled import text_tokens
from transformer.evaluation.calibration import calibration_statistics
from transformer.models.classifier import Classifier
from transformer.objective import OBJECTIVES, Objective, shaped
from transformer.objectives.bases import read_whole, refuse_target, rows_of_texts
from transformer.objectives.routing import add_routing
from transformer.objectives.statistics import token_statistics
from transformer.tokenizer import encoder_ids, mask_id
from transformer.trained import Trained
from transformer.types import Array, LabelledBatch, LossOutput, PyTree, Reading
from transformer.validation import require, require_range

if TYPE_CHECKING:
    import flax.linen as nn

    from transformer.config import Config
    from transformer.data.datasets import Dataset
    from transformer.data.tokenizers import Tokenizer, Vocabulary
    from transformer.model_config import ModelConfig
    from transformer.model_kinds import Pooling


@OBJECTIVES.register
@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """Cross-entropy of a text's class."""

    kind = "classification"
    model_class = Classifier
    reads = "labelled"
    settings = ("model.pooling", "model.pooler", "model.token_types")

    class_weights: Literal["none", "balanced"] | tuple[float, ...] = "none"
    """Weight of each class in the training loss, a weighted mean: one number per class, or balanced, inverse to the class
    frequencies in the training split. Scores, and the validation loss, stay unweighted."""
    token_dropout: float = 0.0
    """Probability that a token is replaced by the mask in training, drawn anew in each step (word dropout, Iyyer et al. 2015)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 0, 1, "token_dropout")
        weights = self.class_weights
        require(
            isinstance(weights, str) or (len(weights) > 0 and all(0 < weight < float("inf") for weight in weights)),
            f"Classification.class_weights must be none, balanced or a positive number a class, got {weights}.",
        )

    def loss(
        self,
        model: "nn.Module",
        vocabulary: "Vocabulary",
        params: PyTree,
        carry: PyTree,
        batch: LabelledBatch,
        key: Array,
        train: bool,
    ) -> LossOutput:
        """The loss of a `Classifier`.

        Args:
            model: called as `model.apply({"params": params}, inputs, segment_ids_BT=, train=, rngs=)`, giving logits [B, C].
            vocabulary: its mask id is the pretrained tokenizer's, else the id after the last.
            params: of the model.
            carry: nothing.
            batch: labelled texts.
            key: for dropout, and for word dropout.
            train: apply both.

        With class weights, the training loss is `sum_i w[label_i] loss_i / sum_i w[label_i]`, label smoothing and z-loss included
        (scikit-learn's `class_weight`; equal to torch's without smoothing). Scores count every text equally.

        Its statistics are sums over texts (`token_statistics`) and, in evaluation, `confusion`, float32 [C, C]: the number of
        texts of the row's class that were classified as the column's; and `calibration` (`evaluation.calibration`).
        """
        dropout_key, token_key = jax.random.split(key)
        inputs_BT = batch.inputs
        if train and self.token_dropout:
            hidden_BT = jax.random.bernoulli(token_key, self.token_dropout, inputs_BT.shape)
            if batch.segment_ids is not None:
                hidden_BT &= batch.segment_ids > 0
            inputs_BT = jnp.where(hidden_BT, mask_id(vocabulary), inputs_BT)
        logits_BC, routing = model.apply(
            {"params": params},
            inputs_BT,
            segment_ids_BT=batch.segment_ids,
            train=train,
            rngs={"dropout": dropout_key} if train else {},
            mutable="routing",
        )
        statistics = token_statistics(logits_BC, batch.labels, batch.weights, self)
        if train and self._weighted:
            weights_B = self._weights(batch)
            statistics["objective"] = token_statistics(logits_BC, batch.labels, weights_B, self)["objective"]
            statistics["objective_weight"] = jnp.sum(weights_B)
        statistics = add_routing(statistics, routing, self)
        if not train:
            num_classes = logits_BC.shape[1]
            actual_BC, given_BC = (
                jax.nn.one_hot(x, num_classes, dtype=jnp.float32)
                for x in (batch.labels, jnp.argmax(logits_BC, axis=-1))
            )
            statistics["confusion"] = (actual_BC * batch.weights[:, None]).T @ given_BC
            probabilities_BC = jax.nn.softmax(logits_BC.astype(jnp.float32), axis=-1)
            statistics["calibration"] = calibration_statistics(probabilities_BC, batch.labels, batch.weights)
        weight_sum = statistics.get("objective_weight", statistics["weight"])
        return (statistics["objective"], weight_sum), (carry, jax.lax.stop_gradient(statistics))

    def weight(self, batch: LabelledBatch) -> Array:
        """The sum of the texts' weights, each times the weight of its class."""
        return jnp.sum(self._weights(batch) if self._weighted else batch.weights)

    def encode(self, text: str, tokenizer: "Tokenizer", data: DataConfig) -> Array:
        """End-of-text, then as much of the text as fits in a row."""
        return text_tokens(tokenizer, text, data)

    def pooling_of(self, config: "ModelConfig") -> "Pooling":
        """The model's own."""
        return config.pooling

    def predict(
        self, run: Trained, texts: Sequence[str], names: Sequence[str], batch_size: int, top_k: int = 1
    ) -> Iterator[dict[str, Any]]:
        """`class` and `probability`; with `top_k`, also `class_2`, `probability_2` and so on: the most likely classes."""
        require(top_k >= 1, f"top_k must be at least 1, got {top_k}.")
        for name, probabilities_C in zip(
            names, rows_of_texts(self, run, texts, batch_size, _probabilities), strict=True
        ):
            require(bool(np.isfinite(probabilities_C).all()), f"A probability must be a number, {name} has NaN.")
            order = np.argsort(-probabilities_C, kind="stable")[:top_k]
            yield {
                f"{column}_{rank}".removesuffix("_1"): value
                for rank, index in enumerate(order, 1)
                for column, value in (
                    ("class", run.class_names[index]),
                    ("probability", float(probabilities_C[index])),
                )
            }

    def reading(self, run: Trained, text: str, target: str | None = None) -> Reading:
        """The text, uncut, and its class."""
        refuse_target(self, target)
        ids_T = read_whole(encoder_ids(run.tokenizer, text), run.config.data.sequence_length)
        return Reading(
            {"encoder": ids_T}, (ids_T[None],), predicts="class", logits=lambda model, params, logits_BC: logits_BC
        )

    @property
    def _weighted(self) -> bool:
        return self.class_weights != "none"

    def _weights(self, batch: LabelledBatch) -> Array:
        if self.class_weights == "balanced":
            raise ValueError(
                "Balanced class_weights must be numbers before training; compute them with `balanced_weights`."
            )
        return batch.weights * jnp.asarray(self.class_weights, jnp.float32)[batch.labels]

    def extra_tokens(self, vocabulary: "Vocabulary", length: int) -> int:
        """The mask, even if nothing is masked: a classifier then fits the encoder that it starts from."""
        return int(mask_id(vocabulary) == vocabulary.vocab_size)

    def model_settings(self, vocabulary: "Vocabulary | None", class_names: tuple[str, ...]) -> Mapping[str, Any]:
        """One class per name."""
        return {"num_classes": len(class_names)}

    def batch_shapes(self, config: "Config") -> LabelledBatch:
        """One text per row."""
        rows, length = config.data.batch_size, config.data.sequence_length
        tokens = shaped((rows, length), np.int32)
        return LabelledBatch(tokens, tokens, shaped((rows,), np.int32), shaped((rows,), np.float32))

    def fit(self, data: "Dataset") -> tuple[Objective, str]:
        """The objective with class weights as numbers."""
        names, weights = data.class_names, self.class_weights
        if weights == "none":
            return self, ""
        if isinstance(weights, str):
            weights = balanced_weights(data.labels("train"), len(names))
        require(
            len(weights) == len(names),
            f"objective.class_weights must be one a class ({', '.join(names)}), got {len(weights)} numbers.",
        )
        shown = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(names, weights, strict=True))
        return dataclasses.replace(self, class_weights=weights), f"class weights: {shown}"


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(model: Any, params: PyTree, tokens_BT: Array, segment_ids_BT: Array) -> Array:
    logits_BC = model.apply({"params": params}, tokens_BT, segment_ids_BT=segment_ids_BT)
    return jax.nn.softmax(logits_BC.astype(jnp.float32), axis=-1)


def balanced_weights(labels: Iterable[int], num_classes: int) -> tuple[float, ...]:
    """`n / (k count[c])` for each class c, from n labels in k occurring classes (King and Zeng 2001; scikit-learn's `balanced`).

    A class without labels has weight 1, which has no effect.

    Example:
        >>> balanced_weights([0, 0, 0, 1], 2)
        (0.6666666666666666, 2.0)
    """
    count_C = np.bincount(np.fromiter(labels, np.int64), minlength=num_classes)
    occurring = np.count_nonzero(count_C)
    return tuple(float(count_C.sum() / (occurring * count)) if count else 1.0 for count in count_C)
