"""A run's directory becomes a model again, to be used or scored."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from transformer.analysis.attention import TextAttention, read_attention
from transformer.analysis.embeddings import text_embeddings
from transformer.config import Config, DataConfig
from transformer.config_io import IMPORT_FILE
from transformer.data.datasets import Dataset, data_of, fingerprints
from transformer.data.source import WHOLE
from transformer.data.tokenizers import Tokenizer
from transformer.data.trust import trusted
from transformer.evaluation.compression import compressed_bits_per_byte
from transformer.evaluation.confusion import class_scores
from transformer.evaluation.scores import sum_statistics
from transformer.generation.likelihood import Scored
from transformer.interop.folder import is_folder
from transformer.memory import check_batch, check_params
from transformer.objective import Objective
from transformer.parallel.mesh import batch_sharding, num_row_shards
from transformer.parts import Parts, resolve
from transformer.runs.base import load_model_params
from transformer.runs.directory import Record, compare_data, read_run
from transformer.runs.given import Given, as_dataset, ask_for
from transformer.runs.pretrained import Dtype, open_folder, placed
from transformer.training import out_of_memory
from transformer.training.metrics import derive
from transformer.training.step import EvaluateStep
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
        if not isinstance(sharding, NamedSharding) or len(rows) % num_row_shards(sharding.mesh) != 0:
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
    return read_run(workdir, lambda record: _load(record, given, mesh, os.fspath(base)), step)


def _load(record: Record, given: Given, mesh: Mesh | None = None, base: str = "") -> Loaded:
    ask_for(record, given)
    tokenizer = given.tokenizer or record.load_tokenizer()
    config = resolve(given.applied(record.config), tokenizer)
    check_params(config)
    parts = Parts(config, tokenizer, module=given.model, class_names=record.class_names, own_batches=True)
    step, params = load_model_params(record, placed(parts, mesh), base)
    return Loaded(parts.model, params, tokenizer, config, step, record.class_names, given.model is not None)


@out_of_memory.explained(what="Evaluating this run")
def evaluate(
    workdir: str | os.PathLike[str],
    *,
    step: int | str = "latest",
    base: str | os.PathLike[str] = "",
    split: str | None = None,
    source: Sequence[str] = (),
    data_dir: str = "",
    keys: Mapping[str, str] | None = None,
    stride: int | None = None,
    limit: int | None = None,
    memory_length: int | None = None,
    model: nn.Module | None = None,
    objective: Objective | None = None,
    tokenizer: Tokenizer | None = None,
    data: Dataset | Mapping[str, Iterable[Any]] | Iterable[Any] | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Scores of a run's model over a split; for a language model next to gzip's and xz's on the same text.

    Args:
        workdir: of the run.
        step: of the checkpoint: `latest`, `best` or a number, as for `load`.
        base: of adapters, as for `load`.
        split: train, validation, test or all (of them); without, validation, or all of a corpus that the run was not trained on.
        source: corpora to score instead of the run's own.
        data_dir: where prepared datasets live; without, the run's if this user has trained with it, else the default.
        keys: `data.text_key` and the others that end in `_key`, instead of the run's, by name.
        stride: `data.stride`, instead of the run's.
        limit: `data.limit`, instead of the run's.
        memory_length: `model.memory_length`, instead of the run's; its positions must be of distances.
        model: that was given to `train`, if one was.
        objective: and the tokenizer, likewise.
        data: batches to score, as `train` takes them, instead of the run's data; all of them, unless a split is named.
        report: called with a line for the user before the split is scored, once nothing is left to refuse.

    Raises:
        UserError: there is no run or split, the run names data that this user has not trained on, or a value means nothing.
    """
    given, base = Given(model, objective, tokenizer=tokenizer), os.fspath(base)
    run, record = read_run(workdir, lambda found: (_load(found, given, base=base), found), step)
    changes = {"stride": stride, "limit": limit, **(keys or {})}
    if data is None:
        named = trusted(run.config.data, str(workdir), source=source, data_dir=data_dir)
        config = _changed(run.config, named, changes, memory_length)
        config, split, opened = _open(record, config, source, split, report)
    else:
        config = _changed(run.config, run.config.data, changes, memory_length)
        split, opened = split or WHOLE, as_dataset(data, config)
    names = list(source or (config.data.source if data is None else ("batches of your own",)))
    require(
        split in (*opened.split_names, WHOLE),
        f"A split to score (--split) must be one of {', '.join(opened.split_names)}, or all, for {', '.join(names)}, got "
        f"{split!r}.",
    )
    which = "all" if split == WHOLE else f"the {split} split"
    begin = functools.partial(report, f"scoring {which} of {', '.join(names)} with {workdir} ...")
    parts = Parts(config, run.tokenizer, module=model, class_names=run.class_names, own_batches=data is not None)
    scores = _scores(parts, run.params, opened, split, begin)
    return {"workdir": str(workdir), "step": run.step, "split": split, "source": names, **scores}


