"""nanoGPT's CPU recipe: a 0.8M-parameter character model of Shakespeare.

    python train.py configs/shakespeare_char_cpu.py --data.source tinyshakespeare.txt

Without `--data.source`, it reads the TFDS dataset `tiny_shakespeare`. Hardware: two CPU cores, about a minute and a half.
Expect a validation loss of 1.90 nats per character on the whole last tenth of the text.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.characters import Characters
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.positions.learned import LearnedPositions
from transformer.optimizers.adamw import AdamW
from transformer.schedules.cosine import CosineSchedule


def get_config(variant: str = "") -> Config:
    steps = {"": 2000, "debug": 20}[variant]
    block = BlockConfig(AttentionConfig(num_heads=4), FeedForwardConfig(activation="gelu"))
    return Config(
        model=ModelConfig(num_layers=4, embed_dim=128, pattern=(block,), positions=LearnedPositions()),
        data=DataConfig(
            source=("tiny_shakespeare",),
            tokenizer=Characters(),
            sequence_length=64,
            batch_size=12,
            pack=False,
            record_bytes=2048,
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            schedule=CosineSchedule(warmup_steps=min(100, steps), final_fraction=0.1),
            weight_decay=0.1,
            b1=0.9,
            b2=0.99,
        ),
        training=TrainingConfig(steps=steps, eval_every=0, checkpoint_every=0, log_every=50),
    )
