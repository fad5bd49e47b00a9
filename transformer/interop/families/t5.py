"""T5 1.0 and 1.1 (Raffel et al. 2020; Shazeer 2020) and Flan-T5 (Chung et al. 2022)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformer.interop.families import parts
from transformer.interop.family import FAMILIES, Keys, ModelFamily
from transformer.interop.table import Rule
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.t5 import T5Positions
from transformer.validation import require, shown

_HEAD, _SHARED = "lm_head.weight", "shared.weight"


@FAMILIES.register
@dataclasses.dataclass(frozen=True)
class T5(ModelFamily):
    """Encoder-decoders with a bias per distance bucket, and unscaled products of queries and keys."""

    kind = "t5"
    architectures: ClassVar[Mapping[str, str]] = {
        "T5ForConditionalGeneration": "seq2seq",
        "T5WithLMHeadModel": "seq2seq",
    }
    prefix = ""
    ignored = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "is_decoder": False,
    }

    def read(self, keys: Keys, architecture: str) -> ModelConfig:
        """Read the model from a config.json."""
        keys.only("is_encoder_decoder", True)
        keys.only("is_decoder", False)
        keys.ignore("dropout_rate", "initializer_factor", "output_past", "n_positions")
        num_layers = keys.num_layers("num_layers")
        other = num_layers if keys.optional("num_decoder_layers") is None else keys.num_layers("num_decoder_layers")
        # In older files, tied embeddings indicate version 1.0, which scales; newer files have a key for it.
        tied, scaled = keys.get("tie_word_embeddings", bool), keys.optional("scale_decoder_outputs")
        scaled = tied if scaled is None else keys.get("scale_decoder_outputs", bool)
        embed_dim = keys.get("d_model", int)
        block = BlockConfig(
            AttentionConfig(keys.get("num_heads", int), head_dim=keys.get("d_kv", int), query_scale=1.0),
            self._network(keys),
            RMSNorm(epsilon=keys.get("layer_norm_epsilon", float)),
        )
        return ModelConfig(
            vocab_size=keys.get("vocab_size", int),
            num_layers=num_layers,
            decoder_layers=0 if other == num_layers else other,
            embed_dim=embed_dim,
            pattern=(block,),
            positions=T5Positions(
                num_buckets=keys.get("relative_attention_num_buckets", int),
                max_distance=keys.get("relative_attention_max_distance", int),
            ),
            # A file with a separate output matrix uses it, whatever version of transformers wrote the config; scaling
            # applies to a tied embedding only.
            tie_embeddings=scaled or _HEAD not in keys.tensors,
            logits_scale=embed_dim**-0.5 if scaled else 1.0,
        )

    def _network(self, keys: Keys) -> FeedForwardConfig:
        name = keys.get("feed_forward_proj", str)
        gate, dash, activation = name.rpartition("-")
        known = {"relu": "relu", "gelu": "gelu_tanh" if gate else "gelu", "silu": "silu", "gelu_new": "gelu_tanh"}
        require(
            gate in ("", "gated") and (activation in known) and bool(dash) == bool(gate),
            f"{keys.where}: feed_forward_proj must be an activation of {', '.join(known)}, perhaps after gated-, got "
            f"{shown(name)}.",
        )
        keys.only("is_gated_act", None, bool(gate))
        acting = keys.optional("dense_act_fn")
        require(
            acting is None or parts.ACTIVATIONS.get(str(acting)) == known[activation],
            f"{keys.where}: dense_act_fn must agree with feed_forward_proj={name!r}, got {shown(acting)}.",
        )
        chosen: Any = known[activation]
        return FeedForwardConfig(keys.get("d_ff", int), chosen, gated=bool(gate))

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Write the config.json of a model."""
        block, positions = model.blocks[0], model.positions
        require(
            isinstance(positions, T5Positions),
            f"A model of the family {self.kind} has t5 positions, this one has {positions.kind}.",
        )
        assert isinstance(positions, T5Positions)
        network = block.feed_forward
        activation = {"gelu_tanh": "gelu" if network.gated else "gelu_new"}.get(network.activation, network.activation)
        scaled = model.logits_scale != 1
        return {
            "vocab_size": model.vocab_size,
            "d_model": model.embed_dim,
            "d_kv": block.attention.resolved_head_dim(model.embed_dim),
            "d_ff": network.resolved_hidden_dim(model.embed_dim),
            "num_layers": model.num_layers,
            "num_decoder_layers": model.decoder_layers or model.num_layers,
            "num_heads": block.attention.num_heads,
            "relative_attention_num_buckets": positions.num_buckets,
            "relative_attention_max_distance": positions.max_distance,
            "layer_norm_epsilon": block.norm.epsilon,
            "feed_forward_proj": f"gated-{activation}" if network.gated else activation,
            "is_encoder_decoder": True,
            "tie_word_embeddings": model.tie_embeddings,
            "scale_decoder_outputs": scaled,
        }

    def rules(self, model: ModelConfig, objective: str) -> Sequence[Rule]:
        """The correspondence of tensors and parameters."""
        gated, own, other = model.blocks[0].feed_forward.gated, ("SelfAttention", "attention"), "EncDecAttention"
        return [
            Rule(_SHARED, "token_embedding/embedding", parts.TABLE),
            Rule(_HEAD, "output/kernel", parts.LINEAR),
            *self._stack("encoder", gated, {"0": own}),
            *self._stack("decoder", gated, {"0": own, "1": (other, "cross_attention")}),
        ]

    def _stack(self, stack: str, gated: bool, attentions: Mapping[str, tuple[str, str]]) -> list[Rule]:
        theirs, ours = f"{stack}.block.{{layer}}.layer.", f"{stack}/blocks/block_{{layer}}/"
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules = [
            Rule(first, f"{stack}/relative_bias/embedding", parts.TABLE),
            *parts.norm(f"{stack}.final_layer_norm", f"{stack}/final_norm"),
        ]
        for number, (name, role) in attentions.items():
            rules += parts.norm(f"{theirs}{number}.layer_norm", f"{ours}pre_{role}_norm")
            heads = {"query": "q", "key": "k", "value": "v"}
            rules += parts.projections(f"{theirs}{number}.{name}.", f"{ours}{role}/", heads, out="o")
        last = f"{theirs}{len(attentions)}."
        rules += parts.norm(f"{last}layer_norm", f"{ours}pre_feed_forward_norm")
        names = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
        for name, role in names.items():
            rules += parts.linear(f"{last}DenseReluDense.{name}", f"{ours}feed_forward/{role}")
        return rules

    def copies(self, model: ModelConfig) -> Mapping[str, str]:
        """Both stacks share one embedding, which is also the tied output projection."""
        names = {f"{stack}.embed_tokens.weight": _SHARED for stack in ("encoder", "decoder")}
        return names | ({_HEAD: _SHARED} if model.tie_embeddings else {})
