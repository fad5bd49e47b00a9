"""Gemma 2 and 3 (Gemma Team 2024, 2025), text only."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from transformer.interop.families import parts
from transformer.interop.families.llama import Llama
from transformer.interop.families.parts import FULL, SLIDING
from transformer.interop.family import FAMILIES, Keys, repeated
from transformer.interop.table import Rule
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import Positions
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.inherit import InheritPositions
from transformer.ops.positions.rotary import RotaryPositions
from transformer.validation import require, shown


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Gemma2(Llama):
    """Norms around each sub-layer with weights from zero, scaled embeddings, soft caps, a window in every second layer."""

    kind = "gemma2"
    architectures: ClassVar[Mapping[str, str]] = {"Gemma2ForCausalLM": "next_token"}
    own_keys = ("attention_bias",)
    settings: ClassVar[Mapping[str, Any]] = {}
    period: ClassVar[int] = 2
    """Period of the layers without a window, if the file does not list them."""
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_theta": 10_000.0,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    }

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """Read the model from a config.json."""
        keys.only("use_bidirectional_attention", None, False)
        keys.ignore("cache_implementation", "hidden_act", "_sliding_window_pattern")
        num_layers, max_length = keys.num_layers("num_hidden_layers"), keys.get("max_position_embeddings", int)
        positions, local = self._positions(keys, max_length)
        attention = AttentionConfig(
            **parts.heads(keys),
            **self.settings,
            use_bias=keys.get("attention_bias", bool),
            query_scale=keys.get("query_pre_attn_scalar", float) ** -0.5,
            logits_soft_cap=_cap(keys, "attn_logit_softcapping"),
        )
        network = FeedForwardConfig(
            keys.get("intermediate_size", int), parts.activation(keys, "hidden_activation"), gated=True
        )
        norm = RMSNorm(epsilon=keys.get("rms_norm_eps", float), placement="sandwich", unit_offset=True)
        windows = self._windows(keys, num_layers)
        blocks = [
            BlockConfig(
                dataclasses.replace(attention, window=window),
                network,
                norm,
                own_positions=local if window else InheritPositions(),
            )
            for window in windows
        ]
        return ModelConfig(
            vocab_size=keys.get("vocab_size", int),
            max_length=max_length,
            embed_dim=keys.get("hidden_size", int),
            positions=positions,
            tie_embeddings=keys.get("tie_word_embeddings", bool),
            scale_embeddings=True,
            logits_soft_cap=_cap(keys, "final_logit_softcapping"),
            **repeated(blocks),
        )

    def _positions(self, keys: Keys, max_length: int) -> tuple[RotaryPositions, Positions]:
        """The positions of the model, and of the layers with a window."""
        return parts.rotary(keys, parts.rope_parameters(keys), max_length), InheritPositions()

    def _windows(self, keys: Keys, num_layers: int) -> list[int]:
        window = keys.optional("sliding_window")
        period = self.period
        if keys.optional("sliding_window_pattern") is not None:
            period = keys.get("sliding_window_pattern", int)
        usual = [SLIDING if (layer + 1) % period else FULL for layer in range(num_layers)]
        types = keys.each_layer("layer_types", (SLIDING, FULL), usual)
        require(
            SLIDING not in types or (type(window) is int and window > 0),
            f"{keys.where}: sliding_window must be a positive number, got {shown(window)}.",
        )
        return [window if name == SLIDING else 0 for name in types]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        values, attention = super().write(model), model.blocks[0].attention
        values["hidden_activation"] = values.pop("hidden_act")
        windows = [block.attention.window for block in model.blocks]
        return values | {
            "attention_bias": attention.use_bias,
            "query_pre_attn_scalar": _scalar(attention.query_scale, attention.resolved_head_dim(model.embed_dim)),
            "attn_logit_softcapping": attention.logits_soft_cap or None,
            "final_logit_softcapping": model.logits_soft_cap or None,
            "sliding_window": max(windows) or None,
            "layer_types": [SLIDING if window else FULL for window in windows],
        }

    def _norms(self, theirs: str, ours: str) -> list[Rule]:
        return [
            *parts.norm(f"{theirs}input_layernorm", f"{ours}pre_attention_norm"),
            *parts.norm(f"{theirs}post_attention_layernorm", f"{ours}post_attention_norm"),
            *parts.norm(f"{theirs}pre_feedforward_layernorm", f"{ours}pre_feed_forward_norm"),
            *parts.norm(f"{theirs}post_feedforward_layernorm", f"{ours}post_feed_forward_norm"),
        ]


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Gemma3(Gemma2):
    """Five layers with a window and their own rotary base, then one without; queries and keys are normalized."""

    kind = "gemma3_text"
    architectures: ClassVar[Mapping[str, str]] = {"Gemma3ForCausalLM": "next_token"}
    settings: ClassVar[Mapping[str, Any]] = {"qk_norm": True}
    period = 6
    defaults: ClassVar[Mapping[str, Any]] = {
        **Gemma2.defaults,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    }

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """Read the model from a config.json."""
        keys.only("attn_logit_softcapping", None)  # transformers reads it but does not apply it
        return super().read(keys, architecture)

    def _positions(self, keys: Keys, max_length: int) -> tuple[RotaryPositions, Positions]:
        return parts.two_rotaries(keys, "rope_theta", "rope_local_base_freq", max_length)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        return super().write(model) | parts.written_two(model, "rope_theta", "rope_local_base_freq")


def _cap(keys: Keys, name: str) -> float:
    return 0.0 if keys.optional(name) is None else keys.get(name, float)


def _scalar(scale: float, head_dim: int) -> float | int:
    """The config.json value of a scale: the number whose inverse root is the scale."""
    scalar = scale**-2 if scale else head_dim
    return round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar
