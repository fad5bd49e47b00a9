"""English to German on Multi30k.

    transformer prepare train.en.gz train.de.gz --kind pairs --name multi30k \
        --validation val.en.gz val.de.gz --test test_2016_flickr.en.gz test_2016_flickr.de.gz
    python train.py configs/multi30k_translate.py
    transformer evaluate runs/multi30k_translate --split test

Line n of one file belongs to line n of the other. Hardware: two CPU cores.
"""

from transformer.config import Config, DataConfig, ObjectiveConfig, OptimizerConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig, NormConfig


def get_config(variant: str = "") -> Config:
    steps = {"": 4500, "debug": 20}[variant]
    block = BlockConfig(AttentionConfig(num_heads=4), FeedForwardConfig(hidden_dim=512), NormConfig(kind="rms_norm"))
    return Config(
        model=ModelConfig(architecture="encoder_decoder", num_layers=3, embed_dim=256, pattern=(block,), dropout=0.3),
        data=DataConfig(
            source=("multi30k",),
            tokenizer="bpe",
            tokenizer_size=8000,
            sequence_length=64,
            buckets=(16, 24, 32, 64),
            batch_size=128,
        ),
        objective=ObjectiveConfig(kind="seq2seq", label_smoothing=0.1),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3,
            schedule="cosine",
            warmup_steps=min(400, steps),
            final_fraction=0.02,
            weight_decay=0.05,
            b2=0.98,
            ema_decay=0.998,
        ),
        training=TrainingConfig(steps=steps, eval_every=750, checkpoint_every=750, log_every=50),
    )
