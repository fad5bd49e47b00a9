"""A run's directory becomes a model again, to be used or scored."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from transformer.config import Config
from transformer.data.datasets import open_data
from transformer.data.tokenizers import Tokenizer
from transformer.data.trust import trusted
from transformer.evaluation.compression import compressed_bits_per_byte
from transformer.evaluation.confusion import class_scores
from transformer.evaluation.scores import sum_statistics
from transformer.memory import check_batch, check_params
from transformer.ops.ids import check_batch_ids
from transformer.runs.directory import Record, compare_classes, compare_data, read_run
from transformer.tasks import make_model, make_params, resolve, split_metrics
from transformer.training import out_of_memory
from transformer.training.checkpoint import load_step_params
from transformer.training.step import make_eval_step
from transformer.types import PyTree
from transformer.validation import require


class Loaded(NamedTuple):
    """A trained model, as a run's directory holds it."""

    model: Any
    """The linen module: a `Decoder`, `Encoder` or `Classifier`."""
    params: PyTree
    tokenizer: Tokenizer
    config: Config
    step: int


@out_of_memory.explained(what="Loading this run")
def load(workdir: str | os.PathLike[str]) -> Loaded:
    """The model of a run, from the latest undamaged checkpoint (the moving average where there is one).

    Raises:
        UserError: there is no run, or no undamaged checkpoint.

    Example:
        `model, params, tokenizer, config, step = load("runs/python_stdlib")`
    """
    return read_run(workdir, _load)


def _load(record: Record) -> Loaded:
    tokenizer = record.load_tokenizer()
    config = resolve(record.config, tokenizer, record.class_names)
    check_params(config.model)
    model = make_model(config.model)
    shapes = jax.eval_shape(lambda key: make_params(model, key), jax.random.key(0))
    step, params = load_step_params(record.path, shapes)
    return Loaded(model, params, tokenizer, config, step)


@out_of_memory.explained(what="Evaluating this run")
def evaluate(
    workdir: str | os.PathLike[str],
    *,
    split: str = "validation",
    source: Sequence[str] = (),
    data_dir: str = "",
    stride: int | None = None,
    limit: int | None = None,
    memory_length: int | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Scores of a run's model over a split; for a language model next to gzip's and xz's on the same text.

    Args:
        workdir: of the run.
        split: train, validation or test.
        source: corpora to score instead of the run's own.
        data_dir: where prepared datasets live; without, the run's if this user has trained with it, else the default.
        stride: `data.stride`, instead of the run's.
        limit: `data.limit`, instead of the run's.
        memory_length: `model.memory_length`, instead of the run's; its positions must be of distances.
        report: called with a line for the user before the split is scored, once nothing is left to refuse.

    Raises:
        UserError: there is no run, the split is not there, the run names data that this user has not trained on, or a value
            means nothing for this kind of run.
    """
    (model, params, tokenizer, config, step), record = read_run(workdir, lambda found: (_load(found), found))
    changes: dict[str, Any] = {
        name: value for name, value in (("stride", stride), ("limit", limit)) if value is not None
    }
    if memory_length is not None:
        changes["continue_rows"] = memory_length > 0
        if memory_length > 0:  # both of training only: evaluation packs in any case, and has no streams
            changes |= {"pack": True, "num_streams": 0}
        model = make_model(dataclasses.replace(config.model, memory_length=memory_length))
    named = trusted(config.data, str(workdir), source=source, data_dir=data_dir)
    config = dataclasses.replace(config, model=model.config, data=dataclasses.replace(named, **changes))
    check_batch(config)
    data = open_data(config.data, config.objective)
    if source:
        compare_classes(record, data, ", ".join(source))
    else:
        compare_data(record, data, remedy="Restore it, or name what is to be scored with --data.source.")
    require(
        split in data.split_names,
        f"A split to score (--split) must be one of {', '.join(data.split_names)} for {', '.join(config.data.source)}, "
        f"got {split!r}.",
    )
    loss = config.objective.bind(model, tokenizer)
    batches: Any = data.evaluation_batches(tokenizer, split)
    carry = loss.init_carry(config.data.batch_size)
    checked = (check_batch_ids(config.model, batch) for batch in batches)
    report(f"scoring the {split} split with {workdir} ...")
    sums = sum_statistics(jax.jit(make_eval_step(loss)), params, checked, carry, split=split)
    scores: dict[str, Any] = {
        "workdir": str(workdir),
        "step": step,
        "split": split,
        "source": list(source or config.data.source),
        "targets": int(sums["weight"]),
        **{f"cut_{name}": count for name, count in data.count_cut(tokenizer, split)[0].items()},
        **split_metrics(sums),
        **config.objective.generation_scores(model, params, tokenizer, data, split, config),
    }
    if "bytes" in sums:
        others = compressed_bits_per_byte(batches.texts())
        scores |= {"bytes": int(sums["bytes"]), **{f"{name}_bits_per_byte": bits for name, bits in others.items()}}
    if "confusion" in sums:
        per_class = dict(zip(data.class_names, class_scores(sums["confusion"]), strict=True))
        scores |= {"classes": list(data.class_names), "per_class": per_class}
        scores |= {"confusion": sums["confusion"].astype(int).tolist()}
    return scores
