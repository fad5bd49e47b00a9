"""Scores of a run's model over a whole split."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from etils import epath

from transformer.config import Config, DataConfig
from transformer.config_io import IMPORT_FILE
from transformer.data.datasets import Dataset, data_of, fingerprints
from transformer.data.source import WHOLE
from transformer.data.tokenizers import Tokenizer
from transformer.data.trust import trusted
from transformer.evaluation.calibration import calibration_bins, expected_calibration_error
from transformer.evaluation.compression import compressed_bits_per_byte
from transformer.evaluation.confusion import average_scores, class_scores
from transformer.evaluation.scores import sum_statistics
from transformer.memory import check_batch
from transformer.model_config import Weights
from transformer.objective import Objective
from transformer.parts import Parts
from transformer.runs.directory import SCORES_FILE, Record, compare_data, read_run
from transformer.runs.given import Given, as_dataset
from transformer.runs.saved import load_record
from transformer.storage import expand, explained
from transformer.training import out_of_memory
from transformer.training.metrics import derive
from transformer.training.step import EvaluateStep
from transformer.types import PyTree
from transformer.validation import require


@out_of_memory.explained(what="Evaluating this run")
def evaluate(
    workdir: str | os.PathLike[str],
    *,
    step: int | str = "latest",
    base: str | os.PathLike[str] = "",
    weights: Weights = "",
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
    """Scores of a run's model over a split; for a language model, next to the scores of gzip and xz on the same text.

    Args:
        workdir: the run's directory.
        step: the step of the checkpoint: `latest`, `best` or a number, as for `load`.
        base: the base of adapters, as for `load`.
        weights: type of the model's matrices, as for `load`.
        split: train, validation, test or all of them. The default is validation, or all of a corpus other than the run's.
        source: corpora to score instead of the run's own.
        data_dir: directory of prepared datasets; the default is the run's if this user has trained with it, else the global one.
        keys: `data.text_key` and the other `_key` fields, by name, instead of the run's.
        stride: `data.stride`, instead of the run's.
        limit: `data.limit`, instead of the run's.
        memory_length: `model.memory_length`, instead of the run's; requires relative positions.
        model: the model passed to `train`, if any.
        objective: the objective passed to `train`, if any; likewise the tokenizer.
        data: batches to score, as for `train`, instead of the run's data; all of them, unless a split is given.
        report: receives a line for the user before scoring starts, after all checks.

    Raises:
        UserError: there is no run or split, the run names data that this user has not trained on, or a value does not apply.
    """
    given, base = Given(model, objective, tokenizer=tokenizer), os.fspath(base)
    run, record = read_run(workdir, lambda found: (load_record(found, given, base=base, weights=weights), found), step)
    changes = {"stride": stride, "limit": limit, **(keys or {})}
    if data is None:
        named = trusted(run.config.data, str(workdir), source=source, data_dir=data_dir)
        config = _changed(run.config, named, changes, memory_length)
        config, split, opened = _open(record, config, source, split, report)
    else:
        config = _changed(run.config, run.config.data, changes, memory_length)
        split, opened = split or WHOLE, as_dataset(data, config)
    names = list(source or _scored(config.data, split)) if data is None else ["batches of your own"]
    _require_split(split, opened, names)
    which = "all" if split == WHOLE else f"the {split} split"
    begin = functools.partial(report, f"scoring {which} of {', '.join(names)} with {workdir} ...")
    parts = Parts(config, run.tokenizer, module=model, class_names=run.class_names, own_batches=data is not None)
    scores = _scores(parts, run.params, opened, split, begin)
    light = {"weights": weights} if weights else {}
    return {"workdir": str(workdir), "step": run.step, **light, "split": split, "source": names, **scores}


def _scored(config: DataConfig, split: str) -> Sequence[str]:
    """The names of the data in a split."""
    if split == WHOLE:
        return config.source + config.validation
    return config.validation if config.validation and split == "validation" else config.source


def _require_split(split: str, opened: Dataset, names: Sequence[str]) -> None:
    require(
        split in (*opened.split_names, WHOLE),
        f"A split to score (--split) must be one of {', '.join(opened.split_names)}, or all, for {', '.join(names)}, got "
        f"{split!r}.",
    )


def keep_scores(workdir: str | os.PathLike[str], scores: Mapping[str, Any]) -> None:
    """Append the result of `evaluate` to the run's directory, where a report finds it.

    Raises:
        WriteError: the file cannot be written.
    """
    path = epath.Path(expand(workdir)) / SCORES_FILE
    with explained(f"{path}"), path.open("a") as file:
        file.write(json.dumps(scores) + "\n")


def _open(
    record: Record, config: Config, source: Sequence[str], split: str | None, report: Callable[[str], object]
) -> tuple[Config, str, Dataset]:
    """The data of a run, or the sources scored instead; and the default split."""
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
            # Data that is only scored needs no held-out part.
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
    """The run's config with other data, and perhaps another length of the Transformer-XL memory."""
    model = config.model
    changes = {name: value for name, value in changes.items() if value is not None}
    if memory_length is not None:
        model = dataclasses.replace(model, memory_length=memory_length)
        if memory_length > 0:  # both apply to training only: evaluation always packs, and has no streams
            changes = {**changes, "pack": True, "num_streams": 0}
    return dataclasses.replace(config, model=model, data=dataclasses.replace(data, **changes))


def _scores(parts: Parts, params: PyTree, data: Dataset, split: str, begin: Callable[[], object]) -> dict[str, Any]:
    """The scores of a split, with a description of the scored data; `begin` is called after all checks."""
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
    # The text of user-supplied batches, and of ids without a vocabulary, is unknown.
    if sums.get("bytes", 0) > 0 and hasattr(batches, "texts"):
        others = compressed_bits_per_byte(batches.texts())
        scores |= {"bytes": int(sums["bytes"]), "compressed_bytes": int(others.pop("bytes"))}
        scores |= {f"{name}_bits_per_byte": bits for name, bits in others.items()}
    if "confusion" in sums:
        per_class = dict(zip(parts.class_names, class_scores(sums["confusion"]), strict=True))
        scores |= {"classes": list(parts.class_names), "per_class": per_class}
        scores |= {"averages": average_scores(sums["confusion"])}
        scores |= {"confusion": sums["confusion"].astype(int).tolist()}
    if "calibration" in sums:
        scores |= {"expected_calibration_error": expected_calibration_error(sums["calibration"])}
        scores |= {"calibration": calibration_bins(sums["calibration"])}
    return scores


def _trained_on(record: Record, config: Config) -> bool:
    """Whether a config names the corpora of a run, regardless of names and paths."""
    found = fingerprints(config.data, config.objective, record.class_names)
    return found == [source.fingerprint for source in record.data]
