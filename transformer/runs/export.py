"""Export of a run as a folder for Hugging Face's libraries, or of its adapters as a folder for PEFT."""

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from transformer.config import Config
from transformer.config_io import IMPORT_FILE
from transformer.data.tokenizers.to_folder import class_words, generation_texts, tokenizer_texts
from transformer.interop.family import ModelFamily
from transformer.interop.folder import CONFIG
from transformer.interop.writing import expressing_family, planned, write_weights
from transformer.layers.adapters import merge
from transformer.memory import check_params
from transformer.parts import Parts, resolve
from transformer.runs.adapters import write_adapters
from transformer.runs.base import load_model_params
from transformer.runs.directory import FAMILY_FILE, Record, read_run
from transformer.runs.pretrained import KEPT, Dtype, placed, widest_mesh
from transformer.storage import expand, explained, understood
from transformer.validation import require, shown


def export_model(
    workdir: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    step: int | str = "latest",
    dtype: Dtype = "",
    family: str = "",
    base: str | os.PathLike[str] = "",
    adapter: bool = False,
    report: Callable[[str], object] = lambda line: None,
) -> None:
    """Write a run's model as a folder for Hugging Face's libraries and software based on them; adapters are merged.

    Args:
        workdir: the run's directory.
        path: a new folder; it appears when it is complete.
        step: the step of the checkpoint, as for `load`.
        dtype: type of the weights; empty means the type of the imported files, or of the parameters.
        family: the `model_type` to write; empty means the family of the import, or the first that can express the model.
        base: directory of the run that adapters were trained on, if it has moved.
        adapter: write the adapters alone, in PEFT's format.
        report: receives a line for the user.

    Raises:
        UserError: no family can express the model (the message names the fields), or the folder exists.
    """
    folder = pathlib.Path(expand(path))
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"A model is exported to a new folder, {folder} exists; choose another, or remove it.",
    )
    export = functools.partial(
        _export_adapters if adapter else _export, folder=folder, family=family, base=os.fspath(base)
    )
    read_run(workdir, lambda record: export(record, dtype=dtype, report=report), step)


def _export_adapters(
    record: Record, folder: pathlib.Path, dtype: Dtype, family: str, base: str, report: Callable[[str], object]
) -> None:
    run = record.path.parent.parent
    require(record.config.adapter.rank > 0, f"--adapter is for a run with adapters, {run} has none; leave it out.")
    require(not dtype, f"--adapter writes adapters as they are, without --dtype, got --dtype {dtype}.")
    require(jax.process_count() == 1, "Adapters are exported by one process; start one, on one device.")
    tokenizer = record.load_tokenizer()
    config = resolve(record.config, tokenizer)
    parts = Parts(config, tokenizer, class_names=record.class_names, own_batches=True)
    _, params = load_model_params(record, placed(parts, None), base)
    folder.mkdir(parents=True, exist_ok=True)
    with explained(f"{folder}"):
        base = base or config.training.init_from
        write_adapters(folder, family_of(record, config, family), config, params, base, record.class_names)
    report(
        f"{folder}: adapters of rank {config.adapter.rank}; PEFT reads them beside the folder of the base model "
        "(PeftModel.from_pretrained(model, FOLDER))."
    )


def family_of(record: Record, config: Config, family: str = "") -> ModelFamily:
    """The family of a run's model."""
    return _family_and_config(record, config, family)[0]


def _family_and_config(record: Record, config: Config, family: str) -> tuple[ModelFamily, dict[str, Any]]:
    origin = _object(record, FAMILY_FILE)
    known = {"preferred": origin.get("family", ""), "known": origin.get("config")}
    return expressing_family(config.model, config.objective.kind, family, **known)


def _export(
    record: Record, folder: pathlib.Path, dtype: Dtype, family: str, base: str, report: Callable[[str], object]
) -> None:
    require(
        not {"model", "objective"} & set(record.given),
        f"A user-defined model has no family to be exported as, {record.path.parent.parent} was made with "
        f"{record.given.get('model') or record.given.get('objective')}.",
    )
    source, origin = (_object(record, name) for name in (IMPORT_FILE, FAMILY_FILE))
    tokenizer = record.load_tokenizer()
    config = resolve(record.config, tokenizer)
    objective = config.objective.kind
    chosen, values = _family_and_config(record, config, family)
    check_params(config)
    parts = Parts(config, tokenizer, class_names=record.class_names, own_batches=True)
    _, params = load_model_params(record, placed(parts, widest_mesh(parts)), base)
    if config.adapter.rank > 0:
        params = jax.jit(lambda params: merge(params, config.adapter.scale, dtype or None))(params)
    stored = source.get("dtypes", {})

    def written_dtype(name: str, own: Any) -> Any:
        return np.dtype(dtype or (stored if isinstance(stored, str) else stored.get(name, own)))

    same = (origin.get("family"), origin.get("objective")) == (chosen.kind, objective)
    bare = bool(origin.get("bare")) if same else not chosen.has_head(objective)
    tensors = planned(chosen, config.model, objective, params, written_dtype, bare=bare)
    values |= {"torch_dtype": str(next(iter(tensors.values())).dtype), **class_words(record.class_names)}
    values.pop("dtype", None)  # the newer name of torch_dtype
    kept = {name: str(text) for name, text in origin.get("texts", {}).items() if name in KEPT}
    generates = config.objective.continues_text or config.objective.num_stacks > 1
    texts = kept | tokenizer_texts(tokenizer, kept) | (generation_texts(tokenizer, kept) if generates else {})
    aside = folder.with_name(f"{folder.name}.tmp")
    with explained(f"{folder}"):
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        write_weights(aside, tensors)
        if jax.process_index() == 0:
            (aside / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
            for name, text in texts.items():
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_text(text)
            if folder.exists():
                folder.rmdir()
            aside.rename(folder)
        multihost_utils.sync_global_devices("exported")
    without = "" if "tokenizer.json" in texts or "tokenizer.model" in texts else "; without a tokenizer"
    report(f"{folder}: {chosen.kind}, {len(tensors)} tensors; transformers reads it{without}.")


def _object(record: Record, name: str) -> dict[str, Any]:
    """The object in a file of the record; empty without that file."""
    if name not in record.files:
        return {}
    with understood(f"{record.path}: {name}"):
        values = json.loads(record.files[name])
        require(isinstance(values, dict), f"{record.path}: {name} must be an object, got {shown(values)}.")
        return values
