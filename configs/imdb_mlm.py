"""Masked language modelling on IMDb's unlabelled reviews: what `configs/imdb_finetune.py` starts from.

    python train.py configs/imdb_mlm.py --data.source imdb_unsup.jsonl.gz

Hardware: two CPU cores. The first 1,800 steps, one pass over the reviews, took 79 minutes on one, beside other programs.
"""

from transformer.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig, NormConfig


def get_config(variant: str = "") -> Config:
    steps = {"": 4200, "debug": 20}[variant]
    block = BlockConfig(
        AttentionConfig(num_heads=3),
        FeedForwardConfig(hidden_dim=768, activation="gelu"),
        NormConfig(kind="rms_norm"),
    )
    return Config(
        model=ModelConfig(architecture="encoder", num_layers=2, embed_dim=192, pattern=(block,)),
        data=DataConfig(
            source=("imdb_unsup.jsonl.gz",),
            validation_fraction=0.02,
            tokenizer="words",
            tokenizer_size=20_000,
            sequence_length=128,
            batch_size=64,
        ),
        objective=ObjectiveConfig(kind="masked_lm", mask_rate=0.2),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.01,
            schedule="linear",
            warmup_steps=min(200, steps),
            final_fraction=0.0,
            weight_decay=0.01,
        ),
        training=TrainingConfig(steps=steps, eval_every=600, checkpoint_every=200, log_every=50),
    )
