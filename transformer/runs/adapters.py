"""Adapters in and out, as PEFT has them: a folder becomes a run beside its base; a run's adapters become a folder."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from transformer.adapter_config import AdapterConfig
from transformer.config import Config
from transformer.config_io import CONFIG_FILE, IMPORT_FILE, to_dict
from transformer.data.trust import remember_paths
from transformer.interop import peft, table
from transformer.interop.family import ModelFamily
from transformer.interop.tensors import Planned, write_tensors
from transformer.layers.adapters import LORA_A, LORA_B, split
from transformer.parts import Parts, resolve
from transformer.runs.base import Base
from transformer.runs.directory import (
    BASE_FILE,
    CHECKPOINTS,
    DATA_FILE,
    open_workdir,
    read_run,
    stored_record,
    write_copies,
)
from transformer.runs.lock import locked
from transformer.storage import expand
from transformer.training.checkpoint import Checkpointer
from transformer.training.state import TrainState
from transformer.types import PyTree
from transformer.validation import require

_ROLE = re.compile(r"(.*blocks/)block_\d+/(.*)")


def _leaves(config: Config, params: PyTree) -> dict[str, table.Leaf]:
    model = config.model
    return table.leaves(params, len(model.first), len(model.pattern), scanned=model.scan_layers)


def _contracted(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Path of each adapted kernel -> axes of its input."""
    ending = f"/{LORA_A}"
    return {p.removesuffix(LORA_A) + "kernel": len(shape) - 1 for p, shape in shapes.items() if p.endswith(ending)}


