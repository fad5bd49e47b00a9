"""A small run for `benchmarks/device.py resume`: 4 layers of width 256 in bfloat16, in rows of 512 tokens.

    python train.py benchmarks/device_run.py --data.source FOLDER

The learning rate is constant. Therefore a run with more steps can continue a shorter one.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.optimizers.adamw import AdamW
from transformer.schedules.constant import ConstantSchedule


def get_config(variant: str = "") -> Config:
    """The run; `tiny` is for a CPU."""
    tiny = {"": False, "tiny": True}[variant]
    block = BlockConfig(AttentionConfig(num_heads=4, dropout=0.0))
    return Config(
        model=ModelConfig(
            num_layers=2 if tiny else 4,
            embed_dim=32 if tiny else 256,
            pattern=(block,),
            dropout=0.1,
            dtype="bfloat16",
        ),
        data=DataConfig(
            source=("text",),
            data_dir="prepared",
            sequence_length=64 if tiny else 512,
            batch_size=4 if tiny else 8,
            record_bytes=2048,
        ),
        optimizer=AdamW(schedule=ConstantSchedule(warmup_steps=0)),
        training=TrainingConfig(steps=40, log_every=1, eval_every=0, checkpoint_every=10, sample_length=0),
    )
