"""Decoders with one setting, the depth: `gpt.py:d12` has 12 layers; width, heads, batch, learning rate and steps follow.

    python train.py configs/gpt.py:d2
    transformer train gpt:d12 --data.source corpus.jsonl
    transformer train gpt:d12x40 --data.source corpus.jsonl
    transformer plan gpt:d12 --topology v6e:2x4

`x40` is the budget: 40 tokens for each parameter; the default is 20 (Hoffmann et al. 2022). docs/ladder.md has the reasons for
the rule, and measurements:

    width          64 x depth, in heads of 64               d12 has GPT-2's 768 and 12
    parameters     12 x depth x width^2 = 49,152 x depth^3  the matrices of blocks, without embeddings
    tokens         20 x parameters                          one million x depth^3
    batch, tokens  sqrt(32 x tokens), to a power of two     d1 4,096, d12 262,144
    steps          tokens / batch                           a twentieth of them is the warm-up
    learning rate  0.04 / depth, that is 2.56 / width, of Muon; it falls to 0 in a straight line

A model of fewer than 8 layers is for CPUs: it reads rows of 512 bytes, by default of Python's standard library. Other models
read rows of 1,024 tokens with 32,768 byte pairs, compute in bfloat16, and need a corpus. A flag overrides one setting; the others
do not follow it.

Hardware: d1 and d2 take minutes on two CPU cores; d12 needs one GPU or a small TPU slice. docs/ladder.md has the expected losses.
"""

import math
import re

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.bytes import Bytes
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.optimizers.muon import Muon
from transformer.schedules.linear import LinearSchedule
from transformer.validation import require

DEEPEST = 96  # GPT-3's depth; the rule is unknown beyond


def get_config(variant: str = "d12") -> Config:
    depth, ratio = parse_variant({"": "d12", "debug": "d1x0.5"}.get(variant, variant))
    width = 64 * depth
    tokens = ratio * 12 * depth * width**2
    large = depth >= 8
    length = 1024 if large else 512
    rows = max(1, 2 ** round(math.log2(math.sqrt(32 * tokens) / length)))
    steps = math.ceil(tokens / (rows * length))
    block = BlockConfig(AttentionConfig(num_heads=depth, qk_norm=True), FeedForwardConfig(activation="gelu"), RMSNorm())
    return Config(
        model=ModelConfig(
            vocab_size=32_768 if large else 0,
            num_layers=depth,
            embed_dim=width,
            pattern=(block,),
            dtype="bfloat16" if large else "float32",
        ),
        data=DataConfig(
            source=("corpus.jsonl",) if large else ("python_stdlib",),
            validation_fraction=0.0005 if large else 0.05,
            tokenizer=BytePairs(size=32_768) if large else Bytes(),
            sequence_length=length,
            batch_size=rows,
        ),
        optimizer=Muon(
            learning_rate=0.04 / depth,
            schedule=LinearSchedule(warmup_steps=steps // 20, final_fraction=0.0),
            weight_decay=0.0,
            b2=0.99,
        ),
        training=TrainingConfig(steps=steps, eval_every=0, checkpoint_every=200, log_every=10),
    )


def parse_variant(variant: str) -> tuple[int, float]:
    """The depth and the tokens per parameter of a variant such as `d12` or `d12x40`."""
    found = re.fullmatch(r"d(\d{1,4})(?:x(\d{1,4}(?:\.\d{1,4})?))?", variant, re.ASCII)
    depth, ratio = (int(found[1]), float(found[2] or 20)) if found else (0, 0.0)
    require(
        1 <= depth <= DEEPEST and ratio > 0,
        f"A variant of gpt must be a depth from d1 to d{DEEPEST} (d12), or a depth and a number of tokens for each "
        f"parameter (d12x40; 20 by default), got {variant!r}.",
    )
    return depth, ratio
