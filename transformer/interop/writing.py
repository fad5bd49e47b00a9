"""Writes parameters as a folder for Hugging Face's libraries: weights, config, tokenizer."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from transformer.interop import table
from transformer.interop.family import FAMILIES, Keys, ModelFamily
from transformer.interop.folder import CONFIG, INDEX, WEIGHTS
from transformer.interop.tensors import DTYPES, Planned, pieces, total_bytes, write_tensors
from transformer.model_config import BlockConfig, ModelConfig
from transformer.storage import write_whole, writing_whole
from transformer.types import PyTree, UserError
from transformer.validation import require

PIECE_BYTES = 5 * 10**9
"""Most bytes in a file of weights, as in transformers."""
# Fields of a model config about computation and training, which no family can express.
_COMPUTING = frozenset(["dtype", "param_dtype", "scan_layers", "remat", "init_std", "dropout", "memory_length"])
_OF_TRAINING = frozenset(("dropout", "implementation"))


def expressing_family(
    model: ModelConfig,
    objective: str,
    name: str = "",
    *,
    preferred: str = "",
    known: Mapping[str, Any] | None = None,
) -> tuple[ModelFamily, dict[str, Any]]:
    """The family that can express a model exactly, and the corresponding config.json.

    Args:
        model: the resolved config.
        objective: the kind of objective of the model.
        name: the requested family; by default, the first that can express the model.
        preferred: the family to try first.
        known: the config.json of the model's import, used unchanged if it is equivalent.

    Raises:
        UserError: no family, or not this one, can express the model; the message names the fields.
    """
    tried: dict[str, list[str]] = {}
    names = sorted(FAMILIES.names, key=lambda found: found != preferred)
    for found in [name] if name else names:
        family: ModelFamily = FAMILIES.find(found)()
        if objective in family.architectures.values():
            if known and known.get("model_type") == family.kind and not _differing(family, model, objective, known):
                return family, dict(known)
            values, differing = _expressed(family, model, objective)
            if not differing:
                return family, values
            tried[found] = differing
    require(
        len(tried) > 0,
        f"A model to export must be of an objective that a family knows, none{f' of {name}' if name else ''} has {objective!r}.",
    )
    # A family that cannot express the model at all is the least similar, however short its reason.
    nearest = min(tried, key=lambda found: (not all(" -> " in line for line in tried[found]), len(tried[found])))
    raise UserError(
        f"A model to export must be one that a family can express; {nearest}, the nearest, cannot express\n  "
        + "\n  ".join(f"{line:.110}" for line in tried[nearest][:10])
        + "\nTrain a model without these, or use it with this library."
    )


def _expressed(family: ModelFamily, model: ModelConfig, objective: str) -> tuple[dict[str, Any], list[str]]:
    """The config.json of a model, and the differences of the model that it describes."""
    architecture = next(name for name, kind in family.architectures.items() if kind == objective)
    try:
        own = family.write(dataclasses.replace(model, scan_layers=False))
    except (UserError, AttributeError) as error:  # for example a field that only the family's kinds of parts have
        return {}, [str(error)]
    values = {"architectures": [architecture], "model_type": family.kind, **own}
    return values, _differing(family, model, objective, values)


def _differing(family: ModelFamily, model: ModelConfig, objective: str, values: Mapping[str, Any]) -> list[str]:
    """The differences between a model and the model that a config.json describes."""
    tensors = {rule.theirs for rule in family.rules(model, objective)} - set(family.copies(model))
    named = values.get("architectures") or [next(iter(family.architectures))]
    try:
        read = family.read(Keys(values, family.defaults, CONFIG, tensors), named[0])
        # Other heads do not pool, and the folder of a sentence encoder names its pooling in another file.
        if objective != "classification":
            read = dataclasses.replace(read, pooling=model.pooling)
        return differences(model, read)
    except (UserError, KeyError) as error:
        return [str(error)]


def differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """Differences in the computation of two models, one per line, such as `logits_soft_cap: 30.0 -> 0.0`."""
    lines = []
    for field in dataclasses.fields(ModelConfig):
        before, after = getattr(model, field.name), getattr(other, field.name)
        # The family may have no limit.
        unlimited = field.name == "max_length" and after == 0
        if field.name not in _COMPUTING | {"first", "pattern"} and before != after and not unlimited:
            lines.append(f"{field.name}: {before} -> {after}")
    layers: dict[str, list[int]] = {}  # one line for all layers with the same difference
    for layer, (block, another) in enumerate(zip(model.blocks, other.blocks, strict=False)):
        one, two = (_resolved(b, model.embed_dim) for b in (block, another))
        for name in one:
            if one[name] != two.get(name):
                layers.setdefault(f"{name}: {one[name]} -> {two.get(name)}", []).append(layer)
    for line, found in layers.items():
        of_all = len(found) == len(model.blocks)
        lines.append(line if of_all else f"layer{'s' * (len(found) > 1)} {', '.join(map(str, found))}: {line}")
    return lines


def _resolved(block: BlockConfig, embed_dim: int) -> dict[str, Any]:
    """The fields of a block, with defaults resolved."""
    attention = dataclasses.replace(
        block.attention,
        num_kv_heads=block.attention.kv_heads,
        head_dim=block.attention.resolved_head_dim(embed_dim),
    )
    network = dataclasses.replace(block.feed_forward, hidden_dim=block.feed_forward.resolved_hidden_dim(embed_dim))
    found: dict[str, Any] = {}
    for section, part in (("attention", attention), ("feed_forward", network)):
        found |= {
            f"{section}.{field.name}": getattr(part, field.name)
            for field in dataclasses.fields(part)
            if field.name not in _OF_TRAINING
        }
    others = [field.name for field in dataclasses.fields(block) if field.name not in ("attention", "feed_forward")]
    return found | {name: getattr(block, name) for name in others}


# ---- Weights -----------------------------------------------------------------------------------------------------------


def planned(
    family: ModelFamily,
    model: ModelConfig,
    objective: str,
    params: PyTree,
    dtype: Callable[[str, Any], Any],
    *,
    bare: bool = False,
) -> dict[str, Planned]:
    """The tensors of a model by their names in the family, to be fetched one after the other.

    Args:
        family: the family that expresses the model.
        model: the model's config.
        objective: the kind of objective of the model.
        params: arrays, perhaps distributed over several processes, all of which must fetch.
        dtype: returns the type of a tensor, given its name and the type of the parameter.
        bare: omit the prefix of models with a head.
    """
    tree = table.leaves(params, len(model.first), len(model.pattern), scanned=model.scan_layers)
    shapes = table.looped_shapes(tree)
    places = {path: (leaf, place) for leaf in tree.values() for place, path in enumerate(leaf.looped)}
    bound = table.bind(family.rules(model, objective), shapes, max(model.num_layers, model.decoder_layers))
    unsaid = sorted(set(shapes).difference(path for rule in bound for path in rule.ours))
    require(
        not unsaid,
        f"A model of the family {family.kind} has no tensor for {', '.join(unsaid[:3])}; it cannot be exported so.",
    )
    found = {}
    names = {rule.theirs: rule.theirs.removeprefix(family.prefix) if bare else rule.theirs for rule in bound}
    for rule in bound:
        values = functools.partial(_values, rule, [places[path] for path in rule.ours])
        own = places[rule.ours[0]][0].value.dtype
        found[names[rule.theirs]] = Planned(dtype(rule.theirs, own), table.their_shape(rule, shapes), values)
    return found


def _values(rule: table.Bound, places: Sequence[tuple[table.Leaf, int]]) -> np.ndarray:
    parts = []
    for leaf, place in places:
        index = ((place,) if leaf.scanned else ()) + ((rule.expert,) if rule.expert is not None else ())
        parts.append(_fetched(leaf.value[index] if index else leaf.value))
    return rule.form.to_theirs(parts)


def _fetched(value: Any) -> np.ndarray:
    """A complete array on the host, even if other processes hold parts of it."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def write_weights(folder: pathlib.Path, tensors: Mapping[str, Planned]) -> None:
    """Write the tensors in one file, or in several with an index; with several processes, the first one writes."""
    groups = pieces(tensors, PIECE_BYTES)
    names = [WEIGHTS] if len(groups) == 1 else [_piece(number, len(groups)) for number in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        if jax.process_index() != 0:
            write_tensors(None, group, {})
            continue
        with writing_whole(folder / name) as file:
            write_tensors(file, group, {"format": "pt"})
    if len(groups) > 1 and jax.process_index() == 0:
        where = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": total_bytes(tensors.values())}, "weight_map": where}
        write_whole(folder / INDEX, json.dumps(index, indent=2))


def _piece(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def dtype_name(dtype: DTypeLike) -> str:
    """The name of a type in config.json."""
    known = {str(value) for value in DTYPES.values()}
    require(str(dtype) in known, f"Weights must be of a type that files can have ({', '.join(known)}), got {dtype}.")
    return str(dtype)
