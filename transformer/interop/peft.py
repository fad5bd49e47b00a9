"""Low-rank adapters as PEFT has them: two tensors beside each tensor of a family's table, in either direction."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer.adapter_config import AdapterConfig
from transformer.interop.folder import read_json
from transformer.interop.forms import Form
from transformer.interop.table import Bound
from transformer.interop.tensors import map_file, read_header
from transformer.layers.adapters import LORA_A, LORA_B
from transformer.validation import require, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_TASKS = {
    "next_token": "CAUSAL_LM",
    "prefix_lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "span_corruption": "SEQ_2_SEQ_LM",
    "embedding": "FEATURE_EXTRACTION",
}
# Keys that make another model of the factors than ours; each with the values that change nothing.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


class Pair(NamedTuple):
    """How the two factors of a kernel lie in PEFT's."""

    module: str
    """Theirs: the name of the tensor without `.weight`."""
    kernel: str
    """Path of ours, in the tree of a looped model."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Axes of ours."""
    their_inputs: tuple[str, ...]
    their_outputs: tuple[str, ...]
    """The same in the order in which theirs merges them."""
    transposed: bool
    """Whether their tensor has the input first (`Conv1D`)."""

    def to_theirs(self, lora_a: np.ndarray, lora_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[rank, inputs] and [outputs, rank]."""
        a = lora_a.transpose(*(self.inputs.index(axis) for axis in self.their_inputs), lora_a.ndim - 1)
        b = lora_b.transpose(0, *(1 + self.outputs.index(axis) for axis in self.their_outputs))
        return a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T

    def to_ours(self, theirs: np.ndarray, factor: str, shape: tuple[int, ...]) -> np.ndarray:
        """A factor with our axes, of this shape."""
        if factor == LORA_A:
            sizes = dict(zip(self.inputs, shape[:-1], strict=True))
            split = theirs.T.reshape(*(sizes[axis] for axis in self.their_inputs), shape[-1])
            return split.transpose(*(self.their_inputs.index(axis) for axis in self.inputs), split.ndim - 1)
        sizes = dict(zip(self.outputs, shape[1:], strict=True))
        split = theirs.T.reshape(shape[0], *(sizes[axis] for axis in self.their_outputs))
        return split.transpose(0, *(1 + self.their_outputs.index(axis) for axis in self.outputs))


def pairs(bound: Sequence[Bound], contracted: Mapping[str, int]) -> list[Pair]:
    """The adapted kernels of a model as PEFT names them.

    Args:
        bound: the rules of the model.
        contracted: path of each adapted kernel in the looped model -> axes of its input.

    Raises:
        UserError: a kernel is a part of a tensor of theirs, or has none.
    """
    found = []
    for rule in bound:
        adapted = [path for path in rule.ours if path in contracted]
        if not adapted:
            continue
        require(
            len(rule.ours) == 1 and not rule.form.fused,
            f"An adapter of {', '.join(adapted)} cannot be PEFT's, since {rule.theirs} is one tensor for "
            f"{', '.join(rule.ours)}; leave these out of adapter.paths, or export the merged model.",
        )
        found.append(_pair(rule.theirs.removesuffix(".weight"), rule.ours[0], rule.form, contracted[adapted[0]]))
    missing = sorted(set(contracted) - {pair.kernel for pair in found})
    require(not missing, f"An adapter for PEFT must have a tensor of the family, {', '.join(missing[:3])} has none.")
    return found


def _pair(module: str, kernel: str, form: Form, contracted: int) -> Pair:
    inputs, outputs = form.ours[:contracted], form.ours[contracted:]
    groups = {frozenset(group): group for group in form.groups}
    require(
        frozenset(inputs) in groups and frozenset(outputs) in groups and len(form.groups) == 2,
        f"An adapter for PEFT must be of a matrix of outputs and inputs, {module} is none.",
    )
    their_inputs, their_outputs = groups[frozenset(inputs)], groups[frozenset(outputs)]
    return Pair(module, kernel, inputs, outputs, their_inputs, their_outputs, form.groups[0] == their_inputs)


def config_values(
    adapter: AdapterConfig, found: Sequence[Pair], others: Sequence[str], objective: str, base: str
) -> dict[str, Any]:
    """An adapter_config.json.

    Args:
        adapter: of the run.
        found: the adapted kernels.
        others: names of the tensors of the family; a short name is used where it means the adapted ones alone.
        objective: the kind of objective of the run.
        base: names the base model.
    """
    modules = {pair.module for pair in found}
    ends = sorted({module.rpartition(".")[2] for module in modules})
    short = {n.removesuffix(".weight") for n in others if n.endswith(".weight")}
    meant = {module for module in short if module.rpartition(".")[2] in ends}
    return {
        "peft_type": "LORA",
        "task_type": _TASKS.get(objective),
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": ends if meant == modules else sorted(modules),
        "fan_in_fan_out": any(pair.transposed for pair in found),
        "bias": "none",
        "inference_mode": True,
    }


class Adapters(NamedTuple):
    """A folder of PEFT's."""

    rank: int
    alpha: float
    dropout: float
    factors: dict[str, dict[str, np.ndarray]]
    """Module of theirs -> `lora_a` and `lora_b`, as views of the file."""


def read_adapters(path: pathlib.Path) -> Adapters:
    """The adapters of a folder of PEFT's.

    Raises:
        UserError: it is none, or of a kind that ours cannot be.
    """
    where = path / CONFIG
    values = read_json(where)
    require(
        isinstance(values, dict) and values.get("peft_type") == "LORA",
        f"{where} must be of peft_type LORA, got {shown(values.get('peft_type') if isinstance(values, dict) else values)}.",
    )
    for name, allowed in _ONLY.items():
        require(
            name not in values or values[name] in allowed,
            f"{where}: {name} must be {allowed[0]} for adapters of this library, got {shown(values[name])}.",
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
    for name, tensor in stored.items():
        match = _NAME.fullmatch(name)
        require(match is not None, f"{path / WEIGHTS} must hold factors of LoRA, it has {name!r:.80}.")
        assert match is not None
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
    return Adapters(rank, float(alpha), float(dropout), factors)
