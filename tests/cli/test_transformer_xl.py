"""A run with a memory of earlier rows: it goes on exactly, and is scored with other memories and continued."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.cli.main import main
from transformer.config import Config
from transformer.config_io import from_dict
from transformer.generation.generate import generate
from transformer.generation.sampling import SamplingConfig
from transformer.runs.recipe import make_run
from transformer.runs.saved import load
from transformer.runs.scoring import evaluate
from transformer.training.checkpoint import Checkpointer
from transformer.types import UserError

CONFIG = """
from transformer import AdamW, ConstantSchedule
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.ops.positions.transformer_xl import TransformerXLPositions

def get_config():
    return Config(
        model=ModelConfig(
            num_layers=2,
            embed_dim=16,
            dropout=0.1,
            pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
            positions=TransformerXLPositions(),
            memory_length=16,
        ),
        data=DataConfig(sequence_length=16, batch_size=4, record_bytes=512, validation_fraction=0.2),
        optimizer=AdamW(accumulate_steps=2, schedule=ConstantSchedule()),
        parallel=ParallelConfig(data=2),
        training=TrainingConfig(steps=6, log_every=2, eval_every=3, checkpoint_every=3, sample_length=4),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a config file, a text, and a run of six steps."""
    directory = tmp_path_factory.mktemp("memory")
    words = random.Random(0)
    text = " ".join(words.choice(("to", "be", "or", "not", "question")) for _ in range(1500))
    (directory / "text.txt").write_text(text)
    (directory / "config.py").write_text(CONFIG)
    train(directory, "whole")
    return directory


def train(place, name, *more):
    data = ("--data.source", str(place / "text.txt"), "--data.data-dir", str(place / "prepared"))
    main(["train", str(place / "config.py"), *data, "--workdir", str(place / name), *more])


def last_state(workdir):
    config = from_dict(Config, json.loads((workdir / "config.json").read_text()))
    target = make_run(config).state
    return Checkpointer(workdir / "checkpoints").restore(target).state


def test_a_run_goes_on_to_the_bit(place):
    train(place, "parts", "--training.steps", "3")
    assert np.abs(last_state(place / "parts").carry["recurrence_BLPD"]).max() > 0
    train(place, "parts")
    states = [last_state(place / name)._replace(key=()) for name in ("whole", "parts")]
    whole, parts = (jax.tree_util.tree_leaves_with_path(state) for state in states)
    assert any("recurrence_BLPD" in jax.tree_util.keystr(path) for path, _ in whole)
    for (path, one), (_, other) in zip(whole, parts, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), jax.tree_util.keystr(path)


def test_scores_with_other_memories(place, capsys):
    def scores(*more):
        main(["evaluate", str(place / "whole"), *more])
        return json.loads(capsys.readouterr().out)

    own, none, longer = scores(), *(scores("--model.memory-length", length) for length in ("0", "64"))
    rows = [json.loads(line) for line in (place / "whole" / "metrics.jsonl").read_text().splitlines()]
    (validation,) = [row for row in rows if row["split"] == "validation" and row["step"] == 6]
    # The steps of training and evaluation add in different orders.
    assert own["loss"] == pytest.approx(validation["loss"], rel=1e-5)
    assert own["targets"] == none["targets"] == longer["targets"]
    assert len({own["loss"], none["loss"], longer["loss"]}) == 3
    assert scores("--model.memory-length", "16")["loss"] == own["loss"]
    limited = scores("--model.memory-length", "64", "--data.limit", "50")
    assert limited["targets"] == limited["bytes"] == 50


def test_a_stride_reads_tokens_twice_and_needs_memory_0(place):
    with pytest.raises(
        UserError, match=r"data.pack=True, data.stride=4 and 1 sources; set data.pack=True, data.stride=0"
    ):
        evaluate(place / "whole", stride=4)
    assert evaluate(place / "whole", stride=4, memory_length=0)["loss"] > 0


def test_a_run_without_memory_is_scored_with_one_however_it_was_read(place, tmp_path):
    shutil.copytree(place / "whole", tmp_path / "run")
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    values["model"]["memory_length"] = 0
    values["data"] |= {"pack": False, "num_streams": 1}
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    with_memory = evaluate(tmp_path / "run", memory_length=16)
    assert with_memory["loss"] == evaluate(place / "whole")["loss"]


def test_generation_equals_full_passes(place, capsys):
    main(["generate", str(place / "whole"), "--prompt", "to be", "--max-new-tokens", "20", "--temperature", "0"])
    assert capsys.readouterr().out.startswith("to be")
    model, params, tokenizer, config, _ = load(place / "whole")
    assert config.model.max_length == 32
    prompt = [tokenizer.end_of_text, *tokenizer.encode("to be").tolist()]
    # After six steps a model repeats itself; with noise added it does not.
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.3 * noise.standard_normal(x.shape).astype(np.float32), params)
    greedy = SamplingConfig(temperature=0.0)
    generated = generate(model, params, [prompt], max_new_tokens=20, sampling=greedy).tokens[0].tolist()
    assert len(set(generated)) > 3
    logits = model.apply({"params": params}, jnp.array([prompt + generated], jnp.int32))[0]
    assert np.argmax(logits, axis=-1)[len(prompt) - 1 : -1].tolist() == generated