def write_adapters(folder: pathlib.Path, family: ModelFamily, config: Config, params: PyTree, base: str) -> None:
    """Write the adapters of a model to a folder, as PEFT reads them.

    Args:
        folder: there already.
        family: that expresses the model.
        config: resolved.
        params: all parameters of the model, with adapters.
        base: names the base model.

    Raises:
        UserError: a kernel with an adapter is a part of a tensor of the family's.
    """
    tree = _leaves(config, params)
    shapes = table.looped_shapes(tree)
    kernels = {path: shape for path, shape in shapes.items() if not path.endswith((LORA_A, LORA_B))}
    bound = table.bind(family.rules(config.model, config.objective.kind), kernels, config.model.num_layers)
    found = peft.pairs(bound, _contracted(shapes))
    places = {path: (leaf, place) for leaf in tree.values() for place, path in enumerate(leaf.looped)}

    def values(path: str) -> np.ndarray:
        leaf, place = places[path]
        return np.asarray(leaf.value[place] if leaf.scanned else leaf.value)

    tensors: dict[str, Planned] = {}
    for pair in found:
        parent = pair.kernel.removesuffix("kernel")
        both = pair.to_theirs(values(parent + LORA_A), values(parent + LORA_B))
        for name, factor in zip("AB", both, strict=True):
            planned = Planned(factor.dtype, factor.shape, lambda factor=factor: factor)
            tensors[f"base_model.model.{pair.module}.lora_{name}.weight"] = planned
    with (folder / peft.WEIGHTS).open("wb") as file:
        write_tensors(file, tensors, {"format": "pt"})
    theirs = [rule.theirs for rule in bound]
    written = peft.config_values(config.adapter, found, theirs, config.objective.kind, base)
    (folder / peft.CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def import_adapters(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    family: Callable[[Any, Config], ModelFamily],
    report: Callable[[str], object] = lambda line: None,
) -> None:
    """Make a run's directory of a folder of PEFT's, beside the run of its base.

    Args:
        path: of the folder.
        base: directory of the base's run, such as an imported model.
        workdir: a new directory.
        family: gives the family of the base's record and config.
        report: called with a line for the user.

    Raises:
        UserError: the adapters are of a kind that ours cannot be, or of another model.
    """
    require(jax.process_count() == 1, "Adapters are imported by one process; start one, on one device.")
    folder, base, workdir = pathlib.Path(expand(path)), os.fspath(expand(base)), expand(workdir)
    adapters, record = peft.read_adapters(folder), read_run(base, lambda record: record)
    tokenizer = record.load_tokenizer()
    plain = resolve(record.config, tokenizer)
    tree = _leaves(plain, Parts(plain, tokenizer, class_names=record.class_names).shapes)
    shapes = table.looped_shapes(tree)
    rules = family(record, plain).rules(plain.model, plain.objective.kind)
    named = {rule.theirs.removesuffix(".weight"): rule for rule in table.bind(rules, shapes, plain.model.num_layers)}
    unknown = [module for module in adapters.factors if module not in named]
    require(
        not unknown,
        f"Adapters must be of tensors of their base, {folder} has {', '.join(unknown[:3])}, which {base} has not.",
    )
    adapted = {path for module in adapters.factors for path in named[module].ours}
    paths = _patterns(tree, adapted)
    adapter = AdapterConfig(adapters.rank, adapters.alpha, adapters.dropout, paths)
    training = dataclasses.replace(record.config.training, init_from=base, init_from_step=str(record.step))
    config = dataclasses.replace(record.config, adapter=adapter, training=training, workdir=workdir)
    parts = Parts(resolve(config, tokenizer), tokenizer, class_names=record.class_names)
    params = _read_params(folder, parts, adapters, list(named.values()))
    files = {
        **record.files,
        CONFIG_FILE: json.dumps(to_dict(config), indent=2).encode(),
        DATA_FILE: b"[]",
        IMPORT_FILE: json.dumps({"peft": folder.name}).encode(),
        BASE_FILE: Base.of(record).to_file(),
    }
    _save(config, files, params, report)
    remember_paths(base)
    report(f"{folder.name}: adapters of rank {adapter.rank} for {len(adapted)} kernels of {base}")


def _save(config: Config, files: dict[str, bytes], params: PyTree, report: Callable[[str], object]) -> None:
    workdir = epath.Path(config.workdir)
    with locked(workdir, report):
        require(
            open_workdir(config, report) is None,
            f"Adapters are imported to a new directory, {workdir} holds a run; choose another.",
        )
        write_copies(workdir, files, begun=False)
        checkpointer = Checkpointer(workdir / CHECKPOINTS, record=stored_record(files))
        try:
            checkpointer.save(TrainState(np.zeros((), np.int32), params, (), (), (), ()), {"evaluations": {}})
        finally:
            checkpointer.close()


def _read_params(folder: pathlib.Path, parts: Parts, adapters: peft.Adapters, bound: Sequence[table.Bound]) -> PyTree:
    """The adapters of a folder as parameters of a model that has some."""
    trained = split(parts.shapes)[1]
    own = table.looped_shapes(_leaves(parts.config, trained))
    by_kernel = {pair.kernel: pair for pair in peft.pairs(bound, _contracted(own))}

    def array(leaf: table.Leaf, factor: str) -> np.ndarray:
        arrays = []
        for path in leaf.looped:
            pair = by_kernel[path.removesuffix(factor) + "kernel"]
            theirs = adapters.factors[pair.module][factor]
            size = int(np.prod(own[path]))
            require(theirs.size == size, f"{folder}: {pair.module} must have {size} numbers, has {list(theirs.shape)}.")
            arrays.append(pair.to_ours(np.asarray(theirs, np.float32), factor, own[path]))
        return np.stack(arrays) if leaf.scanned else arrays[0]

    made = {path: array(leaf, path.rpartition("/")[2]) for path, leaf in _leaves(parts.config, trained).items()}
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: jax.numpy.asarray(made[jax.tree_util.keystr(keys, simple=True, separator="/")]), trained
    )


def _patterns(tree: Mapping[str, table.Leaf], adapted: set[str]) -> tuple[str, ...]:
    """Patterns of the paths of these kernels of the looped model: a role that all blocks have, or a path."""
    paths = []
    for path, leaf in tree.items():
        chosen = adapted.intersection(leaf.looped)
        require(
            not chosen or len(chosen) == len(leaf.looped),
            f"Adapters of a scanned stack are of all its layers or of none, {', '.join(sorted(chosen)[:2])} are of some; "
            "import the base anew, with its layers looped.",
        )
        paths += [path] if chosen else []
    return tuple(dict.fromkeys(_pattern(path, list(tree), paths) for path in paths))


def _pattern(path: str, every: Sequence[str], adapted: Sequence[str]) -> str:
    match = _ROLE.fullmatch(path)
    if match:
        role = re.compile(rf"{match[1]}block_\d+/{re.escape(match[2])}")
        if all(other in adapted for other in every if role.fullmatch(other)):
            return rf"{match[1]}block_\d+/{re.escape(match[2])}$"
    return f"^{re.escape(path)}$"
