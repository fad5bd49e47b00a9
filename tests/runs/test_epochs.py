"""A run of so many epochs has the steps in which its training split is read so often, and its rows say how far it is."""

import dataclasses
import json

import pytest

from transformer.cli.main import main
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.data.datasets import open_data
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.classification import Classification
from transformer.optimizers.adamw import AdamW
from transformer.overrides import override
from transformer.runs.recipe import epochs_a_step, with_steps
from transformer.runs.train import train
from transformer.schedules.cosine import CosineSchedule
from transformer.training.metrics import without_timings
from transformer.training.writers import read_jsonl
from transformer.types import UserError

BATCH, LENGTH = 4, 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("epochs")
    (place / "text").mkdir()
    for index in range(8):
        (place / "text" / f"{index}.txt").write_text(f"document {index} " * (3 + index))
    rows = [{"text": f"word {index}", "label": "ab"[index % 2]} for index in range(30)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(
        [
            "prepare",
            str(place / "rows.jsonl"),
            "--kind",
            "labelled",
            "--name",
            "rows",
            "--data-dir",
            str(place / "data"),
        ]
    )
    return place


def config_of(place, objective=None, **training):
    data = DataConfig(
        source=(str(place / "text"),) if objective is None else ("rows",),
        data_dir=str(place / "data"),
        sequence_length=LENGTH,
        batch_size=BATCH,
        validation_fraction=0.2,
        **({"record_bytes": 64} if objective is None else {}),
    )
    block = BlockConfig(AttentionConfig(num_heads=2))
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=16, pattern=(block,)),
        data=data,
        objective=objective or Config().objective,
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(log_every=1, sample_length=0, **training),
    )


def count_targets(config):
    """Targets of the training split, counted in its own texts: of bytes, each text's and its end."""
    data = open_data(config.data, config.objective)
    return sum(len(text.encode()) + 1 for text in data.texts("train"))


@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.5])
def test_running_text_is_counted(place, epochs):
    config = config_of(place, epochs=epochs)
    data = open_data(config.data, config.objective)
    steps = with_steps(config, data, data.make_tokenizer()).training.steps
    targets = count_targets(config)
    assert (steps - 1) * BATCH * LENGTH < epochs * targets <= steps * BATCH * LENGTH


def test_examples_are_counted_in_whole_batches(place):
    config = config_of(place, Classification(), epochs=3)
    data = open_data(config.data, config.objective)
    kept = len(list(data.texts("train")))
    steps = with_steps(config, data, data.make_tokenizer()).training.steps
    assert steps == 3 * (kept // BATCH)
    assert epochs_a_step(config_of(place, Classification(), steps=7), data) == pytest.approx(1 / (kept // BATCH))


def test_an_epoch_reads_each_text_once(place):
    """All batches of an epoch together hold as many targets as the split, up to a batch."""
    config = config_of(place, epochs=1)
    data = open_data(config.data, config.objective)
    tokenizer = data.make_tokenizer()
    steps = with_steps(config, data, tokenizer).training.steps
    batches = data.train_batches(tokenizer)
    assert abs(sum(next(batches).weights.sum() for _ in range(steps)) - count_targets(config)) <= BATCH * LENGTH


def test_a_run_ends_with_its_epochs_and_goes_on_with_more(place, tmp_path, capsys):
    config = dataclasses.replace(config_of(place, epochs=1), workdir=str(tmp_path))
    reached = train(config)
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert len(rows) == reached.step > 2
    assert [row["epoch"] for row in rows] == pytest.approx([(n + 1) / reached.step for n in range(reached.step)])
    assert f"{reached.step:,} steps, 1 epochs" in capsys.readouterr().err
    recorded = json.loads((tmp_path / "config.json").read_text())["training"]
    assert (recorded["epochs"], recorded["steps"]) == (1.0, reached.step)
    assert train(config).step == reached.step
    said = " ".join(capsys.readouterr().err.split())
    assert "is finished" in said and "continues with more --training.epochs" in said
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=2.0))
    assert 2 * reached.step - 1 <= train(longer).step <= 2 * reached.step
    assert [row["epoch"] for row in read_jsonl(tmp_path / "metrics.jsonl") if row["split"] == "train"][-1] == 2.0
    assert train(config).step > reached.step  # fewer than it has taken: finished
    assert "is finished" in " ".join(capsys.readouterr().err.split())


def test_a_killed_run_of_epochs_goes_on_with_its_steps(place, tmp_path):
    class Accident(Exception):
        pass

    def die(step, state, statistics):
        if step == 3:
            raise Accident

    config = config_of(place, epochs=1, checkpoint_every=2)
    whole, other = (dataclasses.replace(config, workdir=str(tmp_path / name)) for name in ("whole", "other"))
    train(whole)
    with pytest.raises(Accident):
        train(other, hooks=(die,))
    train(other)

    def rows(name):
        found = read_jsonl(tmp_path / name / "metrics.jsonl")
        return [without_timings(row) for row in found]

    assert rows("other") == rows("whole")


def test_what_needs_more_steps_is_refused_when_they_are_known(place):
    config = dataclasses.replace(config_of(place, epochs=1), optimizer=AdamW(schedule=CosineSchedule(warmup_steps=999)))
    data = open_data(config.data, config.objective)
    with pytest.raises(
        UserError, match=r"warmup_steps must not exceed training.steps=.*training.epochs=1 .* makes \d+ steps"
    ):
        with_steps(config, data, data.make_tokenizer())


def test_sources_with_shares_have_no_epoch(place):
    config = config_of(place, epochs=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=config.data.source * 2))
    data = open_data(config.data, config.objective)
    with pytest.raises(UserError, match=r"training\.epochs are of one source, got 2 .*set training\.steps"):
        with_steps(config, data, data.make_tokenizer())


def test_given_steps_replace_epochs():
    config = Config(training=TrainingConfig(epochs=3))
    assert override(config, {"training.steps": 5}).training.epochs == 0
    with pytest.raises(UserError, match=r"has training\.steps or training\.epochs, got both; leave one out"):
        override(config, {"training.steps": 5, "training.epochs": 2.0})
    assert override(Config(), {"training.steps": 5, "training.epochs": 0.0}).training.steps == 5