def _open(
    record: Record, config: Config, source: Sequence[str], split: str | None, report: Callable[[str], object]
) -> tuple[Config, str, Dataset]:
    """The data of a run, or the sources that are scored instead; and which split of them, if none is asked for."""
    require(
        bool(source) or IMPORT_FILE not in record.files,
        f"{record.path.parent.parent} is an imported model, whose training data is not there; name what is to be scored with "
        "--data.source.",
    )
    require(
        bool(source) or "data" not in record.given,
        f"{record.path.parent.parent} was trained on batches of its own, which are not in its directory; give evaluate(data=...) "
        "batches in Python, or name what is to be scored with --data.source.",
    )
    if split is None:
        split = "validation"
        if source and not _trained_on(record, config):
            # Only scored: nothing of it need be held out.
            split, whole = WHOLE, dataclasses.replace(config.data, validation_fraction=0.0, test_fraction=0.0)
            config = dataclasses.replace(config, data=whole)
    check_batch(config)
    data = data_of(config, record.class_names)
    if source:
        report(data.description)
    else:
        compare_data(record, data, remedy="Restore it, or name what is to be scored with --data.source.")
    return config, split, data


def _changed(config: Config, data: DataConfig, changes: dict[str, Any], memory_length: int | None) -> Config:
    """The config of a run with other data, and perhaps another memory."""
    model = config.model
    changes = {name: value for name, value in changes.items() if value is not None}
    if memory_length is not None:
        model = dataclasses.replace(model, memory_length=memory_length)
        if memory_length > 0:  # both of training only: evaluation packs in any case, and has no streams
            changes = {**changes, "pack": True, "num_streams": 0}
    return dataclasses.replace(config, model=model, data=dataclasses.replace(data, **changes))


def _scores(parts: Parts, params: PyTree, data: Dataset, split: str, begin: Callable[[], object]) -> dict[str, Any]:
    """The scores of a split, and what they are of; `begin` is called when nothing is left to refuse."""
    config: Config = parts.config
    tokenizer: Any = parts.vocabulary
    batches: Any = data.evaluation_batches(tokenizer, split)
    carry = parts.loss.init_carry(config.data.batch_size)
    checked = map(parts.check_batch, batches)
    begin()
    sums = sum_statistics(jax.jit(EvaluateStep(parts.loss)), params, checked, carry, split=split)
    scores: dict[str, Any] = {
        "scored": data.describe_scored(split, int(sums["weight"])),
        "targets": int(sums["weight"]),
        **{f"cut_{name}": count for name, count in data.count_cut(tokenizer, split)[0].items()},
        **derive(sums),
        **config.objective.generation_scores(parts.model, params, tokenizer, data, split, config),
    }
    # Of batches of one's own, and of ids without a vocabulary, the text is not known.
    if sums.get("bytes", 0) > 0 and hasattr(batches, "texts"):
        others = compressed_bits_per_byte(batches.texts())
        scores |= {"bytes": int(sums["bytes"]), "compressed_bytes": int(others.pop("bytes"))}
        scores |= {f"{name}_bits_per_byte": bits for name, bits in others.items()}
    if "confusion" in sums:
        per_class = dict(zip(parts.class_names, class_scores(sums["confusion"]), strict=True))
        scores |= {"classes": list(parts.class_names), "per_class": per_class}
        scores |= {"confusion": sums["confusion"].astype(int).tolist()}
    return scores


def _trained_on(record: Record, config: Config) -> bool:
    """Whether a config names the corpora of a run, whatever they are called and wherever they lie."""
    found = fingerprints(config.data, config.objective, record.class_names)
    return found == [source.fingerprint for source in record.data]
