"""Rules and settings shared by families: projections, norms, gated networks, rotary positions."""

from collections.abc import Mapping
from typing import Any, cast

from transformer.interop.family import Keys, typed_number
from transformer.interop.table import Rule
from transformer.model_config import Activation, AttentionConfig, BlockConfig, ModelConfig
from transformer.model_kinds import Positions
from transformer.ops.positions.rotary import RotaryPositions
from transformer.validation import require, shown

HEADS = "(heads head_dim) embed -> embed heads head_dim"
HEADS_BIAS = "(heads head_dim) -> heads head_dim"
FROM_HEADS = "embed (heads head_dim) -> heads head_dim embed"
LINEAR = "out in -> in out"
VECTOR = "axis -> axis"
TABLE = "row axis -> row axis"

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
}
"""Names in config.json; several names of one function differ in rounding only."""
_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


def activation(keys: Keys, name: str) -> Activation:
    """The activation named by a key."""
    value = keys.get(name, str)
    require(
        value in ACTIVATIONS,
        f"{keys.where}: {name} must be one of {', '.join(ACTIVATIONS)} for a model of this library, got {shown(value)}.",
    )
    return ACTIVATIONS[value]


def activation_name(block: BlockConfig) -> str:
    """The name of an activation in config.json."""
    return _NAMES[block.feed_forward.activation]


def projections(theirs: str, ours: str, names: Mapping[str, str], *, out: str) -> list[Rule]:
    """The four projections of attention, each a linear map with or without bias.

    Args:
        theirs: prefix of the tensors.
        ours: prefix of the parameters.
        names: names of the query, key and value tensors.
        out: name of the output projection's tensor.
    """
    rules = []
    for role, name in names.items():
        rules.append(Rule(f"{theirs}{name}.weight", f"{ours}{role}/kernel", HEADS))
        rules.append(Rule(f"{theirs}{name}.bias", f"{ours}{role}/bias", HEADS_BIAS))
    rules.append(Rule(f"{theirs}{out}.weight", f"{ours}out/kernel", FROM_HEADS))
    return [*rules, Rule(f"{theirs}{out}.bias", f"{ours}out/bias", VECTOR)]


def linear(theirs: str, ours: str) -> list[Rule]:
    """A linear layer of torch, with a matrix [out, in], with or without bias."""
    return [Rule(f"{theirs}.weight", f"{ours}/kernel", LINEAR), Rule(f"{theirs}.bias", f"{ours}/bias", VECTOR)]


def norm(theirs: str, ours: str) -> list[Rule]:
    """A norm, with or without bias."""
    return [Rule(f"{theirs}.weight", f"{ours}/scale", VECTOR), Rule(f"{theirs}.bias", f"{ours}/bias", VECTOR)]


# ---- Rotary positions --------------------------------------------------------------------------------------------------

_ROPE_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
        "original_max_position_embeddings",
    ),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", "original_max_position_embeddings"),
}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": _ROPE_KEYS["llama3"],
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_OURS = {
    "factor": "scaling_factor",
    "low_freq_factor": "low_factor",
    "high_freq_factor": "high_factor",
    "original_max_position_embeddings": "original_length",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}
"""Names in config.json -> fields of `RotaryPositions`; other names are equal."""


