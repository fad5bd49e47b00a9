"""Import and export of adapters in PEFT's format: a folder becomes a run next to its base, and a run's adapters a folder."""

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
from transformer.interop.folder import CONFIG as MODEL_CONFIG
from transformer.interop.tensors import Planned, write_tensors
from transformer.layers.adapters import HEADS, LORA_A, LORA_B, split
from transformer.objectives.classification import Classification
from transformer.ops.poolings.first import FirstPooling
from transformer.parts import Parts, resolve
from transformer.runs.base import Base, on_host
from transformer.runs.directory import (
    BASE_FILE,
    CHECKPOINTS,
    CLASSES_FILE,
    DATA_FILE,
    Record,
    open_new_workdir,
    read_run,
    stored_record,
    write_copies,
)
from transformer.runs.lock import locked
from transformer.storage import expand
from transformer.training.checkpoint import Checkpointer, load_params, stored_params
from transformer.training.state import TrainState
from transformer.types import PyTree
from transformer.validation import require

_ROLE = re.compile(r"(.*blocks/)block_\d+/(.*)")


def _leaves(config: Config, params: PyTree) -> dict[str, table.Leaf]:
    model = config.model
    return table.leaves(params, len(model.first), len(model.pattern), scanned=model.scan_layers)


def _contracted(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The number of input axes of each adapted kernel, by path."""
    ending = f"/{LORA_A}"
    return {p.removesuffix(LORA_A) + "kernel": len(shape) - 1 for p, shape in shapes.items() if p.endswith(ending)}


def write_adapters(
    folder: pathlib.Path,
    family: ModelFamily,
    config: Config,
    params: PyTree,
    base: str,
    class_names: tuple[str, ...] = (),
) -> None:
    """Write the adapters of a model to a folder in PEFT's format.

    Args:
        folder: an existing folder.
        family: the family that expresses the model.
        config: the resolved config.
        params: all parameters of the model, with adapters.
        base: the name of the base model.
        class_names: the classes of a classifier.

    Raises:
        UserError: a kernel with an adapter has no tensor in the family.
    """
    tree = _leaves(config, params)
    shapes = table.looped_shapes(tree)
    kernels = {path: shape for path, shape in shapes.items() if not path.endswith((LORA_A, LORA_B))}
    bound = table.bind(family.rules(config.model, config.objective.kind), kernels, config.model.num_layers)
    adapted = _contracted(shapes)
    found = peft.pairs(bound, adapted)
    places = {path: (leaf, place) for leaf in tree.values() for place, path in enumerate(leaf.looped)}

    def values(path: str) -> np.ndarray:
        leaf, place = places[path]
        return np.asarray(leaf.value[place] if leaf.scanned else leaf.value)

    tensors: dict[str, Planned] = {}
    rank = config.adapter.rank * max(len(set(pair.kernels) & adapted.keys()) for pair in found)
    for pair in found:
        parents = {kernel: kernel.removesuffix("kernel") for kernel in pair.kernels if kernel in adapted}
        factors = {kernel: (values(parent + LORA_A), values(parent + LORA_B)) for kernel, parent in parents.items()}
        for name, factor in zip("AB", pair.to_theirs(factors, kernels, rank), strict=True):
            planned = Planned(factor.dtype, factor.shape, lambda factor=factor: factor)
            tensors[f"{peft.PREFIX}{pair.module}.lora_{name}.weight"] = planned
    for rule in peft.heads(bound):
        head = rule.form.to_theirs([values(path) for path in rule.ours])
        tensors[peft.PREFIX + rule.theirs] = Planned(head.dtype, head.shape, lambda head=head: head)
    with (folder / peft.WEIGHTS).open("wb") as file:
        write_tensors(file, tensors, {"format": "pt"})
    written = peft.config_values(config.adapter, rank, found, bound, config.objective.kind, base)
    if class_names:
        (folder / peft.CLASSES).write_text(json.dumps(class_names) + "\n")
    (folder / peft.CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def import_adapters(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    family: Callable[[Any, Config], ModelFamily],
    report: Callable[[str], object] = lambda line: None,
) -> None:
    """Turn a PEFT folder into a run directory, next to the run of its base.

    Args:
        path: the PEFT folder.
        base: the directory of the base's run, such as an imported model.
        workdir: a new directory.
        family: returns the family for the base's record and config.
        report: receives a line for the user.

    Raises:
        UserError: the adapters are of an unsupported kind, or of another model.
    """
    require(jax.process_count() == 1, "Adapters are imported by one process; start one, on one device.")
    folder, base, workdir = pathlib.Path(expand(path)), os.fspath(expand(base)), expand(workdir)
    _check_run(base)
    adapters, record = peft.read_adapters(folder), read_run(base, lambda record: record)
    class_names = record.class_names or adapters.class_names
    begun = _with_head(record.config) if class_names and not record.class_names else record.config
    tokenizer = record._replace(config=begun).load_tokenizer()
    plain = resolve(begun, tokenizer)
    tree = _leaves(plain, Parts(plain, tokenizer, class_names=class_names).shapes)
    shapes = table.looped_shapes(tree)
    rules = family(record, plain).rules(plain.model, plain.objective.kind)
    named = {rule.theirs.removesuffix(".weight"): rule for rule in table.bind(rules, shapes, plain.model.num_layers)}
    heads = {rule.theirs: rule for rule in peft.heads(list(named.values()))}
    unknown = [module for module in adapters.factors if module not in named] + [*adapters.whole.keys() - heads.keys()]
    require(
        not unknown,
        f"Adapters must be of the linear layers of their base, and only the head of a classifier may be saved whole; {folder} "
        f"also has {', '.join(unknown[:3])}, and {base} has no such layer or head. Give the base that it was trained on; for "
        "others (embeddings, lm_head), merge it by PEFT (merge_and_unload) and import the result.",
    )
    adapted = {path for module in adapters.factors for path in named[module].ours}
    paths = _patterns(tree, adapted)
    adapter = AdapterConfig(adapters.rank, adapters.alpha, adapters.dropout, paths)
    training = dataclasses.replace(begun.training, init_from=base, init_from_step=str(record.step))
    config = dataclasses.replace(begun, adapter=adapter, training=training, workdir=workdir)
    parts = Parts(resolve(config, tokenizer), tokenizer, class_names=class_names)
    params = _read_params(folder, parts, adapters, list(named.values()), _heads_of(record, parts))
    files = {
        **record.files,
        CONFIG_FILE: json.dumps(to_dict(config), indent=2).encode(),
        DATA_FILE: b"[]",
        IMPORT_FILE: json.dumps({"peft": folder.name}).encode(),
        BASE_FILE: Base.of(record).to_file(),
    }
    if class_names:
        files[CLASSES_FILE] = json.dumps(class_names).encode()
    _save(config, files, params, report)
    remember_paths(base)
    report(f"{folder.name}: adapters of rank {adapter.rank} for {len(adapted)} kernels of {base}")


def _check_run(base: str) -> None:
    require(
        (epath.Path(base) / CHECKPOINTS).exists() or not (epath.Path(base) / MODEL_CONFIG).exists(),
        f"The base of adapters must be the directory of a run, {base} is a pretrained folder; `transformer import` it first.",
    )


def _with_head(config: Config) -> Config:
    """The config of a classifier with the encoder of another model, built like the sequence classifiers of all families."""
    model = dataclasses.replace(config.model, pooling=FirstPooling())
    return dataclasses.replace(config, objective=Classification(), model=model)


def _save(config: Config, files: dict[str, bytes], params: PyTree, report: Callable[[str], object]) -> None:
    workdir = epath.Path(config.workdir)
    with locked(workdir, report):
        open_new_workdir(config, report)
        write_copies(workdir, files, begun=False)
        checkpointer = Checkpointer(workdir / CHECKPOINTS, record=stored_record(files))
        try:
            checkpointer.save(TrainState(np.zeros((), np.int32), params, (), (), (), ()), {"evaluations": {}})
        finally:
            checkpointer.close()


def _heads_of(record: Record, parts: Parts) -> PyTree:
    """The base's values of the parts that are trained in full next to adapters."""
    own = {name: part for name, part in split(parts.shapes)[1].items() if name in HEADS}
    stored = stored_params(record.path)[1]
    if not own.keys() & stored.keys():
        return {}
    _, params = load_params(record.path, on_host({name: stored[name] for name in own if name in stored}), some=True)
    return params


def _read_params(
    folder: pathlib.Path, parts: Parts, adapters: peft.Adapters, bound: Sequence[table.Bound], heads: PyTree
) -> PyTree:
    """The parameters of a folder's adapters, and of its heads or the base's."""
    trained = split(parts.shapes)[1]
    leaves = _leaves(parts.config, trained)
    own = table.looped_shapes(leaves)
    kernels = table.looped_shapes(_leaves(parts.config, parts.shapes))
    found = {path: leaf.value for path, leaf in _leaves(parts.config, heads).items()}
    for rule in peft.heads(bound):
        if rule.theirs in adapters.whole:
            theirs, shapes = adapters.whole[rule.theirs], [own[path] for path in rule.ours]
            require(
                theirs.shape == rule.form.shape(shapes),
                f"{folder}: {rule.theirs} must be of the base's shape {rule.form.shape(shapes)}, got {theirs.shape}.",
            )
            found |= zip(rule.ours, rule.form.to_ours(theirs, shapes), strict=True)
    missing = sorted(path for path in own if path.startswith(HEADS) and path not in found)
    require(not missing, f"A head must be in the adapters or their base, {', '.join(missing)} is in neither; {folder}.")
    for pair in peft.pairs(bound, _contracted(own)):
        shapes = [kernels[kernel] for kernel in pair.kernels]
        for kernel, factors in zip(pair.kernels, pair.to_ours(adapters.factors[pair.module], shapes), strict=True):
            found |= {kernel.removesuffix("kernel") + name: x for name, x in factors.items()}

    def value(keys: Any, _: Any) -> jax.Array:
        leaf = leaves[jax.tree_util.keystr(keys, simple=True, separator="/")]
        arrays = [np.asarray(found[path], np.float32) for path in leaf.looped]
        return jax.numpy.array(np.stack(arrays) if leaf.scanned else arrays[0])

    return jax.tree_util.tree_map_with_path(value, trained)


def _patterns(tree: Mapping[str, table.Leaf], adapted: set[str]) -> tuple[str, ...]:
    """Path patterns of these kernels of the looped model: a role that all blocks have, or a path."""
    paths = []
    for path, leaf in tree.items():
        chosen = adapted.intersection(leaf.looped)
        require(
            not chosen or len(chosen) == len(leaf.looped),
            f"Adapters of a scanned stack are of all its layers or of none, {', '.join(sorted(chosen)[:2])} are of some; "
            "import the base again, with its layers looped.",
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
