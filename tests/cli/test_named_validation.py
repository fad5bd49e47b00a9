"""Token files and named validation files, through the command line: trained on, gone on with, and scored."""

import json

import numpy as np
import pytest

from tests.data.test_token_files import TEXTS, make_folder, stream_of, with_header
from transformer.cli.main import main
from transformer.data.tokenizers.auto import Auto

CONFIG = """
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import OBJECTIVES

def get_config(kind):
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(sequence_length=16, batch_size=8),
        objective=OBJECTIVES.find(kind)(),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=4, log_every=4, eval_every=4, checkpoint_every=0, sample_length=0),
    )
"""


@pytest.fixture
def run(tmp_path, capsys):
    """The command line in a folder with a config; gives what it printed."""
    (tmp_path / "config.py").write_text(CONFIG)

    def run(command, *arguments, kind="next_token", workdir="run", fails=False):
        place = [f"{tmp_path / 'config.py'}:{kind}", "--workdir", str(tmp_path / workdir)]
        first = place if command == "train" else [str(tmp_path / workdir)]
        capsys.readouterr()
        if fails:
            with pytest.raises(SystemExit) as refusal:
                main([command, *first, *map(str, arguments), "--data.data-dir", str(tmp_path / "data")])
            assert refusal.value.code == 2
        else:
            main([command, *first, *map(str, arguments), "--data.data-dir", str(tmp_path / "data")])
        out, err = capsys.readouterr()
        return " ".join(err.split()) if fails or command == "train" else json.loads(out)

    return run


def metrics(tmp_path, name="metrics.jsonl", workdir="run"):
    return [json.loads(line) for line in (tmp_path / workdir / name).read_text().splitlines()]


def without_times(rows):
    return [{name: value for name, value in row.items() if "second" not in name and name != "mfu"} for row in rows]


@pytest.mark.parametrize("kind", ["next_token", "classification"])
def test_validation_data_are_named_when_scored_and_when_also_trained_on(tmp_path, run, kind):
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    for name, some in (("rows", rows), ("copy", rows), ("other", rows[:30])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    note = "The validation data are also trained on"
    for name in ("copy", "other"):
        files = ("--data.source", tmp_path / "rows.jsonl", "--data.validation", tmp_path / f"{name}.jsonl")
        printed = run("train", *files, kind=kind, workdir=name)
        assert (note in printed) == (name == "copy")
    assert run("evaluate", workdir="other")["source"] == [str(tmp_path / "other.jsonl")]


def test_a_run_on_ids_is_that_on_text_bit_for_bit(tmp_path, run):
    folder = make_folder(tmp_path / "model")
    tokenizer = Auto(folder=str(folder)).train(())
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    ids = tmp_path / "corpus"
    ids.mkdir()
    for split in ("train", "val"):
        (ids / f"{split}.bin").write_bytes(np.array(stream_of(tokenizer, "after"), "<u2").tobytes())
    chosen = ("--data.tokenizer.folder", folder)
    text = tmp_path / "text.jsonl"
    run("train", "--data.source", text, "--data.validation", text, *chosen, workdir="text")
    run("train", "--data.source", ids, *chosen, workdir="ids")
    assert without_times(metrics(tmp_path, workdir="ids")) == without_times(metrics(tmp_path, workdir="text"))
    of_ids, of_text = (run("evaluate", workdir=name) for name in ("ids", "text"))
    assert of_ids["bits_per_byte"] > 0
    differing = {"workdir", "source"}
    assert {k: v for k, v in of_ids.items() if k not in differing} == {
        k: v for k, v in of_text.items() if k not in differing
    }
    assert "is finished" in run("train", "--data.source", ids, *chosen, workdir="ids")
    (tmp_path / "model").rename(tmp_path / "gone")
    assert json.loads((tmp_path / "ids" / "config.json").read_text())["data"]["tokenizer"]["kind"] == "pretrained"


def test_ids_alone_have_a_loss_and_no_bits_a_byte(tmp_path, run):
    ids = np.random.RandomState(0).randint(0, 90, 4000)
    (tmp_path / "ids_train_0.bin").write_bytes(with_header(ids))
    given = ("--data.tokenizer.kind", "ids", "--data.tokenizer.vocab-size", 91, "--data.tokenizer.end-of-text", 90)
    run("train", "--data.source", tmp_path / "ids_train_*.bin", *given)
    scores = run("evaluate")
    assert scores["loss"] > 0
    assert not any("byte" in name for name in scores)


def test_ids_beyond_the_tokenizer_are_refused_before_anything_is_written(tmp_path, run):
    (tmp_path / "train.bin").write_bytes(np.arange(3000, dtype="<u2").tobytes())
    assert "Give the tokenizer that made them" in run("train", "--data.source", tmp_path / "train.bin", fails=True)
    said = run("train", "--data.source", tmp_path / "train.bin", "--data.tokenizer.kind", "bytes", fails=True)
    assert f"{tmp_path / 'train.bin'}, position 257 has the id 257 and the tokenizer 257 ids" in said
    assert not (tmp_path / "run" / "config.json").exists()


# ---- Validation files ------------------------------------------------------------------------------------------------


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(start, stop):
    return [f"the {'good' if i % 2 else 'bad'} number {i} of many\n" * 4 for i in range(start, stop)]


ROWS = {
    "next_token": lambda i, text: {"text": text},
    "classification": lambda i, text: {"text": text, "label": "ab"[i % 2]},
    "seq2seq": lambda i, text: {"source": text, "target": text.upper()},
}


@pytest.mark.parametrize("kind", ROWS)
def test_named_files_are_scored_and_nothing_is_taken_from_the_source(tmp_path, run, kind):
    rows = [ROWS[kind](i, text) for i, text in enumerate(words(0, 60))]
    train, held_out = write_jsonl(tmp_path / "train.jsonl", rows[:40]), write_jsonl(tmp_path / "val.jsonl", rows[40:])
    named = ("--data.source", train, "--data.validation", held_out)
    said = run("train", *named, kind=kind)
    assert "train.jsonl: train 40 " in said
    assert "val.jsonl: validation 20 " in said
    validated = next(row for row in reversed(metrics(tmp_path)) if "validation" in json.dumps(row))
    scores, alone = run("evaluate"), run("evaluate", "--data.source", held_out)
    assert scores["split"] == "validation"
    assert scores["loss"] == alone["loss"]
    assert any(abs(scores["loss"] - value) < 1e-6 for value in validated.values() if isinstance(value, float))
    assert "finished" in run("train", *named, kind=kind)
    # The content counts, not the place; and it must be the same.
    (tmp_path / "moved.jsonl").write_text(held_out.read_text())
    moved = ("--data.source", train, "--data.validation", tmp_path / "moved.jsonl", "--training.steps", 5)
    run("train", *moved, kind=kind)
    write_jsonl(held_out, rows[41:])
    said = run("train", *named, "--training.steps", 6, kind=kind, fails=True)
    assert "its content or its split has changed" in said
    said = run("train", "--data.source", train, "--training.steps", 6, kind=kind, fails=True)
    assert "its content or its split has changed" in said


def test_several_sources_and_validation_files_of_other_kinds(tmp_path, run):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in words(0, 30)])
    (tmp_path / "b.txt").write_text("".join(words(30, 60)))
    (tmp_path / "c.txt").write_text("".join(words(60, 80)))
    (tmp_path / "ids.bin").write_bytes(np.frombuffer("".join(words(80, 90)).encode(), np.uint8).astype("<u2").tobytes())
    named = ("--data.validation", tmp_path / "c.txt", tmp_path / "ids.bin")
    run("train", "--data.source", tmp_path / "a.jsonl", tmp_path / "b.txt", "--data.weights", 1, 2, *named)
    scores = run("evaluate")
    assert scores["targets"] == len("".join(words(60, 90)).encode()) + 2
    assert scores["bytes"] == len("".join(words(60, 90)).encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no file or folder"), ("", "must hold text"), ("  \n", "must hold text")],
)
def test_a_validation_file_that_is_not_there_or_empty_is_refused(tmp_path, run, content, message):
    (tmp_path / "a.txt").write_text("".join(words(0, 30)))
    if content is not None:
        (tmp_path / "val.txt").write_text(content)
    named = ("--data.source", tmp_path / "a.txt", "--data.validation", tmp_path / "val.txt")
    said = run("train", *named, fails=True)
    assert message in said
    assert "val.txt" in said
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_class_that_training_lacks_is_refused(tmp_path, run):
    rows = [ROWS["classification"](i, text) for i, text in enumerate(words(0, 20))]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    held_out = write_jsonl(tmp_path / "val.jsonl", [*rows, {"text": "x", "label": "c"}])
    said = run("train", "--data.source", train, "--data.validation", held_out, kind="classification", fails=True)
    assert "must be one of the run's classes, a, b" in said
    assert "val.jsonl, line 21" in said


