"""Masked language modelling on IMDb's unlabelled reviews, as pre-training for `configs/imdb_finetune.py`.

    python train.py configs/imdb_mlm.py --data.source imdb_unsup.jsonl.gz

Hardware: two CPU cores. The 4,200 steps, 34 million tokens, took 89 minutes beside other programs, or 46 with
`--model.dtype bfloat16` on a processor with bfloat16 products (AMX). The model then predicts 40.5 and 40.7 % of the masked words
of the held-out reviews.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.words import Words
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objectives.masked_lm import MaskedLM
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.optimizers.muon import Muon
from transformer.schedules.linear import LinearSchedule


def get_config(variant: str = "") -> Config:
    steps = {"": 4200, "debug": 20}[variant]
    block = BlockConfig(
        AttentionConfig(num_heads=3),
        FeedForwardConfig(hidden_dim=768, activation="gelu"),
        RMSNorm(),
    )
    return Config(
        model=ModelConfig(num_layers=2, embed_dim=192, pattern=(block,)),
        data=DataConfig(
            source=("imdb_unsup.jsonl.gz",),
            validation_fraction=0.02,
            tokenizer=Words(size=20_000),
            sequence_length=256,
            batch_size=32,
        ),
        objective=MaskedLM(mask_rate=0.3),
        optimizer=Muon(
            learning_rate=0.01,
            schedule=LinearSchedule(warmup_steps=min(200, steps), final_fraction=0.0),
            weight_decay=0.01,
        ),
        training=TrainingConfig(steps=steps, eval_every=600, checkpoint_every=200, log_every=50),
    )
