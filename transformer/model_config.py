"""The config of a model: attention, feed-forward network, block, model."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from transformer.model_kinds import BACKENDS, NORMS, PATTERNS, POOLINGS, POSITIONS, Norm, Pattern, Pooling, Positions
from transformer.validation import Settings, require, require_at_least, require_range

Dtype = Literal["float32", "bfloat16", "float16"]
Weights = Literal["", "bfloat16", "int8"]
"""Type of a used model's matrices in memory; empty means as they are stored."""
Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "relu_squared"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Settings):
    """Multi-head attention (Vaswani et al. 2017, section 3.2), with grouped key/value heads (Ainslie et al. 2023)."""

    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 0
    """Key/value heads, a divisor of num_heads; 0 means num_heads."""
    head_dim: int = 0
    """Width of a head; 0 means embed_dim / num_heads."""
    qk_norm: bool = False
    """RMS-normalise queries and keys (Henry et al. 2020), with the epsilon and the unit offset of the block's norm."""
    qk_norm_scope: Literal["head", "all"] = "head"
    """Scope of QK-norm: each head, or all heads of a token together (OLMo 2)."""
    query_scale: float = 0.0
    """Factor on attention logits; 0 means 1 / sqrt(head_dim)."""
    use_bias: bool = False
    """Add a bias to the four projections."""
    out_bias: bool = True
    """With use_bias: also add one to the output projection (Qwen 2: off)."""
    window: int = 0
    """Attend only to tokens at a distance below this many positions; 0 means all."""
    pattern: Pattern = dataclasses.field(default_factory=PATTERNS.default)
    """Block pattern: which blocks of tokens attend to which."""
    logits_soft_cap: float = 0.0
    """Bound attention logits by cap * tanh(logits / cap); 0 means off."""
    dropout: float = 0.0
    """Probability of dropping an attention weight in training."""
    implementation: str = "auto"
    """Attention backend: xla (the reference), blockwise (memory linear in the sequence), splash (TPU), cudnn (NVIDIA), a
    registered one, or auto (chosen by platform, length and arguments). splash and cudnn cannot read a cache: auto does."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_heads")
        require_at_least(self, 0, "num_kv_heads", "head_dim", "query_scale", "window", "logits_soft_cap")
        require_range(self, 0, 1, "dropout")
        BACKENDS.find(self.implementation)
        require(
            self.num_heads % self.kv_heads == 0,
            f"AttentionConfig.num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}.",
        )

    def unused(self) -> Mapping[str, str]:
        """Settings of QK-norm and of biases, if these are off."""
        found = {} if self.qk_norm else {"qk_norm_scope": "normalised queries and keys (qk_norm)"}
        return found if self.use_bias else found | {"out_bias": "projections with biases (use_bias)"}

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with 0 resolved."""
        return self.num_kv_heads or self.num_heads

    def resolved_head_dim(self, embed_dim: int) -> int:
        """Width of a head, with 0 resolved against `embed_dim`."""
        require(
            self.head_dim > 0 or embed_dim % self.num_heads == 0,
            f"AttentionConfig.num_heads must divide ModelConfig.embed_dim={embed_dim}, got {self.num_heads}; change one of them, "
            "or set AttentionConfig.head_dim.",
        )
        return self.head_dim or embed_dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig(Settings):
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3; gated: Shazeer 2020), or experts of this form."""

    hidden_dim: int = 0
    """Width of the hidden layer; 0 means 4 * embed_dim."""
    activation: Activation = "gelu"
    """Nonlinearity; gelu is exact, gelu_tanh its approximation, relu_squared is So et al. 2021."""
    gated: bool = False
    """Multiply by a second, linear projection: activation(gate(x)) * up(x)."""
    use_bias: bool = False
    """Add a bias to each projection."""
    num_experts: int = 0
    """Number of experts in a mixture (Shazeer et al. 2017), chosen by a router for each token; 0 means one network, no router."""
    experts_per_token: int = 2
    """Experts per token: 2 in Mixtral (Jiang et al. 2024), 1 in the Switch Transformer (Fedus et al. 2022)."""
    normalize_experts: bool = True
    """Normalise the weights of a token's experts to sum to one (Mixtral); off: softmax over all experts, unchanged (OLMoE)."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "hidden_dim", "num_experts")
        require_at_least(self, 1, "experts_per_token")
        require(
            self.num_experts == 0 or self.experts_per_token <= self.num_experts,
            f"FeedForwardConfig.experts_per_token must not exceed num_experts={self.num_experts}, "
            f"got {self.experts_per_token}; lower it, or set num_experts=0 for one network.",
        )
        require(
            self.num_experts == 0 or not self.use_bias,
            f"FeedForwardConfig.use_bias=True is for one network, got num_experts={self.num_experts}; leave it out.",
        )

    def resolved_hidden_dim(self, embed_dim: int) -> int:
        """Width of the hidden layer, with 0 resolved against `embed_dim`."""
        return self.hidden_dim or 4 * embed_dim


