"""Masked language modelling on IMDb's unlabelled reviews: what `configs/imdb_finetune.py` starts from.

    python train.py configs/imdb_mlm.py --data.source imdb_unsup.jsonl.gz

Hardware: two CPU cores, under two hours.
"""

from transformer.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig, NormConfig


def get_config(variant: str = "") -> Config:
    steps = {"": 9000, "debug": 20}[variant]
    block = BlockConfig(AttentionConfig(num_heads=4), FeedForwardConfig(hidden_dim=1024), NormConfig(kind="rms_norm"))
    return Config(
        model=ModelConfig(architecture="encoder", num_layers=4, embed_dim=256, pattern=(block,), dtype="bfloat16"),
        data=DataConfig(
            source=("imdb_unsup.jsonl.gz",),
            validation_fraction=0.02,
            tokenizer="wordpiece",
            tokenizer_size=16_000,
            sequence_length=256,
            batch_size=32,
        ),
        objective=ObjectiveConfig(kind="masked_lm", mask_rate=0.2),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.01,
            schedule="linear",
            warmup_steps=min(300, steps),
            final_fraction=0.0,
            weight_decay=0.01,
        ),
        training=TrainingConfig(steps=steps, eval_every=1000, checkpoint_every=500, log_every=50),
    )
