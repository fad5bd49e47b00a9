"""English to German on Multi30k.

    transformer prepare train.en.gz train.de.gz --kind pairs --name multi30k \
        --validation val.en.gz val.de.gz --test test_2016_flickr.en.gz test_2016_flickr.de.gz
    python train.py configs/multi30k_translate.py
    transformer evaluate runs/multi30k_translate --split test

Line n of one file belongs to line n of the other. Hardware: one CPU core, 71 minutes beside other programs.
With seed 0 greedy decoding scores BLEU 37.9 on the test set of 2016; docs/tasks.md has the signature.
"""

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers.bpe import BytePairs
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objectives.seq2seq import Seq2Seq
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.optimizers.muon import Muon
from transformer.schedules.linear import LinearSchedule


def get_config(variant: str = "") -> Config:
    steps = {"": 3000, "debug": 20}[variant]
    block = BlockConfig(AttentionConfig(num_heads=4), FeedForwardConfig(hidden_dim=512), RMSNorm())
    return Config(
        model=ModelConfig(num_layers=3, embed_dim=128, pattern=(block,), dropout=0.2),
        data=DataConfig(
            source=("multi30k",),
            tokenizer=BytePairs(size=6000),
            sequence_length=64,
            buckets=(16, 24, 32, 64),
            batch_size=128,
        ),
        objective=Seq2Seq(label_smoothing=0.1),
        optimizer=Muon(
            learning_rate=0.01,
            schedule=LinearSchedule(warmup_steps=min(100, steps), final_fraction=0.0),
            weight_decay=0.01,
            b2=0.98,
        ),
        training=TrainingConfig(steps=steps, eval_every=750, checkpoint_every=750, log_every=50),
    )
