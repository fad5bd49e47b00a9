"""Tiny random models of every family, as transformers makes and saves them, and what both compute."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from transformer import Encoder

torch.set_num_threads(1)
VOCABULARY = 101
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-6}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_BERT: dict[str, Any] = {**_SIZES, "intermediate_size": 48}


class Case(NamedTuple):
    """A family, or a variant of one."""

    model: str
    """The class of transformers."""
    config: str
    settings: dict[str, Any]
    untied: bool = False
    """Whether its output has a matrix of its own, whatever its class does."""

    def build(self, **changes: Any) -> Any:
        """The model with random weights, norms and biases moved from where they start."""
        settings = {**self.settings, **changes}
        config = getattr(transformers, self.config)(**settings, attn_implementation="eager")
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(config)
        if self.untied:  # as the published files are, which transformers ties only where one of the two is missing
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return perturbed(model)


def perturbed(model: Any) -> Any:
    """A model none of whose parameters is where it starts: no zero, no one, and logits of some size."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif any(part in name for part in ("embed", "wte", "wpe", "shared", "relative_attention_bias")):
                parameter.copy_(noise)
            else:
                # T5 does not scale products of queries and keys, its queries are small.
                size = 0.5 if name.endswith(".q.weight") else 1.5
                parameter.copy_(size * noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **settings}}


DECODERS: dict[str, Case] = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "llama": Case("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": False}),
    "llama, tied, biases": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama, linear": Case("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, **_rope("linear", factor=4.0)}),
    "llama, dynamic": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_GROUPED, "max_position_embeddings": 16, **_rope("dynamic", factor=4.0)},
    ),
    "llama, llama3": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **_GROUPED,
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        },
    ),
    "llama, yarn": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_GROUPED, **_rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "mistral": Case("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 7}),
    "qwen2": Case("Qwen2ForCausalLM", "Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2, windows": Case(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 9, "sliding_window": 6},
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_GROUPED, "num_hidden_layers": 8, "head_dim": 16, "query_pre_attn_scalar": 9, "sliding_window": 6},
    ),
    "mixtral": Case("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_GROUPED,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "olmo2": Case("Olmo2ForCausalLM", "Olmo2Config", dict(_GROUPED)),
    "gpt_neox": Case(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_SIZES, "intermediate_size": 48, "num_attention_heads": 2},
    ),
    "gpt_neox, in turn": Case(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_SIZES, "intermediate_size": 48, "num_attention_heads": 2, "use_parallel_residual": False},
    ),
    "phi3": Case("Phi3ForCausalLM", "Phi3Config", {**_GROUPED, "sliding_window": 7}),
    "phi3, longrope": Case(
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            **_GROUPED,
            "original_max_position_embeddings": 16,
            **_rope(
                "longrope",
                short_factor=[1.0, 1.1, 1.2, 1.3],
                long_factor=[1.0, 1.5, 2.5, 4.0],
                original_max_position_embeddings=16,
            ),
        },
    ),
    "smollm3": Case("SmolLM3ForCausalLM", "SmolLM3Config", dict(_GROUPED)),
}

ENCODERS: dict[str, Case] = {
    "bert": Case("BertForMaskedLM", "BertConfig", dict(_BERT)),
    "roberta": Case("RobertaForMaskedLM", "RobertaConfig", {**_BERT, "pad_token_id": 1, "eos_token_id": 2}),
    "modernbert": Case(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**_BERT, "num_hidden_layers": 6, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 1},
    ),
}

TRANSLATORS: dict[str, Case] = {
    "t5": Case("T5ForConditionalGeneration", "T5Config", dict(_T5)),
    "t5, 1.1": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "t5, 1.1, untied": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        untied=True,
    ),
}

CLASSIFIERS: dict[str, Case] = {
    "bert": Case("BertForSequenceClassification", "BertConfig", {**_BERT, "num_labels": 3}),
    "roberta": Case(
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**_BERT, "pad_token_id": 1, "eos_token_id": 2, "num_labels": 3},
    ),
}

BARE: dict[str, Case] = {
    "bert": Case("BertModel", "BertConfig", dict(_BERT)),
    "roberta": Case("RobertaModel", "RobertaConfig", {**_BERT, "pad_token_id": 1, "eos_token_id": 2}),
    "modernbert": Case("ModernBertModel", "ModernBertConfig", dict(ENCODERS["modernbert"].settings)),
}

TOLERANCE = 2e-5
"""The largest difference of logits, in the largest logit."""
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (2, 24)).astype(np.int32)
MODELS = {**DECODERS, **{f"{name}, masked": case for name, case in ENCODERS.items()}, **TRANSLATORS}
ALL = {
    **MODELS,
    **{f"{name}, classes": case for name, case in CLASSIFIERS.items()},
    **{f"{name}, bare": case for name, case in BARE.items()},
}
GREEDY = {**DECODERS, **TRANSLATORS}


def theirs(model, tokens, **more):
    with torch.no_grad():
        ids = torch.tensor(tokens).long()
        if model.config.is_encoder_decoder:
            return model(input_ids=ids, decoder_input_ids=ids[:, :9]).logits.float().numpy()
        out = model(input_ids=ids, **more)
        return (out.logits if hasattr(out, "logits") else out.last_hidden_state).float().numpy()


def ours(run, tokens, config=None, params=None, **more):
    """What the model of a run computes; as the model of another config, if one is given."""
    kind = run.config.objective.kind
    model = Encoder(run.config.model) if kind == "embedding" else run.model
    model = model if config is None else model.clone(config=config)
    tokens = jnp.asarray(tokens)
    inputs = (tokens, tokens[:, :9]) if kind == "seq2seq" else (tokens,)
    method = "logits" if kind == "masked_lm" else "__call__"
    apply = jax.jit(lambda params: model.apply({"params": params}, *inputs, method=method, **more))
    return np.asarray(apply(run.params if params is None else params), np.float32)


def difference(one, other):
    return float(np.abs(one - other).max() / np.abs(other).max())
