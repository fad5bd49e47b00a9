"""Sentiment of IMDb reviews, from scratch.

    transformer prepare imdb_train.jsonl.gz --kind labelled --test imdb_test.jsonl.gz --name imdb
    python train.py configs/imdb_classify.py
    transformer evaluate runs/imdb_classify --split test

Each line of the files is an object with `text` and `label`. Hardware: one CPU core, about 12 minutes. Expect 88.3 % accuracy on
the test half, the mean of `--training.seed` 0, 1 and 2; docs/tasks.md compares it with a baseline.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.words import Words
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import POOLINGS
from transformer.objectives.classification import Classification
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.optimizers.adamw import AdamW
from transformer.schedules.linear import LinearSchedule


def get_config(variant: str = "") -> Config:
    steps = {"": 1600, "debug": 20}[variant]
    block = BlockConfig(
        AttentionConfig(num_heads=4),
        FeedForwardConfig(hidden_dim=256, activation="gelu"),
        RMSNorm(),
    )
    return Config(
        model=ModelConfig(
            num_layers=1,
            embed_dim=64,
            pattern=(block,),
            pooling=POOLINGS.find("mean")(),
            dropout=0.5,
        ),
        data=DataConfig(
            source=("imdb",),
            tokenizer=Words(size=20_000),
            sequence_length=512,
            buckets=(160, 256, 384, 512),
            truncate="head_tail",
            batch_size=32,
            validation_fraction=0.02,
        ),
        objective=Classification(label_smoothing=0.1, token_dropout=0.15),
        optimizer=AdamW(
            learning_rate=1e-3,
            schedule=LinearSchedule(warmup_steps=min(200, steps), final_fraction=0.0),
            weight_decay=0.1,
            ema_decay=0.998,
        ),
        training=TrainingConfig(steps=steps, eval_every=400, checkpoint_every=400, log_every=50),
    )
