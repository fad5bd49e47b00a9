"""A run's directory becomes a model again, to be used."""

import dataclasses
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from transformer.analysis.attention import TextAttention, read_attention
from transformer.config import Config
from transformer.data.tokenizers import Tokenizer
from transformer.generation.embeddings import text_embeddings
from transformer.generation.likelihood import Scored
from transformer.interop.folder import is_folder
from transformer.memory import check_params
from transformer.objective import Objective
from transformer.parallel.mesh import batch_sharding, num_row_shards
from transformer.parts import Parts, resolve
from transformer.runs.base import load_model_params
from transformer.runs.directory import Record, read_run
from transformer.runs.given import Given, ask_for
from transformer.runs.pretrained import Dtype, open_folder, placed
from transformer.training import out_of_memory
from transformer.types import PyTree, Reading
from transformer.validation import require


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model, as a run's directory holds it. It can be taken apart as `model, params, tokenizer, config, step`."""

    model: Any
    """The linen module: a `Decoder`, `Encoder` or `Classifier`."""
    params: PyTree
    tokenizer: Tokenizer
    config: Config
    step: int
    class_names: tuple[str, ...] = ()
    """Of a classifier, in the order of its logits."""
    own_model: bool = False
    """It is a module that was given to `train`."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.params, self.tokenizer, self.config, self.step))

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text as the model reads it, int32 [n]: cut where it is too long, with the token that starts or ends a text."""
        return self.config.objective.encode(text, self.tokenizer, self.config.data)

    def predict(self, texts: Sequence[str], *, batch_size: int = 0, **options: Any) -> list[dict[str, Any]]:
        """What the model says to each text, in order: its class, translation or continuation, in columns by name.

        Args:
            texts: of any number; none is blank.
            batch_size: texts that are read together, those of similar length; 0 means as in training.
            options: of the run's objective: `top_k` of a classifier, `max_new_tokens` of the others.

        Raises:
            UserError: a text is blank or too long, the run predicts nothing, or an option means nothing for it.

        Example:
            `load("runs/reviews").predict(["a fine film"], top_k=2)`
        """
        return list(self.predictions(texts, batch_size=batch_size, **options))

    def place(self, rows: np.ndarray) -> Any:
        """Rows of a batch, spread over the devices that the parameters are on; as they are where these do not divide them."""
        sharding = getattr(jax.tree.leaves(self.params)[0], "sharding", None)
        if (
            not isinstance(sharding, NamedSharding)
            or not isinstance(sharding.mesh, Mesh)
            or len(rows) % num_row_shards(sharding.mesh) != 0
        ):
            return rows
        return jax.device_put(rows, batch_sharding(sharding.mesh))

    def score(
        self, texts: Sequence[str], *, prompts: Sequence[str] | str = "", batch_size: int = 0, stride: int = 0
    ) -> list[Scored]:
        """How likely the model finds each text, token by token, in order.

        A language model gives each token given those before it; a translator given its source too, which is the prompt, and with
        the end of the text; a masked model given all other tokens (Salazar et al. 2020).

        Args:
            texts: none of them empty.
            prompts: what stands before each text, or before all of them, and is not scored.
            batch_size: rows that are computed together; 0 means as in training.
            stride: a text longer than the model reads is scored in windows, each so many tokens further than the one before; 0
                means half of the model's length.

        Raises:
            UserError: a text is empty, or the run gives no probabilities of texts.

        Example:
            `load("runs/python_stdlib").score(["def main():"])[0].bits_per_byte`
        """
        prompts = [prompts] * len(texts) if isinstance(prompts, str) else prompts
        require(
            len(prompts) == len(texts), f"There must be a prompt for each of {len(texts)} texts, got {len(prompts)}."
        )
        pairs = list(zip(prompts, texts, strict=True))
        return list(self.scores(pairs, batch_size=batch_size, stride=stride))

    def scores(
        self, texts: Sequence[tuple[str, str]], *, names: Sequence[str] = (), batch_size: int = 0, stride: int = 0
    ) -> Iterator[Scored]:
        """`score` of `(prompt, text)`, some texts after the others; `names` is what they are called in messages."""
        self._require_ours("Scores of texts")
        limit = self.config.model.max_length
        require(batch_size >= 0, f"batch_size must be at least 0, got {batch_size}.")
        require(0 <= stride <= limit, f"stride must be from 0 to the model's {limit} tokens, got {stride}.")
        names = names or [f"text {number}" for number in range(1, len(texts) + 1)]
        for (_, text), name in zip(texts, names, strict=True):
            require(text != "", f"A text to score must not be empty, {name} is; remove it.")
        size = batch_size or self.config.data.batch_size
        found = self.config.objective.score(self._on_device(), texts, names, size, stride or max(1, limit // 2))
        for (_, text), name, (tokens, scores) in zip(texts, names, found, strict=True):
            require(
                not bool(np.isnan(scores).any()),
                f"A log-probability must be a number, {name} has NaN: the parameters are not finite, or overflow in half "
                "precision.",
            )
            yield Scored(text, tokens, scores)

    def embed(
        self,
        texts: Sequence[str],
        *,
        pooling: str = "",
        layer: int = 0,
        normalize: bool = False,
        batch_size: int = 0,
    ) -> Float[np.ndarray, "N D"]:
        """A vector of each text, pooled from the hidden states of a layer, float32.

        Args:
            texts: none of them blank. What is longer than the model reads is cut.
            pooling: mean, first, last, max, or attention where the run has learned it; empty means the model's own, of models
                without one the mean. Ids that stand around a text are pooled too.
            layer: from 1 to the number of layers; 0 means the last, whose hidden states are those behind the final norm. Of a
                translator, of its encoder.
            normalize: scale each vector to the length one, as a sentence encoder with `objective.normalize` always does.
            batch_size: texts that are computed together; 0 means as in training.

        Raises:
            UserError: a text is blank, or there is no such pooling or layer.

        Example:
            `load("all-MiniLM-L6-v2").embed(["a fine film", "a good movie"])`
        """
        found = self.embeddings(texts, pooling=pooling, layer=layer, normalize=normalize, batch_size=batch_size)
        return (
            np.stack([vector_D for vector_D, _ in found])
            if texts
            else np.zeros((0, self.config.model.embed_dim), np.float32)
        )

    def embeddings(
        self, texts: Sequence[str], *, names: Sequence[str] = (), batch_size: int = 0, **options: Any
    ) -> Iterator[tuple[np.ndarray, int]]:
        """`embed`, some texts after the others, each with the number of its tokens that were cut."""
        self._require_ours("Embeddings")
        require(batch_size >= 0, f"batch_size must be at least 0, got {batch_size}.")
        names = names or [f"text {number}" for number in range(1, len(texts) + 1)]
        for text, name in zip(texts, names, strict=True):
            require(text.strip() != "", f"A text to embed must not be blank, {name} is; remove it.")
        options["normalize"] |= getattr(self.config.objective, "normalize", False)
        size = batch_size or self.config.data.batch_size
        return text_embeddings(self._on_device(), texts, names, batch_size=size, **options)

    def predictions(
        self, texts: Sequence[str], *, names: Sequence[str] = (), batch_size: int = 0, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """`predict`, some texts after the others; `names` is what they are called in messages."""
        objective = self.config.objective
        self._require_ours("Predictions")
        known = list(inspect.signature(objective.predict).parameters)[4:]
        for name in options:
            require(
                name in known,
                f"{name} means nothing for a run of {objective.kind}, which takes {', '.join(known) or 'none'}; leave it out.",
            )
        require(batch_size >= 0, f"batch_size must be at least 0, got {batch_size}.")
        names = names or [f"text {number}" for number in range(1, len(texts) + 1)]
        for text, name in zip(texts, names, strict=True):
            require(text.strip() != "", f"A text to predict from must not be blank, {name} is; remove it.")
        return objective.predict(self._on_device(), texts, names, batch_size or self.config.data.batch_size, **options)

    def _on_device(self) -> "Loaded":
        """Itself with parameters that are moved to the device once, not for each batch."""
        return dataclasses.replace(self, params=jax.tree.map(jnp.asarray, self.params))

    def _require_ours(self, what: str) -> None:
        require(
            not self.own_model,
            f"{what} are of the package's models, this run has a {type(self.model).__name__} of one's own; call "
            "run.model.apply({'params': run.params}, ...).",
        )

    def reading(self, text: str, *, target: str | None = None) -> Reading:
        """How the model reads a text, for a look at its attention.

        Args:
            text: not blank, and no longer than the model reads.
            target: of a translator, the translation that its decoder reads, None meaning its own; of a prefix language model,
                what follows the text.

        Raises:
            UserError: the text does not fit, a target means nothing for the run's objective, or the model is one's own.
        """
        require(
            not self.own_model,
            f"Attention is that of the package's models, this run has a {type(self.model).__name__} of one's own; call "
            "run.model.apply({'params': run.params}, ...).",
        )
        require(text.strip() != "", f"A text to look at must not be blank, got {text!r}.")
        return self.config.objective.reading(self, text, target)

    def attention(self, text: str, *, target: str | None = None) -> TextAttention:
        """Attention weights of every layer and head while the model reads a text, and its logits.

        Args:
            text: as for `reading`.
            target: likewise.

        Raises:
            UserError: as `reading`; or there are too many weights.

        Example:
            `load("runs/python_stdlib").attention("def main():").maps[0].weights[0].shape`
        """
        return read_attention(self.model, self.params, self.reading(text, target=target))


@out_of_memory.explained(what="Loading this run")
def load(
    workdir: str | os.PathLike[str],
    *,
    step: int | str = "latest",
    model: nn.Module | None = None,
    objective: Objective | None = None,
    tokenizer: Tokenizer | None = None,
    mesh: Mesh | None = None,
    dtype: Dtype = "",
    base: str | os.PathLike[str] = "",
) -> Loaded:
    """The model of a run, from one of its checkpoints (the moving average where there is one), or of a pretrained folder.

    Args:
        workdir: of the run, or a Hugging Face folder, which is opened as `transformer import` would.
        step: `latest` (the latest undamaged one), `best` (the one with the lowest validation loss), or the number of a step.
        model: that was given to `train`, if one was; and so the others. No directory makes this process import anything.
        objective: likewise.
        tokenizer: likewise.
        mesh: of the devices that parameters are spread over, as the rules of training have them; None takes the first device.
        dtype: of a folder's parameters and activations; empty is as they are stored. A run has its own.
        base: directory of the run that adapters were trained on, if it lies elsewhere now.

    Raises:
        UserError: there is no run, no such checkpoint, or no undamaged one; or it was made with other objects. Or a folder is not
            one that our models can be.

    Example:
        `model, params, tokenizer, config, step = load("runs/python_stdlib", step="best")`
    """
    given = Given(model, objective, tokenizer=tokenizer)
    if is_folder(workdir):
        require(
            given == Given() and step == "latest" and not base,
            f"A pretrained folder has no steps, no base and no objects of one's own: {workdir}.",
        )
        opened = open_folder(workdir, dtype=dtype)
        config = opened.config
        return Loaded(opened.parts.model, opened.params(mesh), opened.tokenizer, config, 0, opened.class_names)
    require(dtype == "", f"dtype= is for pretrained folders, a run has its own: {workdir}; import it with another.")
    return read_run(workdir, lambda record: load_record(record, given, mesh, os.fspath(base)), step)


def load_record(record: Record, given: Given, mesh: Mesh | None = None, base: str = "") -> Loaded:
    """The model of a run whose record was read."""
    ask_for(record, given)
    tokenizer = given.tokenizer or record.load_tokenizer()
    config = resolve(given.applied(record.config), tokenizer)
    check_params(config)
    parts = Parts(config, tokenizer, module=given.model, class_names=record.class_names, own_batches=True)
    step, params = load_model_params(record, placed(parts, mesh), base)
    return Loaded(parts.model, params, tokenizer, config, step, record.class_names, given.model is not None)
