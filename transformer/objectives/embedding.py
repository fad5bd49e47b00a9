"""Sentence embeddings: one vector per text, from an imported encoder."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import numpy as np

from transformer.config import DataConfig
from transformer.data.forms.labelled import text_tokens
from transformer.models.embedder import Embedder
from transformer.objective import OBJECTIVES, Objective
from transformer.objectives.bases import read_whole, refuse_target, rows_of_texts
from transformer.tokenizer import encoder_ids
from transformer.trained import Trained
from transformer.types import Array, PyTree, Reading, UserError
from transformer.validation import require

if TYPE_CHECKING:
    from transformer.data.datasets import Dataset
    from transformer.data.tokenizers import Tokenizer, Vocabulary
    from transformer.model_config import ModelConfig
    from transformer.model_kinds import Pooling


@OBJECTIVES.register
@dataclasses.dataclass(frozen=True)
class Embedding(Objective):
    """No loss: an imported encoder gives one vector per text. Other objectives start from it."""

    kind = "embedding"
    reads = "labelled"
    model_class = Embedder
    instead = "`transformer embed` computes its vectors"
    settings = ("model.pooling", "model.token_types", "model.pooler")

    normalize: bool = True
    """Scale each vector to length one."""

    def fit(self, data: "Dataset") -> NoReturn:
        """Raise UserError: it cannot be trained."""
        del data
        raise UserError(
            "A model for embeddings is used, not trained; set another objective for the new run, such as "
            "--objective.kind classification, which starts from it."
        )

    def extra_tokens(self, vocabulary: "Vocabulary", length: int) -> int:
        """None: no token is masked."""
        return 0

    def model_settings(self, vocabulary: "Vocabulary | None", class_names: tuple[str, ...]) -> Mapping[str, Any]:
        """Whether vectors have length one."""
        return {"normalize": self.normalize}

    def encode(self, text: str, tokenizer: "Tokenizer", data: DataConfig) -> Array:
        """As much of the text as fits in a row, between its special ids."""
        return text_tokens(tokenizer, text, data)

    def pooling_of(self, config: "ModelConfig") -> "Pooling":
        """The model's own."""
        return config.pooling

    def predict(
        self, run: Trained, texts: Sequence[str], names: Sequence[str], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """`embedding`, a list of numbers."""
        for name, vector_D in zip(names, rows_of_texts(self, run, texts, batch_size, _embed), strict=True):
            require(
                bool(np.isfinite(vector_D).all()), f"An embedding must be numbers, the embedding of {name} has NaN."
            )
            yield {"embedding": vector_D.tolist()}

    def reading(self, run: Trained, text: str, target: str | None = None) -> Reading:
        """The text, uncut."""
        refuse_target(self, target)
        ids_T = read_whole(encoder_ids(run.tokenizer, text), run.config.data.sequence_length)
        return Reading({"encoder": ids_T}, (ids_T[None],))


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: Any, params: PyTree, tokens_BT: Array, segment_ids_BT: Array) -> Array:
    return model.apply({"params": params}, tokens_BT, segment_ids_BT=segment_ids_BT)
