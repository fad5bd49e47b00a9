"""Loads the model of a run's directory for use."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

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
from transformer.generation.sampling import SamplingConfig
from transformer.interop.folder import is_folder
from transformer.memory import check_params
from transformer.model_config import Weights
from transformer.models.light import light_params
from transformer.objective import Objective
from transformer.parallel.mesh import batch_sharding, num_row_shards
from transformer.parts import Parts, initialize, resolve
from transformer.runs.base import load_model_params
from transformer.runs.directory import Record, read_run
from transformer.runs.given import Given, ask_for
from transformer.runs.pretrained import Dtype, open_folder, placed
from transformer.training import out_of_memory
from transformer.types import Array, PyTree, Reading
from transformer.validation import require


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model from a run's directory. It can be unpacked as `model, params, tokenizer, config, step`."""

    model: Any
    """The linen module: a `Decoder`, `Encoder` or `Classifier`."""
    params: PyTree
    tokenizer: Tokenizer
    config: Config
    step: int
    class_names: tuple[str, ...] = ()
    """The classes of a classifier, in the order of its logits."""
    own_model: bool = False
    """Whether the model was passed to `train`."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.params, self.tokenizer, self.config, self.step))

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text for the model, int32 [n], including the token that starts or ends a text; a long text is cut."""
        return self.config.objective.encode(text, self.tokenizer, self.config.data)

    def predict(self, texts: Sequence[str], *, batch_size: int = 0, **options: Any) -> list[dict[str, Any]]:
        """The model's prediction for each text, in order: its class, translation or continuation, in named columns.

        Args:
            texts: any number of texts, none of them blank.
            batch_size: number of texts per batch, grouped by similar length; 0 means as in training.
            options: options of the run's objective: `top_k` of a classifier, `max_new_tokens` of the others.

        Raises:
            UserError: a text is blank or too long, the run cannot predict, or an option does not apply.

        Example:
            `load("runs/reviews").predict(["a fine film"], top_k=2)`
        """
        return list(self.predictions(texts, batch_size=batch_size, **options))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 0,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        seed: int = 0,
        batch_size: int = 0,
        note: Callable[[str], None] = lambda text: None,
        **options: Any,
    ) -> list[list[str]]:
        """Continue or translate each prompt; the result has a list of texts for each.

        Args:
            prompts: any number of prompts; an empty one starts a new document.
            max_new_tokens: most new tokens; 0 means up to the model's length. Beyond that length, a language model reads only
                the latest tokens.
            sampling: how tokens are drawn.
            seed: seed of the random draws. They depend on the index of the prompt and the index of the sample, not on the number
                of samples.
            batch_size: rows of a batch; 0 means as in training.
            note: is called with messages for the user, such as about tokens that are not read.
            options: options of the run's objective. Language models have `num_samples`, `stop` (a continuation ends before
                these texts) and `generator` (from `objective.make_generator(run)`, which keeps prepared parameters between
                calls). Language models and translators have `beams` (a `BeamConfig`).

        Raises:
            UserError: a prompt does not fit, or the run generates nothing.

        Example:
            `load("runs/python_stdlib").generate(["def "], max_new_tokens=50, num_samples=3, stop=["\\n\\n"])`
        """
        self._require_ours("Generated texts")
        size = batch_size or self.config.data.batch_size
        found = self.config.objective.generate_all(self, prompts, size, max_new_tokens, sampling, seed, note, **options)
        return [list(said.texts) for said in found]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 0,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        seed: int = 0,
        note: Callable[[str], None] = lambda text: None,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the prompt as the model reads it and its continuation, or a translation, in pieces; see `generate`."""
        self._require_ours("Generated texts")
        return self.config.objective.generate(self, prompt, max_new_tokens, sampling, seed, note, **options)

    def place(self, rows: np.ndarray) -> Array:
        """Rows of a batch, distributed over the devices of the parameters; unchanged if the devices do not divide them."""
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
        """The log-probability of each text, token by token, in order.

        A language model predicts each token from the tokens before it. A translator also uses the source, which is the prompt,
        and scores the end of the text too. A masked model predicts each token from all others (Salazar et al. 2020).

        Args:
            texts: texts, none of them empty.
            prompts: context before each text, or one context before all of them; not scored.
            batch_size: rows per batch; 0 means as in training.
            stride: a text longer than the model's maximum is scored in windows, each shifted by `stride` tokens; 0 means half
                of the model's length.

        Raises:
            UserError: a text is empty, or the run assigns no probabilities to texts.

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
        """`score` of `(prompt, text)` pairs from an iterator; `names` are for messages."""
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
        """A vector for each text, pooled from the hidden states of a layer, float32.

        Args:
            texts: texts, none of them blank. Tokens beyond the model's maximum are cut.
            pooling: mean, first, last, max, or attention if the run has learned it. Empty means the model's own pooling, or the
                mean for a model without one. Special ids around a text are pooled too.
            layer: from 1 to the number of layers; 0 means the last one, whose hidden states follow the final norm. For a
                translator, a layer of its encoder.
            normalize: scale each vector to length one; a sentence encoder with `objective.normalize` always does.
            batch_size: texts per batch; 0 means as in training.

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
        """`embed` of texts from an iterator, each vector with the number of tokens that were cut."""
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
        """`predict` of texts from an iterator; `names` are for messages."""
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
        """The same object with parameters moved to the device once, not for each batch."""
        return dataclasses.replace(self, params=jax.tree.map(jnp.asarray, self.params))

    def _require_ours(self, what: str) -> None:
        require(
            not self.own_model,
            f"{what} are of the package's models, this run has a user-defined {type(self.model).__name__}; call "
            "run.model.apply({'params': run.params}, ...).",
        )

    def reading(self, text: str, *, target: str | None = None) -> Reading:
        """The model's input for a text, to inspect its attention.

        Args:
            text: not blank, and no longer than the model's maximum.
            target: for a translator, the translation for its decoder (None: its own); for a prefix language model, the text
                after the prefix.

        Raises:
            UserError: the text does not fit, the run's objective takes no target, or the model is user-defined.
        """
        require(
            not self.own_model,
            f"Attention belongs to the package's models, this run has a user-defined {type(self.model).__name__}; call "
            "run.model.apply({'params': run.params}, ...).",
        )
        require(text.strip() != "", f"A text to look at must not be blank, got {text!r}.")
        return self.config.objective.reading(self, text, target)

    def attention(self, text: str, *, target: str | None = None) -> TextAttention:
        """Attention weights of every layer and head for a text, and the model's logits.

        Args:
            text: as for `reading`.
            target: as for `reading`.

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
    weights: Weights = "",
) -> Loaded:
    """The model of a run, from one of its checkpoints (the moving average if there is one), or of a pretrained folder.

    Args:
        workdir: the run's directory, or a Hugging Face folder, which is opened as by `transformer import`.
        step: `latest` (the latest undamaged one), `best` (the one with the lowest validation loss), or the number of a step.
        model: the model passed to `train`, if any. A directory never makes this process import code.
        objective: the objective passed to `train`, if any.
        tokenizer: the tokenizer passed to `train`, if any.
        mesh: the mesh over which parameters are sharded by the rules of training; None uses the first device.
        dtype: type of a folder's parameters and activations; empty means the stored type. A run has its own.
        base: directory of the run that adapters were trained on, if it has moved.
        weights: type of the model's matrices in memory, `int8` or `bfloat16` (`models.light`); empty means the stored type.

    Raises:
        UserError: there is no run, no such checkpoint, or no undamaged one; the run was made with other objects; or the folder's
            model is not supported.

    Example:
        `model, params, tokenizer, config, step = load("runs/python_stdlib", step="best")`
    """
    given = Given(model, objective, tokenizer=tokenizer)
    require(weights in get_args(Weights), f"weights must be int8, bfloat16 or empty, got {weights!r}.")
    if is_folder(workdir):
        require(
            given == Given() and step == "latest" and not base,
            f"A pretrained folder has no steps, no base and no user-defined objects: {workdir}.",
        )
        opened = open_folder(workdir, dtype=dtype)
        config = opened.config
        loaded = Loaded(opened.parts.model, opened.params(mesh), opened.tokenizer, config, 0, opened.class_names)
        return _lightened(loaded, weights)
    require(dtype == "", f"dtype= is for pretrained folders, a run has its own: {workdir}; import it with another.")
    return read_run(workdir, lambda record: load_record(record, given, mesh, os.fspath(base), weights), step)


def load_record(
    record: Record, given: Given, mesh: Mesh | None = None, base: str = "", weights: Weights = ""
) -> Loaded:
    """The model of a run, given its record."""
    ask_for(record, given)
    tokenizer = given.tokenizer or record.load_tokenizer()
    config = resolve(given.applied(record.config), tokenizer)
    check_params(config)
    parts = Parts(config, tokenizer, module=given.model, class_names=record.class_names, own_batches=True)
    step, params = load_model_params(record, placed(parts, mesh), base)
    loaded = Loaded(parts.model, params, tokenizer, config, step, record.class_names, given.model is not None)
    return _lightened(loaded, weights)


def _lightened(loaded: Loaded, weights: Weights) -> Loaded:
    """The same model with lighter matrices."""
    if weights == "":
        return loaded
    require(
        not loaded.own_model,
        f"weights={weights!r} is for the package's models, this run has a user-defined {type(loaded.model).__name__}; leave "
        "it out.",
    )
    objective = loaded.config.objective
    params = light_params(loaded.params, lambda: initialize(objective, loaded.model, None), weights)
    return dataclasses.replace(loaded, params=params)
