"""GPT-2 small (Radford et al. 2019), 124,439,808 parameters, on a corpus in the style of OpenWebText.

    python train.py configs/gpt2_124m.py --data.source openwebtext.jsonl

A row of the file is `{"text": ...}`. The batch is 480 rows of 1,024 tokens, in 10 micro-batches.
Hardware: one GPU of 80 GB. Compiled for it, micro-batches of 48 rows take 34 GB (docs/gpu.md). `gpt2_124m.py:small` has 12 rows,
10 GB, for a GPU of 16 GB. With eight devices, which share the rows, use `--optimizer.accumulate-steps 1`. No run was measured.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.bytes import Bytes
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.positions.learned import LearnedPositions
from transformer.optimizers.adamw import AdamW
from transformer.schedules.cosine import CosineSchedule


def get_config(variant: str = "") -> Config:
    debug = {"": False, "small": False, "debug": True}[variant]
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
        ),
        data=DataConfig(
            source=("python_stdlib",) if debug else ("openwebtext.jsonl",),
            validation_fraction=0.0005,
            tokenizer=Bytes() if debug else BytePairs(size=50_257),
            sequence_length=128 if debug else 1024,
            batch_size=8 if debug else 480,
        ),
        optimizer=AdamW(
            learning_rate=6e-4,
            schedule=CosineSchedule(warmup_steps=min(2000, steps)),
            weight_decay=0.1,
            accumulate_steps={"": 10, "small": 40, "debug": 1}[variant],
        ),
        training=TrainingConfig(steps=steps, eval_every=0 if debug else 1000, checkpoint_every=1000, log_every=10),
    )
