"""Llama 3.2 1B's architecture (Grattafiori et al. 2024), 1,235,814,400 parameters.

    python train.py configs/llama_1b.py --data.source corpus.jsonl

A row of the file is `{"text": ...}`; the tokenizer is trained on it. A batch is 256 rows of 8,192 tokens, and all
devices share the state. `transformer plan configs/llama_1b.py --topology v5e:4x4` estimates memory and time of a
step; none has been run.
"""

from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.bytes import Bytes
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objectives.next_token import NextToken
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.rotary import RotaryPositions
from transformer.optimizers.adamw import AdamW
from transformer.schedules.cosine import CosineSchedule


def get_config(variant: str = "") -> Config:
    debug = {"": False, "debug": True}[variant]
    steps = 20 if debug else 100_000
    block = BlockConfig(
        AttentionConfig(num_heads=4 if debug else 32, num_kv_heads=2 if debug else 8),
        FeedForwardConfig(hidden_dim=96 if debug else 8192, activation="silu", gated=True),
        RMSNorm(epsilon=1e-5),
    )
    return Config(
        model=ModelConfig(
            vocab_size=0 if debug else 128_256,
            num_layers=2 if debug else 16,
            embed_dim=32 if debug else 2048,
            pattern=(block,),
            positions=RotaryPositions(theta=500_000.0, scaling="llama3", scaling_factor=32.0, original_length=8192),
            tie_embeddings=True,
            dtype="float32" if debug else "bfloat16",
            scan_layers=True,
            remat="full",
        ),
        data=DataConfig(
            source=("python_stdlib",) if debug else ("corpus.jsonl",),
            validation_fraction=0.0005,
            tokenizer=Bytes() if debug else BytePairs(size=128_256),
            sequence_length=128 if debug else 8192,
            batch_size=8 if debug else 256,
        ),
        objective=NextToken(loss_chunks=8),
        optimizer=AdamW(learning_rate=3e-4, schedule=CosineSchedule(warmup_steps=min(2000, steps)), weight_decay=0.1),
        parallel=ParallelConfig(data=1, fsdp=-1),
        training=TrainingConfig(steps=steps, eval_every=0, checkpoint_every=1000, log_every=10),
    )
