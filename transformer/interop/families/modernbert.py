"""ModernBERT (Warner et al. 2024)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformer.interop.families import parts
from transformer.interop.families.parts import FULL, SLIDING
from transformer.interop.family import FAMILIES, Keys, ModelFamily, repeated
from transformer.interop.table import Rule
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.positions.inherit import InheritPositions


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class ModernBert(ModelFamily):
    """Pre-norm encoders with rotary positions, gated networks, and a window in two of three layers."""

    kind = "modernbert"
    architectures: ClassVar[Mapping[str, str]] = {
        "ModernBertForMaskedLM": "masked_lm",
        "ModernBertModel": "embedding",
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
        "tie_word_embeddings": True,
    }

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """Read the model from a config.json."""
        keys.only("tie_word_embeddings", True)
        keys.ignore("initializer_cutoff_factor", "embedding_dropout", "mlp_dropout", "classifier_pooling")
        keys.ignore("deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "reference_compile")
        keys.ignore("repad_logits_with_grad", "position_embedding_type", "layer_norm_eps")
        num_layers, max_length = keys.num_layers("num_hidden_layers"), keys.get("max_position_embeddings", int)
        positions, local = parts.two_rotaries(keys, "global_rope_theta", "local_rope_theta", max_length)
        masked = self.architectures[architecture] == "masked_lm"
        acting = parts.activation(keys, "hidden_activation")
        if masked:
            keys.only("classifier_activation", keys.get("hidden_activation", str))
        else:
            keys.ignore("classifier_activation", "classifier_bias", "decoder_bias")
        norm = LayerNorm(epsilon=keys.get("norm_eps", float), use_bias=keys.get("norm_bias", bool))
        block = BlockConfig(
            AttentionConfig(keys.get("num_attention_heads", int), use_bias=keys.get("attention_bias", bool)),
            FeedForwardConfig(
                keys.get("intermediate_size", int),
                acting,
                gated=True,
                use_bias=keys.get("mlp_bias", bool),
            ),
            norm,
        )
        blocks = [
            dataclasses.replace(
                block,
                attention=dataclasses.replace(block.attention, window=window),
                own_positions=local if window else InheritPositions(),
                attention_norm=layer > 0,
            )
            for layer, window in enumerate(self._windows(keys, num_layers))
        ]
        head: dict[str, Any] = {}
        if masked:
            head = {"masked_head": True, "head_bias": keys.get("classifier_bias", bool)}
            head["output_bias"] = keys.get("decoder_bias", bool)
        return ModelConfig(
            vocab_size=keys.get("vocab_size", int),
            max_length=max_length,
            embed_dim=keys.get("hidden_size", int),
            positions=positions,
            embedding_norm=True,
            **head,
            **repeated(blocks, num_first=1),
        )

    def _windows(self, keys: Keys, num_layers: int) -> list[int]:
        """The window of a layer: visible tokens on either side, plus one for the token itself; 0 means all."""
        local, period = keys.get("local_attention", int), keys.get("global_attn_every_n_layers", int)
        usual = [SLIDING if layer % period else FULL for layer in range(num_layers)]
        types = keys.each_layer("layer_types", (SLIDING, FULL), usual)
        return [local // 2 + 1 if name == SLIDING else 0 for name in types]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        block = model.blocks[0]
        windows = [block.attention.window for block in model.blocks]
        norm: Any = block.norm
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.embed_dim,
            "intermediate_size": block.feed_forward.resolved_hidden_dim(model.embed_dim),
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": block.attention.num_heads,
            "hidden_activation": parts.activation_name(block),
            "classifier_activation": parts.activation_name(block),
            "max_position_embeddings": model.max_length,
            "norm_eps": norm.epsilon,
            "norm_bias": norm.use_bias,
            "attention_bias": block.attention.use_bias,
            "mlp_bias": block.feed_forward.use_bias,
            "classifier_bias": model.head_bias if model.masked_head else False,
            "decoder_bias": model.output_bias,
            "local_attention": 2 * (max(windows) - 1) if max(windows) else 128,
            "layer_types": [SLIDING if window else FULL for window in windows],
            "tie_word_embeddings": True,
            **parts.written_two(model, "global_rope_theta", "local_rope_theta"),
        }

    def rules(self, model: ModelConfig, objective: str) -> Sequence[Rule]:
        """The correspondence of tensors and parameters."""
        theirs, ours = "model.layers.{layer}.", "encoder/blocks/block_{layer}/"
        fused = tuple(f"{ours}attention/{role}" for role in ("query", "key", "value"))
        networks = tuple(f"{ours}feed_forward/{role}" for role in ("gate", "up"))
        return [
            Rule("model.embeddings.tok_embeddings.weight", "token_embedding/embedding", parts.TABLE),
            *parts.norm("model.embeddings.norm", "encoder/embedding_norm"),
            *parts.norm("model.final_norm", "encoder/final_norm"),
            *parts.norm(f"{theirs}attn_norm", f"{ours}pre_attention_norm"),
            *parts.norm(f"{theirs}mlp_norm", f"{ours}pre_feed_forward_norm"),
            Rule(
                f"{theirs}attn.Wqkv.weight",
                tuple(f"{name}/kernel" for name in fused),
                "(part heads head_dim) embed -> part embed heads head_dim",
            ),
            Rule(
                f"{theirs}attn.Wqkv.bias",
                tuple(f"{name}/bias" for name in fused),
                "(part heads head_dim) -> part heads head_dim",
            ),
            Rule(f"{theirs}attn.Wo.weight", f"{ours}attention/out/kernel", parts.FROM_HEADS),
            Rule(f"{theirs}attn.Wo.bias", f"{ours}attention/out/bias", parts.VECTOR),
            Rule(f"{theirs}mlp.Wi.weight", tuple(f"{n}/kernel" for n in networks), "(part out) in -> part in out"),
            Rule(f"{theirs}mlp.Wi.bias", tuple(f"{n}/bias" for n in networks), "(part out) -> part out"),
            *parts.linear(f"{theirs}mlp.Wo", f"{ours}feed_forward/down"),
            *parts.linear("head.dense", "head_dense"),
            *parts.norm("head.norm", "head_norm"),
            Rule("decoder.bias", "output/bias", parts.VECTOR),
        ]

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        """The output projection is the embedding."""
        return {"decoder.weight": "model.embeddings.tok_embeddings.weight"} if model.masked_head else {}

    def outside_prefix(self, name: str) -> bool:
        """Whether a tensor belongs to a head."""
        return name.startswith(("head.", "decoder."))
