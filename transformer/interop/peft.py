"""Low-rank adapters in PEFT's format: two tensors for each tensor of a family's table, in both directions."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer.adapter_config import AdapterConfig
from transformer.interop.folder import read_json
from transformer.interop.forms import PART, Form
from transformer.interop.table import Bound
from transformer.interop.tensors import map_file, read_header
from transformer.layers.adapters import HEADS, LORA_A, LORA_B
from transformer.validation import require, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CLASSES = "classes.json"  # class names, an addition of this package: PEFT does not store them
PREFIX = "base_model.model."
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_TASKS = {
    "next_token": "CAUSAL_LM",
    "prefix_lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "span_corruption": "SEQ_2_SEQ_LM",
    "embedding": "FEATURE_EXTRACTION",
}
# Keys that change the computation of the factors; each with the values that have no effect.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


class Pair(NamedTuple):
    """The two factors of one PEFT tensor, and the one or several (fused) kernels that it holds."""

    module: str
    """The name of the PEFT tensor without `.weight`."""
    kernels: tuple[str, ...]
    """Paths of the kernels in the tree of a looped model."""
    form: Form
    inputs: int
    """Number of input axes of a kernel, which come first."""
    transposed: bool
    """Whether the PEFT tensor has the input axis first (`Conv1D`)."""

    def to_theirs(
        self, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], shapes: Mapping[str, tuple[int, ...]], rank: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`[rank, inputs]` and `[outputs, rank]`: each fused kernel has its own columns, and other entries are zero.

        Args:
            factors: A and B of the kernels that have an adapter.
            shapes: the shapes of all kernels.
            rank: the rank of the PEFT factors, at least the sum of the adapters' ranks.
        """
        firsts, seconds, start = [], [], 0
        for kernel in self.kernels:
            outputs = shapes[kernel][self.inputs :]
            wide = np.zeros((rank, *outputs), np.float32)
            if kernel in factors:
                lora_a, lora_b = factors[kernel]
                firsts.append(self._matrix([lora_a.reshape(*lora_a.shape, *(1,) * (len(outputs) - 1))]))
                wide[start : start + len(lora_b)] = lora_b
                start += len(lora_b)
            seconds.append(wide.reshape(rank, *(1,) * (self.inputs - 1), *outputs))
        first = np.concatenate(firsts)
        return np.pad(first, ((0, rank - len(first)), (0, 0))), self._matrix(seconds)

    def to_ours(
        self, theirs: Mapping[str, np.ndarray], shapes: Sequence[tuple[int, ...]]
    ) -> list[dict[str, np.ndarray]]:
        """The factors of each kernel, for kernels of these shapes; fused kernels share A.

        Raises:
            UserError: the factors have another size.
        """
        rank, inputs = len(theirs[LORA_A]), shapes[0][: self.inputs]
        one = (*inputs, rank, *(1,) * (len(shapes[0]) - self.inputs - 1))
        all_ = [(rank, *(1,) * (self.inputs - 1), *shape[self.inputs :]) for shape in shapes]
        size = sum(math.prod(shape) for shape in all_)
        require(
            theirs[LORA_A].size == math.prod(one) and theirs[LORA_B].size == size,
            f"Adapters of {self.module} must have {math.prod(one):,} and {size:,} numbers, got {theirs[LORA_A].size:,} and "
            f"{theirs[LORA_B].size:,}.",
        )
        first = self._parts(theirs[LORA_A], [one])[0].reshape(*inputs, rank)
        seconds = self._parts(theirs[LORA_B], all_)
        return [
            {LORA_A: first, LORA_B: second.reshape(rank, *shape[self.inputs :])}
            for second, shape in zip(seconds, shapes, strict=True)
        ]

    def _matrix(self, parts: list[np.ndarray]) -> np.ndarray:
        theirs = self.form.to_theirs(parts)
        return theirs.T if self.transposed else theirs

    def _parts(self, matrix: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        return self.form.to_ours(matrix.T if self.transposed else matrix, shapes)


def pairs(bound: Sequence[Bound], contracted: Mapping[str, int]) -> list[Pair]:
    """The adapted kernels of a model with their PEFT names.

    Args:
        bound: the rules of the model.
        contracted: number of input axes of each adapted kernel in the looped model, by path.

    Raises:
        UserError: a kernel belongs to no tensor, or to one that is not a matrix.
    """
    found = []
    for rule in bound:
        adapted = [path for path in rule.ours if path in contracted]
        if adapted:
            found.append(_pair(rule, contracted[adapted[0]]))
    missing = sorted(set(contracted) - {kernel for pair in found for kernel in pair.kernels})
    require(not missing, f"An adapter for PEFT must have a tensor of the family, {', '.join(missing[:3])} has none.")
    return found


def _pair(rule: Bound, contracted: int) -> Pair:
    axes = tuple(axis for axis in rule.form.ours if axis != PART)
    groups = [set(group) for group in rule.form.groups]
    inputs = set(axes[:contracted])
    module = rule.theirs.removesuffix(".weight")
    require(
        len(groups) == 2 and inputs in groups and rule.expert is None,
        f"An adapter for PEFT must be of a matrix of outputs and inputs, {module} is none.",
    )
    return Pair(module, rule.ours, rule.form, contracted, groups[0] == inputs)


def heads(bound: Sequence[Bound]) -> list[Bound]:
    """The rules of parameters that are trained in full beside adapters (`modules_to_save`)."""
    return [rule for rule in bound if rule.ours[0].partition("/")[0] in HEADS]


def _saved_module(tensor: str) -> str:
    """The module of a tensor that is saved in full; PEFT always saves `classifier`, with everything in it."""
    return "classifier" if tensor.startswith("classifier.") else tensor.rpartition(".")[0]


def config_values(
    adapter: AdapterConfig, rank: int, found: Sequence[Pair], bound: Sequence[Bound], objective: str, base: str
) -> dict[str, Any]:
    """The content of an adapter_config.json.

    Args:
        adapter: the run's adapter config.
        rank: the rank of the factors.
        found: the adapted kernels.
        bound: the rules of the model; a short name is used if it matches only the adapted tensors.
        objective: the kind of the run's objective.
        base: the name of the base model.
    """
    modules = {pair.module for pair in found}
    ends = sorted({module.rpartition(".")[2] for module in modules})
    short = {rule.theirs.removesuffix(".weight") for rule in bound if rule.theirs.endswith(".weight")}
    meant = {module for module in short if module.rpartition(".")[2] in ends}
    return {
        "peft_type": "LORA",
        "task_type": _TASKS.get(objective),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapter.alpha * rank / adapter.rank,
        "lora_dropout": adapter.dropout,
        "target_modules": ends if meant == modules else sorted(modules),
        "fan_in_fan_out": any(pair.transposed for pair in found),
        "bias": "none",
        "modules_to_save": sorted({_saved_module(rule.theirs) for rule in heads(bound)}) or None,
        "inference_mode": True,
    }


class Adapters(NamedTuple):
    """The content of a PEFT folder."""

    rank: int
    alpha: float
    dropout: float
    factors: dict[str, dict[str, np.ndarray]]
    """PEFT module -> `lora_a` and `lora_b`, as views of the file."""
    whole: dict[str, np.ndarray]
    """Tensors trained in full, by PEFT name."""
    class_names: tuple[str, ...]
    """The classes of a classifier whose head is included, in the order of its logits."""


def read_adapters(path: pathlib.Path) -> Adapters:
    """Read the adapters in a PEFT folder.

    Raises:
        UserError: it is no such folder, or of a kind that is not supported.
    """
    where = path / CONFIG
    values = read_json(where)
    require(
        isinstance(values, dict) and values.get("peft_type") == "LORA",
        f"{where} must be of peft_type LORA, got {shown(values.get('peft_type') if isinstance(values, dict) else values)}.",
    )
    for name, allowed in _ONLY.items():
        value = values.get(name, allowed[0])
        require(
            value in allowed,
            f"{where}: {name} must be {allowed[0]} for adapters of this library, got {shown(value)}.",
        )
    rank, alpha, dropout = (values.get(name) for name in ("r", "lora_alpha", "lora_dropout"))
    require(
        type(rank) is int and rank > 0 and isinstance(alpha, (int, float)) and isinstance(dropout, (int, float)),
        f"{where} must have numbers in r, lora_alpha and lora_dropout, got {shown((rank, alpha, dropout))}.",
    )
    require((path / WEIGHTS).is_file(), f"{path} must have {WEIGHTS}; save the adapter as safetensors.")
    stored, _ = read_header(path / WEIGHTS)
    memory = map_file(path / WEIGHTS)
    factors: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for name, tensor in stored.items():
        require(name.startswith(PREFIX), f"{path / WEIGHTS}: a name must begin with {PREFIX}, got {name!r:.80}.")
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            whole[name.removeprefix(PREFIX)] = tensor.view(memory)
        else:
            factors.setdefault(match["module"], {})[LORA_A if match["factor"] == "A" else LORA_B] = tensor.view(memory)
    for module, both in factors.items():
        require(
            set(both) == {LORA_A, LORA_B}
            and len(both[LORA_A].shape) == len(both[LORA_B].shape) == 2
            and both[LORA_A].shape[0] == both[LORA_B].shape[1] == rank,
            f"{path / WEIGHTS} must have two factors of rank {rank} for {module}, got "
            f"{shown({name: x.shape for name, x in both.items()})}.",
        )
    assert type(rank) is int and isinstance(alpha, (int, float)) and isinstance(dropout, (int, float))
    return Adapters(rank, float(alpha), float(dropout), factors, whole, _class_names(path, whole))


def _class_names(path: pathlib.Path, whole: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The class names that an export wrote, or transformers' default names."""
    counts = [len(x) for name, x in whole.items() if name in ("classifier.bias", "classifier.out_proj.bias")]
    if not counts:
        return ()
    names = read_json(path / CLASSES) if (path / CLASSES).exists() else [f"LABEL_{i}" for i in range(counts[0])]
    require(
        isinstance(names, list) and len(names) == counts[0] and all(isinstance(name, str) for name in names),
        f"{path / CLASSES} must name the {counts[0]} classes of the head, got {shown(names)}.",
    )
    return tuple(names)
