"""Sentiment of IMDb reviews, from the masked language model of `configs/imdb_mlm.py`.

    python train.py configs/imdb_finetune.py --training.init-from runs/imdb_mlm
    transformer evaluate runs/imdb_finetune --split test

The dataset `imdb` is prepared as for `configs/imdb_classify.py`. Hardware: one CPU core, about 45 minutes, or 32 with
`--model.dtype bfloat16` on a core with bfloat16 products. Test accuracy with seeds 0, 1, 2 (`--training.seed`): 90.42, 90.27,
90.36 % (docs/tasks.md).
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
    steps = {"": 2300, "debug": 20}[variant]
    block = BlockConfig(
        AttentionConfig(num_heads=3),
        FeedForwardConfig(hidden_dim=768, activation="gelu"),
        RMSNorm(),
    )
    return Config(
        model=ModelConfig(
            num_layers=2,
            embed_dim=192,
            pattern=(block,),
            pooling=POOLINGS.find("mean")(),
            dropout=0.2,
        ),
        data=DataConfig(
            source=("imdb",),
            tokenizer=Words(),
            sequence_length=384,
            buckets=(128, 192, 288, 384),
            truncate="head_tail",
            batch_size=32,
            validation_fraction=0.02,
        ),
        objective=Classification(label_smoothing=0.1, token_dropout=0.15),
        optimizer=AdamW(
            learning_rate=5e-4,
            schedule=LinearSchedule(warmup_steps=min(100, steps), final_fraction=0.0),
            weight_decay=0.05,
            ema_decay=0.998,
        ),
        training=TrainingConfig(steps=steps, eval_every=460, checkpoint_every=460, log_every=50),
    )