def test_a_fraction_beside_validation_files_is_refused_and_theirs_in_a_config_is_noted(tmp_path, run):
    (tmp_path / "a.txt").write_text("".join(words(0, 30)))
    named = ("--data.source", tmp_path / "a.txt", "--data.validation", tmp_path / "a.txt")
    said = run("train", *named, "--data.validation-fraction", 0.2, fails=True)
    assert "validation-fraction is for runs without validation files" in said
    config = (tmp_path / "config.py").read_text()
    (tmp_path / "config.py").write_text(config.replace("batch_size=8", "batch_size=8, validation_fraction=0.3"))
    said = run("train", *named)
    assert "validation-fraction 0.3 -> 0.1, it is for runs without validation files" in said
    assert f"train {len(''.join(words(0, 30)).encode()):,} bytes" in said or "train 1 document" in said


def test_what_a_strangers_run_names_for_validation_is_not_read(tmp_path, run, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(words(0, 30)))
    (tmp_path / "b.txt").write_text("".join(words(30, 40)))
    run("train", "--data.source", tmp_path / "a.txt", "--data.validation", tmp_path / "b.txt")
    known = run("evaluate")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    state = tmp_path / "state" / "transformer"
    state.mkdir(parents=True)
    (state / "trained_on").write_text(f"{tmp_path / 'a.txt'}\n{tmp_path / 'data'}\n")
    said = run("evaluate", fails=True)
    assert f"names '{tmp_path / 'b.txt'}', which is not read" in said
    assert run("evaluate", "--data.source", tmp_path / "b.txt")["loss"] == known["loss"]


def test_text_is_prepared_with_its_validation_files(tmp_path, run, capsys):
    (tmp_path / "a.txt").write_text("".join(words(0, 30)))
    (tmp_path / "b.txt").write_text("".join(words(30, 40)))
    place = ("--data-dir", str(tmp_path / "data"), "--tokenizer", "bytes")
    main(["prepare", str(tmp_path / "a.txt"), "--validation", str(tmp_path / "b.txt"), *place])
    out, _ = capsys.readouterr()
    assert "a.txt: train 1 document" in out
    assert "b.txt: validation 1 document" in out
    there = {path for path in (tmp_path / "data").rglob("*.array_record*")}
    run("train", "--data.source", tmp_path / "a.txt", "--data.validation", tmp_path / "b.txt")
    assert {path for path in (tmp_path / "data").rglob("*.array_record*")} == there
