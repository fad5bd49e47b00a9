"""Import of a Hugging Face folder as a run directory, or its direct use as a model."""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.config_io import CONFIG_FILE, IMPORT_FILE, to_dict
from transformer.data.batches import ids_alone
from transformer.data.tokenizers import Tokenizer
from transformer.data.tokenizers.folder import from_folder
from transformer.interop.folder import CONFIG, Folder, read_small
from transformer.interop.reading import Weights, open_weights
from transformer.interop.writing import dtype_name
from transformer.memory import check_model, check_params, num_parameters
from transformer.objective import OBJECTIVES
from transformer.optimizers.adamw import AdamW
from transformer.parallel.mesh import make_mesh
from transformer.parallel.rules import parameter_shardings
from transformer.parts import Parts, resolve
from transformer.runs.directory import (
    CHECKPOINTS,
    CLASSES_FILE,
    DATA_FILE,
    FAMILY_FILE,
    GIVEN_FILE,
    open_new_workdir,
    stored_record,
    write_copies,
)
from transformer.runs.lock import locked
from transformer.storage import expand
from transformer.training.checkpoint import Checkpointer
from transformer.training.state import TrainState
from transformer.types import PyTree, UserError
from transformer.validation import counted, require

Dtype = Literal["", "float32", "bfloat16", "float16"]
_LONGEST_ROW = 1024
KEPT = (
    *("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"),
    *("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
)
"""Small files of a folder that an export writes unchanged, including the files of sentence encoders."""
_NO_TOKENIZER = "the folder, which has no tokenizer"


class Opened(NamedTuple):
    """A pretrained folder as the parts of a run; its weights are not read yet."""

    config: Config
    """The resolved config."""
    tokenizer: Tokenizer
    tokenizer_files: dict[str, bytes]
    class_names: tuple[str, ...]
    parts: Parts
    weights: Weights
    given: dict[str, str]

    def params(self, mesh: Mesh | None) -> PyTree:
        """The parameters on the devices of a mesh, sharded by the rules of training; None uses the first device."""
        return self.weights.read(placed(self.parts, mesh))


def placed(parts: Parts, mesh: Mesh | None) -> PyTree:
    """The shapes of parameters with the shardings of a mesh."""
    if mesh is None:
        return parts.shapes
    shardings = parameter_shardings(mesh, parts.axes, parts.shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), parts.shapes, shardings)


def open_folder(path: str | os.PathLike[str], *, dtype: Dtype = "") -> Opened:
    """The model of a Hugging Face folder, checked by `read_folder`, and by whether this machine can hold its parameters.

    Args:
        path: the folder.
        dtype: type of parameters and activations; empty means the stored type.

    Raises:
        UserError: the folder is not supported, or too large.
    """
    opened = read_folder(path, dtype=dtype)
    check_params(opened.config)
    return opened


def read_folder(path: str | os.PathLike[str], *, dtype: Dtype = "") -> Opened:
    """The model of a Hugging Face folder, checked: every tensor is a parameter, and every key of its config is understood.

    A model of any size can be inspected. Of the weights, only a tensor stored next to its tied counterpart is read.

    Args:
        path: the folder.
        dtype: type of parameters and activations; empty means the stored type.

    Raises:
        UserError: the folder is not supported.
    """
    folder = Folder(path)
    found = folder.pretrained
    settings, files = _tokenizer_of(folder.path)
    longest = found.longest_text or found.model.max_length or 512
    data = DataConfig(sequence_length=min(longest, _LONGEST_ROW), batch_size=8)
    given = {} if settings else {"data": _NO_TOKENIZER}
    if settings:
        data = dataclasses.replace(data, tokenizer=settings)
    objective = OBJECTIVES.find(found.objective)(**found.settings)
    # The defaults of a run that starts from this model.
    optimizer = AdamW(learning_rate=2e-5, weight_decay=0.01)
    training = TrainingConfig(sample_length=0)
    config = Config(model=found.model, data=data, objective=objective, optimizer=optimizer, training=training)
    _check_claim(folder, config)
    tokenizer = _opened_tokenizer(settings, files) if settings else ids_alone(config)
    weights = open_weights(folder, config.model, Parts(config, tokenizer, class_names=found.class_names).shapes)
    name: Any = dtype or dtype_name(weights.dtype)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=name, param_dtype=name))
    config = resolve(config, tokenizer)
    parts = Parts(config, tokenizer, class_names=found.class_names, own_batches=True)
    return Opened(config, tokenizer, files, found.class_names, parts, weights, given)


