"""Llama (Touvron et al. 2023) and decoders with its architecture: Mistral, Qwen, Phi-3, SmolLM3, OLMo 2."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from transformer.interop.families import parts
from transformer.interop.families.parts import FULL, SLIDING
from transformer.interop.family import FAMILIES, Keys, ModelFamily, repeated
from transformer.interop.table import Rule
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import Positions
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.inherit import InheritPositions
from transformer.ops.positions.none import NoPositions
from transformer.ops.positions.rotary import RotaryPositions
from transformer.validation import require, shown

_COMMON: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Llama(ModelFamily):
    """Pre-norm decoders with rotary positions, RMSNorm, grouped heads and gated networks."""

    kind = "llama"
    architectures: ClassVar[Mapping[str, str]] = {"LlamaForCausalLM": "next_token"}
    ignored = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    defaults: ClassVar[Mapping[str, Any]] = _COMMON
    own_keys: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias")
    """Further keys of the family's config, besides the common ones, that this package understands."""
    partial: ClassVar[bool] = False
    """Whether rotary positions may rotate only a part of each head."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Fields of every block's `AttentionConfig` that follow from the family."""
    placement: ClassVar[Literal["pre", "post", "sandwich", "output"]] = "pre"
    separate_layers: ClassVar[bool] = False
    """Whether a config.json lists the layers with a window."""

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """Read the model from a config.json."""
        num_layers, max_length = keys.num_layers("num_hidden_layers"), keys.get("max_position_embeddings", int)
        positions = parts.rotary(keys, self._rope(keys), max_length, partial=self.partial)
        keys.only("rope_interleaved", None, False)
        windows = self._windows(keys, num_layers)
        norm = RMSNorm(epsilon=keys.get("rms_norm_eps", float), placement=self.placement)
        attention = AttentionConfig(**parts.heads(keys), **self._bias(keys), **self.settings)
        own = self._own_positions(keys, num_layers)
        blocks = [
            BlockConfig(
                dataclasses.replace(attention, window=windows[layer]),
                self._feed_forward(keys, layer),
                norm,
                own_positions=own[layer],
            )
            for layer in range(num_layers)
        ]
        return ModelConfig(
            vocab_size=keys.get("vocab_size", int),
            max_length=parts.extended_length(positions, max_length),
            embed_dim=keys.get("hidden_size", int),
            positions=positions,
            tie_embeddings=keys.get("tie_word_embeddings", bool),
            **repeated(blocks),
        )

    def _bias(self, keys: Keys) -> dict[str, Any]:
        return {"use_bias": keys.get("attention_bias", bool)} if "attention_bias" in self.own_keys else {}

    def _rope(self, keys: Keys) -> dict[str, Any]:
        return parts.rope_parameters(keys)

    def _feed_forward(self, keys: Keys, layer: int) -> FeedForwardConfig:
        return FeedForwardConfig(
            keys.get("intermediate_size", int),
            parts.activation(keys, "hidden_act"),
            gated=True,
            use_bias="mlp_bias" in self.own_keys and keys.get("mlp_bias", bool),
        )

    def _windows(self, keys: Keys, num_layers: int) -> list[int]:
        """The window of each layer; 0 means none."""
        if "sliding_window" not in self.own_keys:
            return [0] * num_layers
        window = keys.optional("sliding_window")
        require(
            window is None or (type(window) is int and window > 0),
            f"{keys.where}: sliding_window must be a positive number or null, got {shown(window)}.",
        )
        if not self.separate_layers:
            return [window or 0] * num_layers
        switched = keys.optional("use_sliding_window")
        first = 0
        if keys.optional("max_window_layers") is not None:
            first = keys.get("max_window_layers", int, least=0)
        usual = [SLIDING if switched and layer >= first else FULL for layer in range(num_layers)]
        types = keys.each_layer("layer_types", (SLIDING, FULL), usual)
        # As in the family's own class, a window that is switched off is ignored, whatever the layer types say.
        return [(window or 0) if name == SLIDING and switched else 0 for name in types]

    def _own_positions(self, keys: Keys, num_layers: int) -> list[Positions]:
        del keys
        return [InheritPositions()] * num_layers

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        block = model.blocks[0]
        positions = model.positions
        require(
            isinstance(positions, RotaryPositions),
            f"A model of the family {self.kind} has rotary positions, this one has {positions.kind}.",
        )
        assert isinstance(positions, RotaryPositions)
        windows = [block.attention.window for block in model.blocks]
        values = {
            "vocab_size": model.vocab_size,
            "hidden_size": model.embed_dim,
            "intermediate_size": block.feed_forward.resolved_hidden_dim(model.embed_dim),
            "num_hidden_layers": model.num_layers,
            **parts.written_heads(block.attention, model.embed_dim),
            "hidden_act": parts.activation_name(block),
            "max_position_embeddings": parts.written_length(positions, model.max_length),
            "rms_norm_eps": block.norm.epsilon,
            "tie_word_embeddings": model.tie_embeddings,
            "rope_parameters": parts.written_rope(positions),
            "rope_theta": positions.theta,
        }
        own = {
            "attention_bias": block.attention.use_bias,
            "mlp_bias": block.feed_forward.use_bias,
            "sliding_window": max(windows) or None,
            "use_sliding_window": max(windows) > 0,
            "layer_types": [SLIDING if window else FULL for window in windows],
        }
        values |= {name: own[name] for name in self.own_keys if name in own}
        return values

    def rules(self, model: ModelConfig, objective: str) -> Sequence[Rule]:
        """The correspondence of tensors and parameters."""
        theirs, ours = "model.layers.{layer}.", "decoder/blocks/block_{layer}/"
        return [
            Rule("model.embed_tokens.weight", "token_embedding/embedding", parts.TABLE),
            Rule("lm_head.weight", "output/kernel", parts.LINEAR),
            *parts.norm("model.norm", "decoder/final_norm"),
            *self._norms(theirs, ours),
            *self._attention(f"{theirs}self_attn.", f"{ours}attention/"),
            *self._networks(f"{theirs}mlp.", f"{ours}feed_forward/"),
        ]

    def _norms(self, theirs: str, ours: str) -> list[Rule]:
        return [
            *parts.norm(f"{theirs}input_layernorm", f"{ours}pre_attention_norm"),
            *parts.norm(f"{theirs}post_attention_layernorm", f"{ours}pre_feed_forward_norm"),
        ]

    def _attention(self, theirs: str, ours: str) -> list[Rule]:
        return [
            *parts.projections(theirs, ours, {"query": "q_proj", "key": "k_proj", "value": "v_proj"}, out="o_proj"),
            *parts.norm(f"{theirs}q_norm", f"{ours}query_norm"),
            *parts.norm(f"{theirs}k_norm", f"{ours}key_norm"),
        ]

    def _networks(self, theirs: str, ours: str) -> list[Rule]:
        return [
            rule
            for name, role in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down"))
            for rule in parts.linear(f"{theirs}{name}", f"{ours}{role}")
        ]

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        """A tied output projection is the embedding."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_embeddings else {}


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Mistral(Llama):
    """Mistral (Jiang et al. 2023): a window in every layer."""

    kind = "mistral"
    architectures: ClassVar[Mapping[str, str]] = {"MistralForCausalLM": "next_token"}
    own_keys = ("sliding_window",)
    defaults: ClassVar[Mapping[str, Any]] = {
        **_COMMON,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    }


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Qwen2(Llama):
    """Qwen 2 and 2.5 (Yang et al. 2024): biases of queries, keys and values; a window in the later layers."""

    kind = "qwen2"
    architectures: ClassVar[Mapping[str, str]] = {"Qwen2ForCausalLM": "next_token"}
    own_keys = ("sliding_window", "use_sliding_window", "layer_types")
    separate_layers = True
    settings: ClassVar[Mapping[str, Any]] = {"use_bias": True, "out_bias": False}
    defaults: ClassVar[Mapping[str, Any]] = {
        **_COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Qwen3(Qwen2):
    """Qwen 3 (Yang et al. 2025): queries and keys are normalized per head; no biases by default."""

    kind = "qwen3"
    architectures: ClassVar[Mapping[str, str]] = {"Qwen3ForCausalLM": "next_token"}
    own_keys = ("attention_bias", *Qwen2.own_keys)
    settings: ClassVar[Mapping[str, Any]] = {"qk_norm": True}
    defaults: ClassVar[Mapping[str, Any]] = {**Qwen2.defaults, "head_dim": 128}


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Phi3(Llama):
    """Phi-3 (Abdin et al. 2024): fused query, key and value, and fused gate and up."""

    kind = "phi3"
    architectures: ClassVar[Mapping[str, str]] = {"Phi3ForCausalLM": "next_token"}
    own_keys = ("sliding_window", "original_max_position_embeddings")
    partial = True
    defaults: ClassVar[Mapping[str, Any]] = {
        **_COMMON,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }

    def _rope(self, keys: Keys) -> dict[str, Any]:
        keys.ignore("resid_pdrop", "embd_pdrop")
        found = parts.rope_parameters(keys)
        original, longest = keys.get("original_max_position_embeddings", int), keys.get("max_position_embeddings", int)
        fraction = keys.optional("partial_rotary_factor")
        found.setdefault("partial_rotary_factor", 1.0 if fraction is None else fraction)
        if found["rope_type"] in ("su", "longrope"):
            # The two lengths determine the extension (transformers' _compute_longrope_parameters).
            found |= {"rope_type": "longrope", "original_max_position_embeddings": original}
            found["factor"] = longest / original
        return found

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        values = super().write(model)
        rope = values["rope_parameters"]
        values["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", model.max_length)
        if "partial_rotary_factor" in rope:
            values["partial_rotary_factor"] = rope["partial_rotary_factor"]
        return values

    def _attention(self, theirs: str, ours: str) -> list[Rule]:
        fused = tuple(f"{ours}{role}/kernel" for role in ("query", "key", "value"))
        return [
            Rule(f"{theirs}qkv_proj.weight", fused, parts.HEADS),
            Rule(f"{theirs}o_proj.weight", f"{ours}out/kernel", parts.FROM_HEADS),
        ]

    def _networks(self, theirs: str, ours: str) -> list[Rule]:
        return [
            Rule(f"{theirs}gate_up_proj.weight", (f"{ours}gate/kernel", f"{ours}up/kernel"), parts.LINEAR),
            *parts.linear(f"{theirs}down_proj", f"{ours}down"),
        ]


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class SmolLM3(Llama):
    """SmolLM3: no positions in every fourth layer."""

    kind = "smollm3"
    architectures: ClassVar[Mapping[str, str]] = {"SmolLM3ForCausalLM": "next_token"}
    own_keys = ("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types")
    separate_layers = True
    defaults: ClassVar[Mapping[str, Any]] = {
        **_COMMON,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    }

    def _own_positions(self, keys: Keys, num_layers: int) -> list[Positions]:
        interval = keys.get("no_rope_layer_interval", int)
        usual = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
        turned = keys.each_layer("no_rope_layers", (0, 1), usual)
        return [InheritPositions() if flag else NoPositions() for flag in turned]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        turned = [int(not isinstance(block.own_positions, NoPositions)) for block in model.blocks]
        return {**super().write(model), "no_rope_layers": turned}


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Olmo2(Llama):
    """OLMo 2 (OLMo Team 2024): norms on the outputs of sub-layers; queries and keys are normalized over all heads together."""

    kind = "olmo2"
    architectures: ClassVar[Mapping[str, str]] = {"Olmo2ForCausalLM": "next_token"}
    own_keys = ("attention_bias",)
    placement = "output"
    settings: ClassVar[Mapping[str, Any]] = {"qk_norm": True, "qk_norm_scope": "all"}
    defaults: ClassVar[Mapping[str, Any]] = {**_COMMON, "vocab_size": 50304, "rms_norm_eps": 1e-5}

    def _norms(self, theirs: str, ours: str) -> list[Rule]:
        return [
            *parts.norm(f"{theirs}post_attention_layernorm", f"{ours}post_attention_norm"),
            *parts.norm(f"{theirs}post_feedforward_layernorm", f"{ours}post_feed_forward_norm"),
        ]

    def _attention(self, theirs: str, ours: str) -> list[Rule]:
        return [
            *parts.projections(theirs, ours, {"query": "q_proj", "key": "k_proj", "value": "v_proj"}, out="o_proj"),
            Rule(f"{theirs}q_norm.weight", f"{ours}query_norm/scale", parts.HEADS_BIAS),
            Rule(f"{theirs}k_norm.weight", f"{ours}key_norm/scale", parts.HEADS_BIAS),
        ]
