"""The architecture of Mixtral 8x7B (Jiang et al. 2024): 46,702,792,704 parameters; a token uses 12.9 billion.

    python train.py configs/moe_8x7b.py:debug

Hardware: the full model needs a pod, and has not been trained here. Replace its data and schedule by your own. The debug variant
has the same structure with 0.4 million parameters, and takes a minute on two CPU cores.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.bytes import Bytes
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.rotary import RotaryPositions
from transformer.optimizers.adamw import AdamW
from transformer.schedules.cosine import CosineSchedule


def get_config(variant: str = "") -> Config:
    debug = {"": False, "debug": True}[variant]
    steps = 20 if debug else 100_000
    block = BlockConfig(
        AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128),
        FeedForwardConfig(hidden_dim=14_336, activation="silu", gated=True, num_experts=8, experts_per_token=2),
        RMSNorm(epsilon=1e-5),
    )
    if debug:
        block = BlockConfig(
            AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=16),
            FeedForwardConfig(hidden_dim=96, activation="silu", gated=True, num_experts=8, experts_per_token=2),
            block.norm,
        )
    return Config(
        model=ModelConfig(
            vocab_size=0 if debug else 32_000,
            num_layers=2 if debug else 32,
            embed_dim=64 if debug else 4096,
            pattern=(block,),
            positions=RotaryPositions(theta=1e6),
            tie_embeddings=False,
            dtype="float32" if debug else "bfloat16",
            scan_layers=True,
            remat="full",
        ),
        data=DataConfig(
            source=("python_stdlib",),
            tokenizer=Bytes() if debug else BytePairs(size=32_000),
            sequence_length=128 if debug else 4096,
            batch_size=8 if debug else 256,
        ),
        optimizer=AdamW(learning_rate=3e-3 if debug else 3e-4, schedule=CosineSchedule(warmup_steps=steps // 50)),
        training=TrainingConfig(steps=steps, eval_every=0, checkpoint_every=1000, log_every=10),
    )
