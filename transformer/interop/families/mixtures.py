"""Mixtures of experts with the architecture of Llama: Mixtral and Qwen 3."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from transformer.interop.families import parts
from transformer.interop.families.llama import Mistral, Qwen3
from transformer.interop.family import FAMILIES, Keys
from transformer.interop.table import Rule
from transformer.model_config import FeedForwardConfig, ModelConfig


def _expert_rules(theirs: str, ours: str, names: Mapping[str, str], router: str) -> list[Rule]:
    return [
        Rule(f"{theirs}{router}.weight", f"{ours}router/kernel", parts.LINEAR),
        *(
            Rule(f"{theirs}experts.{{expert}}.{name}.weight", f"{ours}{role}/kernel", parts.LINEAR)
            for role, name in names.items()
        ),
    ]


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Mixtral(Mistral):
    """Mixtral (Jiang et al. 2024): experts in every layer, with weights that sum to one."""

    kind = "mixtral"
    architectures: ClassVar[Mapping[str, str]] = {"MixtralForCausalLM": "next_token"}
    defaults: ClassVar[Mapping[str, Any]] = {
        **Mistral.defaults,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }

    def _feed_forward(self, keys: Keys, layer: int) -> FeedForwardConfig:
        keys.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
        return dataclasses.replace(
            super()._feed_forward(keys, layer),
            num_experts=keys.get("num_local_experts", int),
            # For a single expert, transformers sets the weight to 1; here it stays the probability, which has a gradient.
            experts_per_token=keys.get("num_experts_per_tok", int, least=2),
        )

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        network = model.blocks[0].feed_forward
        own = {"num_local_experts": network.num_experts, "num_experts_per_tok": network.experts_per_token}
        return super().write(model) | own

    def _networks(self, theirs: str, ours: str) -> list[Rule]:
        theirs = theirs.replace("mlp.", "block_sparse_moe.")
        return _expert_rules(theirs, ours, {"gate": "w1", "up": "w3", "down": "w2"}, "gate")


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Qwen3Moe(Qwen3):
    """Qwen 3 with experts in all or some layers."""

    kind = "qwen3_moe"
    architectures: ClassVar[Mapping[str, str]] = {"Qwen3MoeForCausalLM": "next_token"}
    separate_layers = False
    own_keys = ("attention_bias", "sliding_window")
    defaults: ClassVar[Mapping[str, Any]] = {
        **Qwen3.defaults,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "head_dim": None,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
    }

    def _windows(self, keys: Keys, num_layers: int) -> list[int]:
        keys.ignore("max_window_layers")
        if not keys.optional("use_sliding_window"):
            keys.ignore("sliding_window")
            return [0] * num_layers
        return super()._windows(keys, num_layers)

    def _feed_forward(self, keys: Keys, layer: int) -> FeedForwardConfig:
        keys.ignore("output_router_logits", "router_aux_loss_coef")
        dense = super()._feed_forward(keys, layer)
        count = keys.optional("num_local_experts")
        count = keys.get("num_experts" if count is None else "num_local_experts", int, least=0)
        step, plain = keys.get("decoder_sparse_step", int), keys.get("mlp_only_layers", list)
        normalize = keys.get("norm_topk_prob", bool)  # for a single expert, see Mixtral
        mixture = dataclasses.replace(
            dense,
            hidden_dim=keys.get("moe_intermediate_size", int),
            num_experts=count,
            experts_per_token=keys.get("num_experts_per_tok", int, least=2 if normalize else 1),
            normalize_experts=normalize,
        )
        return mixture if layer not in plain and count > 0 and (layer + 1) % step == 0 else dense

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        networks = [block.feed_forward for block in model.blocks]
        mixture = next((network for network in networks if network.num_experts), networks[0])
        dense = next((network for network in networks if not network.num_experts), mixture)
        windows = [block.attention.window for block in model.blocks]
        return {
            **super().write(model),
            "intermediate_size": dense.resolved_hidden_dim(model.embed_dim),
            "moe_intermediate_size": mixture.resolved_hidden_dim(model.embed_dim),
            "num_experts": mixture.num_experts,
            "num_experts_per_tok": mixture.experts_per_token,
            "norm_topk_prob": mixture.normalize_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, network in enumerate(networks) if not network.num_experts],
            "use_sliding_window": max(windows) > 0,
        }

    def _networks(self, theirs: str, ours: str) -> list[Rule]:
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        return [*super()._networks(theirs, ours), *_expert_rules(theirs, ours, names, "gate")]
