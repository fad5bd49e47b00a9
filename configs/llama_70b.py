"""Llama 3.1 70B's architecture (Grattafiori et al. 2024), 70,553,706,496 parameters; `:llama2`, Llama 2 70B's, 68,976,648,192.

    python train.py configs/llama_70b.py --data.source corpus.jsonl

A row of the file is `{"text": ...}`; the tokenizer is trained on it. A batch is 1,024 rows of 8,192 tokens (4,096 for
`:llama2`), and all devices share the state (`fsdp`). On v5p-512, 256 chips with 4 rows each, a step needs 76.0 of 102.8 GB
(`transformer plan`, docs/scaling.md). None has been run.
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
    debug = {"": False, "llama2": False, "debug": True}[variant]
    llama2 = variant == "llama2"
    vocab_size, length = (32_000, 4096) if llama2 else (128_256, 8192)
    steps = 20 if debug else 100_000
    block = BlockConfig(
        AttentionConfig(num_heads=4 if debug else 64, num_kv_heads=2 if debug else 8),
        FeedForwardConfig(hidden_dim=96 if debug else 28_672, activation="silu", gated=True),
        RMSNorm(epsilon=1e-5),
    )
    return Config(
        model=ModelConfig(
            vocab_size=0 if debug else vocab_size,
            num_layers=2 if debug else 80,
            embed_dim=32 if debug else 8192,
            pattern=(block,),
            positions=RotaryPositions()
            if llama2
            else RotaryPositions(theta=500_000.0, scaling="llama3", scaling_factor=8.0, original_length=8192),
            tie_embeddings=False,
            dtype="float32" if debug else "bfloat16",
            scan_layers=True,
            remat="full",
        ),
        data=DataConfig(
            source=("python_stdlib",) if debug else ("corpus.jsonl",),
            validation_fraction=0.0005,
            tokenizer=Bytes() if debug else BytePairs(size=vocab_size),
            sequence_length=128 if debug else length,
            batch_size=8 if debug else 1024,
        ),
        objective=NextToken(loss_chunks=8),
        optimizer=AdamW(learning_rate=1.5e-4, schedule=CosineSchedule(warmup_steps=min(2000, steps)), weight_decay=0.1),
        parallel=ParallelConfig(data=1, fsdp=-1),
        training=TrainingConfig(steps=steps, eval_every=0, checkpoint_every=1000, log_every=10),
    )
