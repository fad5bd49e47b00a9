"""A Transformer-XL of bytes on a Wikipedia XML file of yours, such as the start of a pages-articles dump.

    python train.py configs/enwiki_xl.py --data.source enwiki.xml
    transformer evaluate runs/enwiki_xl --model.memory-length 512 --data.limit 200000

The second command scores the same parameters with a longer memory than in training; 0 means no memory.

Hardware: two CPU cores, 19 minutes beside other programs. Expect these bits per byte with seed 0, on 600,000 held-out bytes of
Wikipedia's XML (docs/tasks.md): 2.269 without memory, 2.132 with 128 or 256 vectors per layer, 2.139 with 512.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.transformer_xl import TransformerXLPositions
from transformer.optimizers.muon import Muon
from transformer.schedules.linear import LinearSchedule


def get_config(variant: str = "") -> Config:
    steps = {"": 1800, "debug": 20}[variant]
    block = BlockConfig(
        AttentionConfig(num_heads=4),
        FeedForwardConfig(activation="gelu"),
        RMSNorm(),
    )
    length = 128
    return Config(
        model=ModelConfig(
            num_layers=4,
            embed_dim=192,
            pattern=(block,),
            positions=TransformerXLPositions(),
            memory_length=length,
        ),
        data=DataConfig(
            source=("enwiki.xml",),
            validation_fraction=0.1,
            sequence_length=length,
            batch_size=16,
            record_bytes=65_536,
            limit=200_000,
        ),
        optimizer=Muon(
            learning_rate=0.02,
            schedule=LinearSchedule(warmup_steps=min(50, steps), final_fraction=0.0),
            weight_decay=0.0,
            b2=0.99,
        ),
        training=TrainingConfig(steps=steps, eval_every=600, checkpoint_every=200, log_every=25, sample_prompt="[["),
    )
