"""GPT-2 small (Radford et al. 2019), 124,439,808 parameters, on a corpus in the style of OpenWebText.

    python train.py configs/gpt2_124m.py --data.source openwebtext.jsonl

A row of the file is `{"text": ...}`. The batch is 480 rows of 1,024 tokens, in 5 micro-batches.
Hardware: a GPU or TPU, or several: rows are spread over all devices; `transformer plan` says if they fit. No run was measured.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.bytes import Bytes
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objectives.next_token import NextToken
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.positions.learned import LearnedPositions
from transformer.optimizers.adamw import AdamW
from transformer.schedules.cosine import CosineSchedule


def get_config(variant: str = "") -> Config:
    debug = {"": False, "debug": True}[variant]
    steps = 20 if debug else 100_000
    block = BlockConfig(
        AttentionConfig(num_heads=2 if debug else 12, use_bias=True),
        FeedForwardConfig(activation="gelu_tanh", use_bias=True),
        LayerNorm(use_bias=True),
    )
    return Config(
        model=ModelConfig(
            vocab_size=0 if debug else 50_257,
            max_length=128 if debug else 1024,
            num_layers=2 if debug else 12,
            embed_dim=32 if debug else 768,
            pattern=(block,),
            positions=LearnedPositions(),
            dtype="float32" if debug else "bfloat16",
            scan_layers=not debug,
            remat="none" if debug else "dots",
        ),
        data=DataConfig(
            source=("python_stdlib",) if debug else ("openwebtext.jsonl",),
            validation_fraction=0.0005,
            tokenizer=Bytes() if debug else BytePairs(size=50_257),
            sequence_length=128 if debug else 1024,
            batch_size=8 if debug else 480,
        ),
        objective=NextToken(loss_chunks=1 if debug else 8),
        optimizer=AdamW(
            learning_rate=6e-4,
            schedule=CosineSchedule(warmup_steps=min(2000, steps)),
            weight_decay=0.1,
            accumulate_steps=1 if debug else 5,
        ),
        training=TrainingConfig(steps=steps, eval_every=0 if debug else 1000, checkpoint_every=1000, log_every=10),
    )
