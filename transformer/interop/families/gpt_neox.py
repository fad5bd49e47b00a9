"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformer.interop.families import parts
from transformer.interop.family import FAMILIES, Keys, ModelFamily
from transformer.interop.table import Rule
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.positions.rotary import RotaryPositions
from transformer.validation import require


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class GPTNeoX(ModelFamily):
    """Parallel attention and feed-forward, rotary positions on a quarter of each head, query, key and value fused per head."""

    kind = "gpt_neox"
    architectures: ClassVar[Mapping[str, str]] = {"GPTNeoXForCausalLM": "next_token"}
    prefix = "gpt_neox."
    ignored = (r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rotary_emb_base": 10_000.0,
        "rotary_pct": 0.25,
        "is_decoder": False,
    }

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """Read the model from a config.json."""
        keys.only("is_decoder", False, True)
        keys.ignore("hidden_dropout")
        rope = parts.rope_parameters(keys)
        theta, fraction = keys.get("rotary_emb_base", float), keys.get("rotary_pct", float)
        if rope.get("rope_theta") is None:
            rope["rope_theta"] = theta
        rope.setdefault("partial_rotary_factor", fraction)
        max_length = keys.get("max_position_embeddings", int)
        block = BlockConfig(
            AttentionConfig(keys.get("num_attention_heads", int), use_bias=keys.get("attention_bias", bool)),
            FeedForwardConfig(keys.get("intermediate_size", int), parts.activation(keys, "hidden_act"), use_bias=True),
            LayerNorm(epsilon=keys.get("layer_norm_eps", float), use_bias=True),
            parallel=keys.get("use_parallel_residual", bool),
        )
        return ModelConfig(
            vocab_size=keys.get("vocab_size", int),
            max_length=max_length,
            num_layers=keys.num_layers("num_hidden_layers"),
            embed_dim=keys.get("hidden_size", int),
            pattern=(block,),
            positions=parts.rotary(keys, rope, max_length, partial=True),
            tie_embeddings=keys.get("tie_word_embeddings", bool),
        )

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        block, positions = model.blocks[0], model.positions
        require(
            isinstance(positions, RotaryPositions),
            f"A model of the family {self.kind} has rotary positions, this one has {positions.kind}.",
        )
        assert isinstance(positions, RotaryPositions)
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.embed_dim,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": block.attention.num_heads,
            "intermediate_size": block.feed_forward.resolved_hidden_dim(model.embed_dim),
            "hidden_act": parts.activation_name(block),
            "max_position_embeddings": model.max_length,
            "layer_norm_eps": block.norm.epsilon,
            "tie_word_embeddings": model.tie_embeddings,
            "use_parallel_residual": block.parallel,
            "attention_bias": block.attention.use_bias,
            "rope_parameters": {"partial_rotary_factor": positions.fraction, **parts.written_rope(positions)},
            "rotary_emb_base": positions.theta,
            "rotary_pct": positions.fraction,
        }

    def rules(self, model: ModelConfig, objective: str) -> Sequence[Rule]:
        """The correspondence of tensors and parameters."""
        theirs, ours = "gpt_neox.layers.{layer}.", "decoder/blocks/block_{layer}/"
        roles = ("query", "key", "value")
        return [
            Rule("gpt_neox.embed_in.weight", "token_embedding/embedding", parts.TABLE),
            Rule("embed_out.weight", "output/kernel", parts.LINEAR),
            *parts.norm("gpt_neox.final_layer_norm", "decoder/final_norm"),
            *parts.norm(f"{theirs}input_layernorm", f"{ours}pre_attention_norm"),
            *parts.norm(f"{theirs}post_attention_layernorm", f"{ours}pre_feed_forward_norm"),
            Rule(
                f"{theirs}attention.query_key_value.weight",
                tuple(f"{ours}attention/{role}/kernel" for role in roles),
                "(heads part head_dim) embed -> part embed heads head_dim",
            ),
            Rule(
                f"{theirs}attention.query_key_value.bias",
                tuple(f"{ours}attention/{role}/bias" for role in roles),
                "(heads part head_dim) -> part heads head_dim",
            ),
            Rule(f"{theirs}attention.dense.weight", f"{ours}attention/out/kernel", parts.FROM_HEADS),
            Rule(f"{theirs}attention.dense.bias", f"{ours}attention/out/bias", parts.VECTOR),
            *parts.linear(f"{theirs}mlp.dense_h_to_4h", f"{ours}feed_forward/up"),
            *parts.linear(f"{theirs}mlp.dense_4h_to_h", f"{ours}feed_forward/down"),
        ]

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        """A tied output projection is the embedding."""
        return {"embed_out.weight": "gpt_neox.embed_in.weight"} if model.tie_embeddings else {}
