"""Sentiment of IMDb reviews, from the masked language model of `configs/imdb_mlm.py`.

    python train.py configs/imdb_finetune.py --training.init-from runs/imdb_mlm
    transformer evaluate runs/imdb_finetune --split test

The dataset `imdb` is prepared as for `configs/imdb_classify.py`. Hardware: two CPU cores.
"""

from transformer.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig, NormConfig


def get_config(variant: str = "") -> Config:
    steps = {"": 2100, "debug": 20}[variant]
    block = BlockConfig(AttentionConfig(num_heads=4), FeedForwardConfig(hidden_dim=1024), NormConfig(kind="rms_norm"))
    return Config(
        model=ModelConfig(
            architecture="encoder",
            num_layers=4,
            embed_dim=256,
            pattern=(block,),
            pooling="mean",
            dropout=0.2,
            dtype="bfloat16",
        ),
        data=DataConfig(
            source=("imdb",),
            tokenizer="wordpiece",
            sequence_length=512,
            truncate="head_tail",
            batch_size=32,
            validation_fraction=0.1,
        ),
        objective=ObjectiveConfig(kind="classification", label_smoothing=0.1),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, schedule="linear", warmup_steps=min(200, steps), final_fraction=0.0, weight_decay=0.01
        ),
        training=TrainingConfig(steps=steps, eval_every=700, checkpoint_every=700, log_every=50),
    )
