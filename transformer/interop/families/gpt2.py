"""GPT-2 (Radford et al. 2019)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformer.interop.families.parts import TABLE, VECTOR, activation, activation_name, norm
from transformer.interop.family import FAMILIES, Keys, ModelFamily
from transformer.interop.table import Rule
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.positions.learned import LearnedPositions

_KEPT = "in out -> in out"  # GPT-2 stores matrices as [in, out]


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class GPT2(ModelFamily):
    """Decoders with learned positions, pre-norm, and a fused matrix of query, key and value."""

    kind = "gpt2"
    architectures: ClassVar[Mapping[str, str]] = {"GPT2LMHeadModel": "next_token", "GPT2Model": "next_token"}
    prefix = "transformer."
    ignored = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """Read the model from a config.json."""
        keys.only("scale_attn_weights", True)
        keys.only("scale_attn_by_inverse_layer_idx", False)
        keys.only("add_cross_attention", False)
        keys.only("tie_word_embeddings", True)
        keys.ignore("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn")
        keys.ignore(
            *(f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"))
        )
        embed_dim = keys.get("n_embd", int)
        hidden_dim = keys.optional("n_inner")
        epsilon = keys.get("layer_norm_epsilon", float)
        block = BlockConfig(
            AttentionConfig(keys.get("n_head", int), use_bias=True),
            FeedForwardConfig(
                4 * embed_dim if hidden_dim is None else keys.get("n_inner", int),
                activation(keys, "activation_function"),
                use_bias=True,
            ),
            LayerNorm(epsilon=epsilon, use_bias=True),
        )
        return ModelConfig(
            vocab_size=keys.get("vocab_size", int),
            max_length=keys.get("n_positions", int),
            num_layers=keys.num_layers("n_layer"),
            embed_dim=embed_dim,
            pattern=(block,),
            positions=LearnedPositions(),
        )

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        block = model.blocks[0]
        return {
            "vocab_size": model.vocab_size,
            "n_positions": model.max_length,
            "n_embd": model.embed_dim,
            "n_layer": model.num_layers,
            "n_head": block.attention.num_heads,
            "n_inner": block.feed_forward.resolved_hidden_dim(model.embed_dim),
            "activation_function": activation_name(block),
            "layer_norm_epsilon": block.norm.epsilon,
            "tie_word_embeddings": True,
        }

    def rules(self, model: ModelConfig, objective: str) -> Sequence[Rule]:
        """The correspondence of tensors and parameters."""
        theirs, ours = "transformer.h.{layer}.", "decoder/blocks/block_{layer}/"
        fused = tuple(f"{ours}attention/{role}" for role in ("query", "key", "value"))
        return [
            Rule("transformer.wte.weight", "token_embedding/embedding", TABLE),
            Rule("transformer.wpe.weight", "decoder/position_embedding/embedding", TABLE),
            *norm(f"{theirs}ln_1", f"{ours}pre_attention_norm"),
            Rule(
                f"{theirs}attn.c_attn.weight",
                tuple(f"{name}/kernel" for name in fused),
                "in (part heads head_dim) -> part in heads head_dim",
            ),
            Rule(
                f"{theirs}attn.c_attn.bias",
                tuple(f"{name}/bias" for name in fused),
                "(part heads head_dim) -> part heads head_dim",
            ),
            Rule(
                f"{theirs}attn.c_proj.weight",
                f"{ours}attention/out/kernel",
                "(heads head_dim) out -> heads head_dim out",
            ),
            Rule(f"{theirs}attn.c_proj.bias", f"{ours}attention/out/bias", VECTOR),
            *norm(f"{theirs}ln_2", f"{ours}pre_feed_forward_norm"),
            *(
                rule
                for name, role in (("c_fc", "up"), ("c_proj", "down"))
                for rule in (
                    Rule(f"{theirs}mlp.{name}.weight", f"{ours}feed_forward/{role}/kernel", _KEPT),
                    Rule(f"{theirs}mlp.{name}.bias", f"{ours}feed_forward/{role}/bias", VECTOR),
                )
            ),
            *norm("transformer.ln_f", "decoder/final_norm"),
        ]

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        """The output projection is the embedding."""
        return {"lm_head.weight": "transformer.wte.weight"}