def rope_parameters(keys: Keys) -> dict[str, Any]:
    """The rotary parameters of a config.json, in the current or an older form."""
    found = keys.optional("rope_parameters")
    scaling = keys.optional("rope_scaling")
    require(
        found is None or scaling in (None, found),
        f"{keys.where}: rope_parameters and rope_scaling must agree where there are both; remove one.",
    )
    found = ({} if scaling is None else scaling) if found is None else found
    require(isinstance(found, dict), f"{keys.where}: rope_parameters must be an object, got {shown(found)}.")
    found = dict(found)
    found.setdefault("rope_theta", keys.optional("rope_theta"))
    found.setdefault("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    return found


def rotary(keys: Keys, found: Mapping[str, Any], max_length: int, *, partial: bool = False) -> RotaryPositions:
    """Rotary positions with the parameters of a config.json.

    Args:
        keys: the keys of the file, for messages.
        found: the result of `rope_parameters`.
        max_length: the longest sequence of the model, the default reference of scalings.
        partial: whether the family may rotate only a part of each head.
    """
    values = {name: value for name, value in found.items() if value is not None}
    scaling = cast(str, typed_number(values.pop("rope_type"), str, f"{keys.where}: rope_type"))
    theta = typed_number(values.pop("rope_theta", None), float, f"{keys.where}: rope_theta")
    fraction = typed_number(values.pop("partial_rotary_factor", 1.0), float, f"{keys.where}: partial_rotary_factor")
    require(
        partial or fraction == 1,
        f"{keys.where}: partial_rotary_factor must be 1 for this model_type, got {shown(fraction)}.",
    )
    if scaling == "default":
        require(not values, f"{keys.where}: rope_parameters of the type default have no {shown(list(values))}.")
        return RotaryPositions(theta=theta, fraction=fraction)
    require(
        scaling in _ROPE_KEYS,
        f"{keys.where}: rope_type must be one of default, {', '.join(_ROPE_KEYS)}, got {shown(scaling)}.",
    )
    unknown = sorted(set(values) - set(_ROPE_KEYS[scaling]))
    require(not unknown, f"{keys.where}: rope_parameters of the type {scaling} must not have {shown(unknown)}.")
    missing = [name for name in _REQUIRED[scaling] if name not in values]
    require(not missing, f"{keys.where}: rope_parameters of the type {scaling} must have {', '.join(missing)}.")
    if "original_max_position_embeddings" in _ROPE_KEYS[scaling] or scaling == "dynamic":
        values.setdefault("original_max_position_embeddings", max_length)
    settings = {_OURS.get(name, name): value for name, value in values.items()}
    return RotaryPositions(theta=theta, fraction=fraction, scaling=cast(Any, scaling), **settings)


def written_rope(positions: RotaryPositions) -> dict[str, Any]:
    """The rotary parameters of a config.json, in the form of the newest version of transformers."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": positions.theta}
    if positions.fraction != 1:
        found["partial_rotary_factor"] = positions.fraction
    if positions.scaling != "none":
        found["rope_type"] = positions.scaling
        for key in _ROPE_KEYS[positions.scaling]:
            field = str(_OURS.get(key, key))
            value = getattr(positions, field)
            if not (key == "attention_factor" and value == 0):
                found[key] = list(value) if isinstance(value, tuple) else value
    return found


def extended_length(positions: RotaryPositions, max_length: int) -> int:
    """The longest sequence: for a growing base (dynamic), config.json has the length before the extension."""
    return int(max_length * positions.scaling_factor) if positions.scaling == "dynamic" else max_length


def written_length(positions: RotaryPositions, max_length: int) -> int:
    """The inverse of `extended_length`."""
    return positions.original_length if positions.scaling == "dynamic" else max_length


def heads(keys: Keys) -> dict[str, Any]:
    """The fields of `AttentionConfig` for heads of queries, keys and values."""
    num_heads = keys.get("num_attention_heads", int)
    kv_heads = keys.optional("num_key_value_heads")
    head_dim = keys.optional("head_dim")
    for name, value in (("num_key_value_heads", kv_heads), ("head_dim", head_dim)):
        require(
            value is None or (type(value) is int and value > 0),
            f"{keys.where}: {name} must be a positive number, got {shown(value)}.",
        )
    return {"num_heads": num_heads, "num_kv_heads": kv_heads or num_heads, "head_dim": head_dim or 0}


def written_heads(attention: AttentionConfig, embed_dim: int) -> dict[str, Any]:
    """The keys of config.json for heads."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.resolved_head_dim(embed_dim),
    }


# ---- Layers with a window have their own rotary base -------------------------------------------------------------------

SLIDING, FULL = "sliding_attention", "full_attention"
"""Names of layer types in config.json."""


def two_rotaries(keys: Keys, theta: str, local_theta: str, max_length: int) -> tuple[RotaryPositions, Positions]:
    """The rotary positions of layers without a window, which are the model's, and of layers with one.

    Args:
        keys: the keys of the file.
        theta: the key of the base in files of older versions.
        local_theta: the key of the base for layers with a window, in such files.
        max_length: the longest sequence of the model.
    """
    bases = {FULL: keys.get(theta, float), SLIDING: keys.get(local_theta, float)}
    nested, scaling = keys.optional("rope_parameters"), keys.optional("rope_scaling")
    if nested is None:  # older files scale only the layers without a window
        nested = {FULL: {} if scaling is None else scaling, SLIDING: {}}
    require(
        isinstance(nested, dict) and set(nested) <= set(bases) and all(isinstance(v, dict) for v in nested.values()),
        f"{keys.where}: rope_parameters must have {FULL} and {SLIDING}, got {shown(nested)}.",
    )
    found = {}
    for name, base in bases.items():
        values = dict(nested.get(name, {}))
        kind = values.pop("type", "default")
        found[name] = rotary(keys, {"rope_type": kind, "rope_theta": base, **values}, max_length)
    return found[FULL], found[SLIDING]


def written_two(model: ModelConfig, theta: str, local_theta: str) -> dict[str, Any]:
    """The keys of a config.json for the positions of layers without and with a window, in new and old form."""
    local = next((block.own_positions for block in model.blocks if block.attention.window), model.positions)
    local = local.within(model.positions)
    require(
        isinstance(model.positions, RotaryPositions) and isinstance(local, RotaryPositions),
        f"Layers must have rotary positions, these have {model.positions.kind} and {local.kind}.",
    )
    whole, own = cast(RotaryPositions, model.positions), cast(RotaryPositions, local)
    return {
        "rope_parameters": {FULL: written_rope(whole), SLIDING: written_rope(own)},
        theta: whole.theta,
        local_theta: own.theta,
    }