@dataclasses.dataclass(frozen=True)
class BlockConfig(Settings):
    """One transformer block: attention, feed-forward network and norms."""

    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    """Self-attention (cross-attention, in models that have it, is configured the same)."""
    feed_forward: FeedForwardConfig = FeedForwardConfig()
    """The feed-forward network, or the experts."""
    norm: Norm = dataclasses.field(default_factory=NORMS.default)
    """The normalisation of both sub-layers."""
    attention_norm: bool = True
    """Normalise the input of attention (ModernBERT's first block: off)."""
    parallel: bool = False
    """Attention and the feed-forward network both read the block's input (GPT-NeoX), instead of one after the other."""
    own_positions: Positions = dataclasses.field(default_factory=lambda: POSITIONS.find("inherit")())
    """Positions of this block's self-attention; by default the model's."""

    def __post_init__(self) -> None:
        placement = self.norm.placement
        require(
            placement == "pre" or not self.parallel,
            f"BlockConfig.parallel=True is for norm.placement=pre, got {placement}; change one of them.",
        )
        require(
            self.norm.before or self.attention_norm,
            f"BlockConfig.attention_norm=False is for norm.placement=pre or sandwich, got {placement}; leave it out.",
        )

    def unused(self) -> Mapping[str, str]:
        """Settings of norms before a sub-layer, if there are none."""
        found = {} if self.norm.before else {"attention_norm": "norms before sub-layers (norm.placement)"}
        return (
            found
            if self.norm.placement == "pre"
            else found | {"parallel": "norms before sub-layers only (norm.placement)"}
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """A transformer: a pattern of blocks, repeated."""

    vocab_size: int = 0
    """Entries of the embedding; 0 means the tokenizer's."""
    max_length: int = 0
    """Longest sequence (learned positions, cache capacity); 0 means the data's sequence_length plus memory_length."""
    num_layers: int = 4
    """Number of blocks (in each of the two stacks of an encoder-decoder): the first ones, then the repeated pattern."""
    decoder_layers: int = 0
    """Number of blocks in an encoder-decoder's decoder; 0 means num_layers."""
    embed_dim: int = 128
    """Width of the residual stream."""
    first: tuple[BlockConfig, ...] = ()
    """Blocks before the pattern begins."""
    pattern: tuple[BlockConfig, ...] = dataclasses.field(default_factory=lambda: (BlockConfig(),))
    """Blocks of one period, which is repeated; the last period may be incomplete."""
    positions: Positions = dataclasses.field(default_factory=POSITIONS.default)
    """How positions enter the model."""
    memory_length: int = 0
    """Decoder: length of the Transformer-XL memory, earlier hidden states attended to without a gradient (Dai et al. 2019)."""
    final_norm: bool = True
    """Normalise after the last block (not for post-norm blocks, whose output is already normalised)."""
    pooling: Pooling = dataclasses.field(default_factory=POOLINGS.default)
    """How a classifier reduces a text's hidden states to one vector."""
    tie_embeddings: bool = True
    """Use the embedding matrix as output projection too."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(embed_dim) (Vaswani et al. 2017, section 3.4)."""
    embedding_norm: bool = False
    """Normalise embeddings, after position vectors are added, before the first block (BERT)."""
    token_types: int = 0
    """Encoder: entries of a table of token types, added to the embeddings (BERT: 2); 0 means none."""
    masked_head: bool = False
    """Encoder: a dense layer, the feed-forward activation and a norm before the output projection (BERT)."""
    head_bias: bool = True
    """With masked_head: add a bias to its dense layer (ModernBERT: off)."""
    pooler: bool = False
    """Classifier: a dense layer and tanh on the pooled vector (BERT)."""
    output_bias: bool = False
    """Add a bias to the output logits, one number per token of the vocabulary."""
    logits_scale: float = 1.0
    """Factor on hidden states before the output projection (T5 with tied embeddings: embed_dim ** -0.5)."""
    logits_soft_cap: float = 0.0
    """Bound the output logits by cap * tanh(logits / cap); 0 means off."""
    dropout: float = 0.0
    """Probability of dropping an element of the embeddings and of each sub-layer's output in training."""
    init_std: float = 0.02
    """Standard deviation of initial weights (residual outputs: / sqrt(2 * num_layers)); 0 means 1 / sqrt(fan_in)."""
    dtype: Dtype = "float32"
    """Type of activations and matrix products; float16 training uses a loss scale."""
    param_dtype: Dtype = "float32"
    """Type of parameters."""
    scan_layers: bool = False
    """Compile one period and scan over it: compile time is independent of depth."""
    remat: Literal["none", "full", "dots", "offload"] = "none"
    """Recompute in the backward pass: nothing (none); all of each block (full); all but its matrix products (dots); or as dots,
    with the stored products moved to host memory (offload)."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "vocab_size", "max_length", "decoder_layers", "memory_length", "token_types")
        require(
            self.logits_scale != 0, "ModelConfig.logits_scale must not be 0: all logits would be the same; 1 is none."
        )
        require_at_least(self, 0, "logits_soft_cap", "init_std")
        require_at_least(self, 1, "num_layers", "embed_dim")
        require_range(self, 0, 1, "dropout")
        require(len(self.pattern) > 0, "ModelConfig.pattern must hold at least one BlockConfig, got none.")
        for name, layers in (
            ("num_layers", self.num_layers),
            ("decoder_layers", self.decoder_layers or self.num_layers),
        ):
            require(
                layers >= len(self.first) + len(self.pattern),
                f"ModelConfig.{name} must hold the {len(self.first)} first blocks and the pattern's {len(self.pattern)}, "
                f"got {layers}.",
            )
        require(
            len({block.norm.placement == "post" for block in self.block_counts}) == 1,
            "ModelConfig.pattern cannot mix post-norm blocks with others: their residual streams differ in scale.",
        )
        self.positions.check(self)
        for block in self.block_counts:
            block.own_positions.check_own(block, self.embed_dim)
        if self.memory_length > 0:
            require(
                not self.positions.absolute,
                "ModelConfig.memory_length is for decoders with relative positions, got "
                f"memory_length={self.memory_length} and {self.positions.kind} positions; "
                "set model.positions.kind=transformer_xl, or ModelConfig.memory_length=0.",
            )
            require(
                all(block.attention.pattern.sees_all for block in self.block_counts),
                "ModelConfig.memory_length needs dense attention: block patterns need positions in the document; set "
                "attention.pattern.kind=dense (a window is fine), or memory_length=0.",
            )
        for block in self.block_counts:
            block.attention.resolved_head_dim(self.embed_dim)

    def unused(self) -> Mapping[str, str]:
        """Settings of experts without experts, of single networks with experts only, and of a head that is off."""
        named = [
            *(("first", i, b) for i, b in enumerate(self.first)),
            *(("pattern", i, b) for i, b in enumerate(self.pattern)),
        ]
        mixtures = self.has_experts
        of_head = {} if self.masked_head else {"head_bias": "models with a head of their own (masked_head)"}
        return of_head | {
            f"{name}.{i}.feed_forward.{setting}": purpose
            for name, i, block in named
            for setting, purpose, here in (
                ("experts_per_token", "models with experts (num_experts)", not mixtures),
                ("normalize_experts", "models with experts (num_experts)", not mixtures),
                ("use_bias", "networks without experts", block.feed_forward.num_experts > 0),
            )
            if here
        }

    @property
    def decoder(self) -> "ModelConfig":
        """The config of an encoder-decoder's decoder, which may have another depth."""
        return dataclasses.replace(self, num_layers=self.decoder_layers or self.num_layers, decoder_layers=0)

    @property
    def has_experts(self) -> bool:
        """Whether a block has a mixture of experts."""
        return any(block.feed_forward.num_experts > 0 for block in self.block_counts)

    @property
    def num_periods(self) -> int:
        """Number of whole repetitions of the pattern."""
        return (self.num_layers - len(self.first)) // len(self.pattern)

    @property
    def remainder(self) -> tuple[BlockConfig, ...]:
        """The blocks of the last, incomplete period."""
        return self.pattern[: (self.num_layers - len(self.first)) % len(self.pattern)]

    @property
    def block_counts(self) -> dict[BlockConfig, int]:
        """The number of occurrences of each block, computed without listing the layers, of which there may be too many."""
        counts = dict.fromkeys((*self.first, *self.pattern, *self.remainder), 0)
        for blocks, times in ((self.first, 1), (self.pattern, self.num_periods), (self.remainder, 1)):
            for block in blocks:
                counts[block] += times
        return counts

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """All blocks of a stack."""
        return (*self.first, *self.pattern * self.num_periods, *self.remainder)