def _check_claim(folder: Folder, config: Config) -> None:
    """Refuse a config.json that describes far more parameters than the files hold, before anything is traced.

    Raises:
        UserError: the files hold less than one byte per parameter.
    """
    stacks = config.objective.num_stacks
    check_model(config.model, stacks)
    count = num_parameters(config.model, stacks)
    held = sum(tensor.end - tensor.start for tensor in folder.tensors.values())
    require(
        count <= held,
        f"{folder.path} must hold the model that its {CONFIG} describes, which has {count:,} parameters or more, but its tensors "
        f"have {held:,} bytes; the files are of another model.",
    )


def _tokenizer_of(path: pathlib.Path) -> tuple[Any, dict[str, bytes]]:
    names = ("tokenizer.json", "tokenizer.model", "spiece.model")
    return from_folder(path) if any((path / name).exists() for name in names) else (None, {})


def _opened_tokenizer(kind: Any, files: Mapping[str, bytes]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (pathlib.Path(directory) / name).write_bytes(content)
        return kind.open(directory)


def import_model(
    path: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    dtype: Dtype = "",
    report: Callable[[str], object] = lambda line: None,
) -> None:
    """Turn a Hugging Face folder into a run directory: a checkpoint of step 0, with its config and tokenizer.

    Each process reads the bytes of its own shards only.

    Args:
        path: the folder.
        workdir: a new directory.
        dtype: type of parameters and activations; empty means the stored type.
        report: receives a line for the user.

    Raises:
        UserError: the folder is invalid or not supported, or `workdir` is not empty.

    Example:
        `import_model("SmolLM2-135M-Instruct", "runs/smollm2")`
    """
    workdir = expand(workdir)
    opened = open_folder(path, dtype=dtype)
    config = dataclasses.replace(opened.config, workdir=workdir)
    first = jax.process_index() == 0
    texts = {name: read_small(path) for name in KEPT if (path := opened.weights.folder.path / name).exists()}
    with locked(epath.Path(workdir), report) if first else contextlib.nullcontext():
        open_new_workdir(config, report)
        files = _record_files(opened, config, texts)
        if first:
            write_copies(epath.Path(workdir), files, begun=False)
        params = opened.params(widest_mesh(opened.parts))
        state = TrainState(np.zeros((), np.int32), params, (), (), (), ())
        checkpointer = Checkpointer(epath.Path(workdir) / CHECKPOINTS, record=stored_record(files))
        try:
            checkpointer.save(state, {"evaluations": {}}, piecewise=True)
        finally:
            checkpointer.close()
    multihost_utils.sync_global_devices("imported")  # the first process has completed the checkpoint
    report(describe(opened))


def widest_mesh(parts: Parts) -> Mesh | None:
    """A mesh that shards parameters over as many devices as divide them; None for one device."""
    count = jax.device_count()
    for shards in (n for n in range(count, 1, -1) if count % n == 0):
        mesh = make_mesh({"data": count // shards, "fsdp": shards})
        try:
            parameter_shardings(mesh, parts.axes, parts.shapes)
        except UserError:
            continue
        return mesh
    return make_mesh(-1) if jax.process_count() > 1 else None


def _record_files(opened: Opened, config: Config, texts: Mapping[str, str]) -> dict[str, bytes]:
    folder, weights = opened.weights.folder, opened.weights
    dtypes = set(weights.dtypes.values())
    source = {
        "files": folder.hashes(),
        "dtypes": next(iter(dtypes)) if len(dtypes) == 1 else weights.dtypes,
        "ignored_tensors": sorted(weights.ignored),
        "ignored_keys": sorted(folder.keys.ignored),
    }
    family = {
        "family": folder.family.kind,
        "objective": config.objective.kind,
        "bare": folder.bare,
        "config": folder.values,
        "texts": dict(texts),
    }
    files = {
        CONFIG_FILE: json.dumps(to_dict(config), indent=2).encode(),
        DATA_FILE: b"[]",
        IMPORT_FILE: json.dumps(source, indent=1).encode(),
        FAMILY_FILE: json.dumps(family, indent=1).encode(),
        **opened.tokenizer_files,
    }
    if opened.class_names:
        files[CLASSES_FILE] = json.dumps(opened.class_names).encode()
    if opened.given:
        files[GIVEN_FILE] = json.dumps(opened.given).encode()
    return files


def describe(opened: Opened) -> str:
    """A line that describes a folder."""
    config, folder = opened.config, opened.weights.folder
    count = sum(int(np.prod(shape, dtype=np.int64)) for shape in opened.weights.shapes.values())
    return (
        f"{folder.path.name}: {folder.family.kind}, {count:,} parameters, {counted(config.model.num_layers, 'layer')} of width "
        f"{config.model.embed_dim}, {config.model.param_dtype}; {config.objective.kind}"
        + (f"; ignored: {', '.join(sorted(opened.weights.ignored))}" if opened.weights.ignored else "")
        + ("; no tokenizer: it reads and writes ids only" if opened.given else "")
    )
