"""BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019), and sentence encoders based on them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformer.interop.families import parts
from transformer.interop.family import FAMILIES, Keys, ModelFamily
from transformer.interop.table import Rule
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.poolings.first import FirstPooling
from transformer.ops.positions.learned import LearnedPositions


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Bert(ModelFamily):
    """Post-norm encoders with learned positions, token types, and a norm of the embeddings."""

    kind = "bert"
    architectures: ClassVar[Mapping[str, str]] = {
        "BertForMaskedLM": "masked_lm",
        "BertModel": "embedding",
        "BertForSequenceClassification": "classification",
        "BertForPreTraining": "masked_lm",
    }
    prefix = "bert."
    heads: ClassVar[tuple[str, ...]] = ("cls.", "classifier.")
    """Prefixes of the names of head tensors."""
    offset: ClassVar[int] = 0
    """Rows of the position table before the first token's row."""
    renamed: ClassVar[Mapping[str, str]] = {
        "LayerNorm.gamma": "LayerNorm.weight",
        "LayerNorm.beta": "LayerNorm.bias",
    }
    ignored = (
        r"bert\.embeddings\.position_ids",
        r"bert\.pooler\.dense\.(weight|bias)",
        r"cls\.seq_relationship\.(weight|bias)",
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "tie_word_embeddings": True,
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    }

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """Read the model from a config.json."""
        keys.only("is_decoder", False)
        keys.only("add_cross_attention", False)
        keys.only("position_embedding_type", "absolute")
        keys.only("tie_word_embeddings", True)
        keys.ignore("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_type", "pooler_fc_size")
        keys.ignore(*(f"pooler_{name}" for name in ("num_attention_heads", "num_fc_layers", "size_per_head", "type")))
        keys.ignore("directionality", "gradient_checkpointing", "output_past")
        objective = self.architectures[architecture]
        block = BlockConfig(
            AttentionConfig(keys.get("num_attention_heads", int), use_bias=True),
            FeedForwardConfig(keys.get("intermediate_size", int), parts.activation(keys, "hidden_act"), use_bias=True),
            LayerNorm(placement="post", epsilon=keys.get("layer_norm_eps", float), use_bias=True),
        )
        if objective == "masked_lm" and self.offset:
            keys.only("hidden_act", "gelu")  # RoBERTa's head uses it, whatever the layers use
        heads: dict[str, Any] = {
            "masked_lm": {"masked_head": True, "output_bias": True},
            "classification": {"pooler": True, "pooling": FirstPooling()},
            # Unused, but kept: a classifier that starts from this model may use it.
            "embedding": {"pooler": f"{self.prefix}pooler.dense.weight" in keys.tensors},
        }[objective]
        return ModelConfig(
            vocab_size=keys.get("vocab_size", int),
            max_length=keys.get("max_position_embeddings", int) - self.offset,
            num_layers=keys.num_layers("num_hidden_layers"),
            embed_dim=keys.get("hidden_size", int),
            pattern=(block,),
            positions=LearnedPositions(offset=self.offset),
            embedding_norm=True,
            token_types=keys.get("type_vocab_size", int, least=0),
            **heads,
        )

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        block = model.blocks[0]
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.embed_dim,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": block.attention.num_heads,
            "intermediate_size": block.feed_forward.resolved_hidden_dim(model.embed_dim),
            "hidden_act": parts.activation_name(block),
            "max_position_embeddings": model.max_length + self.offset,
            "type_vocab_size": model.token_types,
            "layer_norm_eps": block.norm.epsilon,
            "tie_word_embeddings": True,
        }

    def rules(self, model: ModelConfig, objective: str) -> Sequence[Rule]:
        """The correspondence of tensors and parameters."""
        p, ours = self.prefix, "encoder/blocks/block_{layer}/"
        theirs = f"{p}encoder.layer.{{layer}}."
        return [
            Rule(f"{p}embeddings.word_embeddings.weight", "token_embedding/embedding", parts.TABLE),
            Rule(f"{p}embeddings.position_embeddings.weight", "encoder/position_embedding/embedding", parts.TABLE),
            Rule(f"{p}embeddings.token_type_embeddings.weight", "token_type_embedding/embedding", parts.TABLE),
            *parts.norm(f"{p}embeddings.LayerNorm", "encoder/embedding_norm"),
            *parts.projections(
                f"{theirs}attention.",
                f"{ours}attention/",
                {role: f"self.{role}" for role in ("query", "key", "value")},
                out="output.dense",
            ),
            *parts.norm(f"{theirs}attention.output.LayerNorm", f"{ours}post_attention_norm"),
            *parts.linear(f"{theirs}intermediate.dense", f"{ours}feed_forward/up"),
            *parts.linear(f"{theirs}output.dense", f"{ours}feed_forward/down"),
            *parts.norm(f"{theirs}output.LayerNorm", f"{ours}post_feed_forward_norm"),
            *(parts.linear(f"{p}pooler.dense", "pooler") if objective == "embedding" and model.pooler else ()),
            *self._heads(objective),
        ]

    def _heads(self, objective: str) -> list[Rule]:
        """The rules of an objective's head."""
        if objective == "classification":
            return [*parts.linear("bert.pooler.dense", "pooler"), *parts.linear("classifier", "classifier")]
        return [
            *parts.linear("cls.predictions.transform.dense", "head_dense"),
            *parts.norm("cls.predictions.transform.LayerNorm", "head_norm"),
            Rule("cls.predictions.bias", "output/bias", parts.VECTOR),
        ]

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        """The output projection is the embedding, and its bias is the head's."""
        if not model.masked_head:
            return {}
        return {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }

    def outside_prefix(self, name: str) -> bool:
        """Whether a tensor belongs to a head."""
        return name.startswith(self.heads)


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class Roberta(Bert):
    """RoBERTa: the first token uses the third row of the position table; different heads."""

    kind = "roberta"
    architectures: ClassVar[Mapping[str, str]] = {
        "RobertaForMaskedLM": "masked_lm",
        "RobertaModel": "embedding",
        "RobertaForSequenceClassification": "classification",
    }
    prefix = "roberta."
    heads = ("lm_head.", "classifier.")
    offset = 2
    defaults: ClassVar[Mapping[str, Any]] = {**Bert.defaults, "vocab_size": 50265}
    ignored = (r"roberta\.embeddings\.position_ids", r"roberta\.pooler\.dense\.(weight|bias)")

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """Read the model from a config.json."""
        keys.only("pad_token_id", 1)  # the offset of positions
        return super().read(keys, architecture)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        return super().write(model) | {"pad_token_id": 1}

    def _heads(self, objective: str) -> list[Rule]:
        if objective == "classification":
            return [*parts.linear("classifier.dense", "pooler"), *parts.linear("classifier.out_proj", "classifier")]
        return [
            *parts.linear("lm_head.dense", "head_dense"),
            *parts.norm("lm_head.layer_norm", "head_norm"),
            Rule("lm_head.bias", "output/bias", parts.VECTOR),
        ]

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        """The output projection is the embedding, and its bias is the head's."""
        if not model.masked_head:
            return {}
        return {
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        }
