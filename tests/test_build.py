"""A config becomes a run: its seed is the one that is used, and what cannot work is refused."""

import jax
import numpy as np
import pytest

from transformer.config import Config, DataConfig, TrainingConfig
from transformer.data.tokenizers import PairTokenizer
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.span_corruption import SpanCorruption
from transformer.optimizers.adamw import AdamW
from transformer.parts import Parts, resolve
from transformer.runs.recipe import make_run
from transformer.schedules.cosine import CosineSchedule
from transformer.types import UserError


def test_the_seed_decides_parameters_and_randomness(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)

    def start(seed):
        block = BlockConfig(AttentionConfig(num_heads=2))
        config = Config(
            model=ModelConfig(num_layers=1, embed_dim=8, pattern=(block,)),
            data=DataConfig(
                source=(str(tmp_path / "text.txt"),), data_dir=str(tmp_path), sequence_length=16, batch_size=8
            ),
            optimizer=AdamW(schedule=CosineSchedule(warmup_steps=0)),
            training=TrainingConfig(steps=1, seed=seed),
        )
        state = make_run(config).init_state()
        kernel = state.params["decoder"]["blocks"]["block_0"]["attention"]["query"]["kernel"]
        return np.asarray(kernel), np.asarray(jax.random.key_data(state.key))

    first, again, other = start(3), start(3), start(4)
    for index in range(2):
        np.testing.assert_array_equal(first[index], again[index])
        assert not np.array_equal(first[index], other[index])


def test_spans_are_of_one_vocabulary():
    config = Config(model=ModelConfig(), objective=SpanCorruption())
    assert Parts(resolve(config, ByteTokenizer()), ByteTokenizer()).sizes.source_vocab_size == 0
    with pytest.raises(
        UserError, match="needs one vocabulary, got a tokenizer with one for sources and one for targets"
    ):
        resolve(config, PairTokenizer(ByteTokenizer(), ByteTokenizer()))
