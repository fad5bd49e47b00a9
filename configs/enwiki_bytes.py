"""A byte-level language model of Wikipedia's XML, the text of the essay's generator.

    python train.py configs/enwiki_bytes.py --data.source enwiki.xml
    transformer evaluate runs/enwiki_bytes --data.stride 32 --data.limit 100000

The last tenth of the text is held out. The evaluation scores each of its first 100,000 bytes with at least 224 bytes of
context, next to gzip -9 and xz on the same bytes.

Hardware: two CPU cores. With `--model.dtype bfloat16`, on a processor with bfloat16 products (AMX), training on 6.1 million bytes
takes 32 minutes. Expect 1.99 bits per byte of Wikipedia's XML with seed 0 (docs/tasks.md). In float32 a step takes 1.3 times as
long there.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.optimizers.muon import Muon
from transformer.schedules.linear import LinearSchedule


def get_config(variant: str = "") -> Config:
    steps = {"": 8800, "debug": 20}[variant]
    block = BlockConfig(
        AttentionConfig(num_heads=4, qk_norm=True),
        FeedForwardConfig(activation="gelu"),
        RMSNorm(),
    )
    return Config(
        model=ModelConfig(num_layers=4, embed_dim=192, pattern=(block,)),
        data=DataConfig(source=("enwiki.xml",), validation_fraction=0.1, sequence_length=256, batch_size=8, pack=False),
        optimizer=Muon(
            learning_rate=0.02,
            schedule=LinearSchedule(warmup_steps=min(50, steps), final_fraction=0.0),
            weight_decay=0.0,
            b2=0.99,
        ),
        training=TrainingConfig(steps=steps, eval_every=0, checkpoint_every=500, log_every=50),
    )
