"""Span corruption on both sides of Multi30k, as pre-training for its translator.

    python train.py configs/multi30k_spans.py --data.source train.en.gz train.de.gz
    python train.py configs/multi30k_translate.py --training.init-from runs/multi30k_spans

The model is the same as in `configs/multi30k_translate.py`, which then uses the tokenizer made here. Hardware: two CPU cores.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.bpe import BytePairs
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objectives.span_corruption import SpanCorruption
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.optimizers.adamw import AdamW
from transformer.schedules.inverse_sqrt import InverseSqrtSchedule


def get_config(variant: str = "") -> Config:
    steps = {"": 4000, "debug": 20}[variant]
    block = BlockConfig(AttentionConfig(num_heads=4), FeedForwardConfig(hidden_dim=512), RMSNorm())
    return Config(
        model=ModelConfig(num_layers=3, embed_dim=128, pattern=(block,), dropout=0.1),
        data=DataConfig(
            source=("train.en.gz", "train.de.gz"),
            validation_fraction=0.02,
            tokenizer=BytePairs(size=6000),
            sequence_length=128,
            batch_size=64,
        ),
        objective=SpanCorruption(),
        optimizer=AdamW(
            learning_rate=1.5e-3,
            schedule=InverseSqrtSchedule(warmup_steps=min(400, steps)),
            weight_decay=0.05,
            b2=0.98,
        ),
        training=TrainingConfig(steps=steps, eval_every=1000, checkpoint_every=500, log_every=50),
    )
