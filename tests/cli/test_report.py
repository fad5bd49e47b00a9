"""`transformer report` on runs as training and evaluation write them, whatever state they are in."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
from buckets import make_bucket

from transformer import load, report_page
from transformer.cli.main import main
from transformer.cli.pages import write_run_pages
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.config_io import from_json
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.classification import Classification
from transformer.runs.train import train
from transformer.training.metrics import PARTS, TIMINGS
from transformer.training.writers import SamplesWriter, read_jsonl
from transformer.types import UserError

MODEL = ModelConfig(num_layers=1, embed_dim=16, pattern=(BlockConfig(AttentionConfig(num_heads=2)),))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of a language model, and one of a classifier."""
    path = tmp_path_factory.mktemp("report")
    (path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 40)
    rows = [{"text": f"film {i} is {word}", "label": f"<{word}>"} for i in range(40) for word in ("fine", "dull")]
    (path / "films.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training = TrainingConfig(
        steps=4, log_every=1, eval_every=2, checkpoint_every=2, sample_every=2, sample_length=5, sample_prompt="It"
    )
    data = DataConfig(source=(str(path / "text.txt"),), sequence_length=32, batch_size=8, data_dir=str(path / "data"))
    config = Config(
        model=MODEL, data=data, parallel=ParallelConfig(data=1), training=training, workdir=str(path / "run")
    )
    train(config)
    labelled = DataConfig(
        source=(str(path / "films.jsonl"),),
        sequence_length=32,
        batch_size=8,
        data_dir=str(path / "data"),
        validation_fraction=0.2,
    )
    training = TrainingConfig(steps=2, log_every=1)
    train(
        Config(
            model=MODEL,
            data=labelled,
            objective=Classification(),
            parallel=ParallelConfig(data=1),
            training=training,
            workdir=str(path / "films"),
        )
    )
    return path


@pytest.fixture
def run(place, tmp_path):
    return shutil.copytree(place / "run", tmp_path / "run")


def data_of(text):
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


def report(*runs):
    return data_of(report_page(runs))


def test_values_agree_with_the_metrics(place, tmp_path, capsys):
    output = tmp_path / "report.html"
    main(["report", str(place / "run"), "-o", str(output)])
    captured = capsys.readouterr()
    assert captured.out == "" and f"{output} written" in captured.err.replace("\n", "")
    (found,) = data_of(output.read_text("utf-8"))["runs"]
    rows = read_jsonl(place / "run" / "metrics.jsonl")
    for metric in ("loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second"):
        for split in ("train", "validation"):
            expected = [(row["step"], row[metric]) for row in rows if row["split"] == split and metric in row]
            steps, values = found["curves"][metric].get(split, [[], []])
            assert steps == [step for step, _ in expected]
            np.testing.assert_allclose(values, [value for _, value in expected], rtol=1e-6)
    assert {"step", "compile", "evaluation"} <= set(found["seconds"]) <= set(PARTS)
    for part, seconds in found["seconds"].items():
        assert seconds == pytest.approx(sum(row.get(f"{part}_seconds", 0.0) for row in rows), abs=1e-3)
    samples = SamplesWriter.read((place / "run" / "samples.txt").read_bytes())
    assert found["samples"] == [[step, text.decode(errors="replace")] for step, text, _ in samples]
    assert [step for step, _ in found["samples"]] == [2, 4]
    assert found["settings"]["model.embed_dim"] == "16" and "model.embed_dim" in found["changed"]
    assert found["notes"] == [] and found["latest"] == 4


def test_scores_of_an_evaluation_are_kept_and_shown(place, tmp_path, capsys):
    copy = shutil.copytree(place / "films", tmp_path / "films")
    main(["evaluate", str(copy)])
    main(["evaluate", str(copy)])  # the same split again: one place in the report
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    (run,) = report(copy)["runs"]
    (found,) = run["scores"]
    assert found["confusion"] == scores["confusion"] and found["classes"] == ["<dull>", "<fine>"]
    assert found["numbers"]["accuracy"] == scores["accuracy"] and found["numbers"]["macro_f1"] == scores["macro_f1"]
    assert load(copy).step == 2  # a run with scores beside its files is as before
    config = from_json(Config, (copy / "config.json").read_bytes(), "config.json")
    assert train(dataclasses.replace(config, workdir=str(copy))).step == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_scores_that_cannot_be_kept_are_printed(place, tmp_path, capsys):
    copy = shutil.copytree(place / "films", tmp_path / "films")
    copy.chmod(0o555)
    main(["evaluate", str(copy)])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["step"] == 2 and "are not stored" in captured.err
    copy.chmod(0o755)


def test_a_file_of_scores_that_is_a_folder(place, tmp_path, capsys):
    copy = shutil.copytree(place / "films", tmp_path / "films")
    (copy / "scores.jsonl").mkdir()
    main(["evaluate", str(copy)])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["step"] == 2
    assert "are not stored for `transformer report`" in captured.err.replace("\n", " ")


def test_runs_beside_each_other(place):
    found = report(place / "run", place / "films")
    assert [run["name"] for run in found["runs"]] == ["run", "films"]
    assert {"objective.kind", "data.source"} <= set(found["differing"])
    assert "workdir" not in found["differing"] and "model.embed_dim" not in found["differing"]
    assert len(found["notes"]) == 1


def test_a_killed_run(run):
    """An unfinished last line and damaged lines are reported and left out."""
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 5, "split": "train", "lo')
    assert report(run)["runs"][0]["notes"] == [] and report(run)["runs"][0]["latest"] == 4
    path.write_bytes(whole + b'{"step": 5, "lo\n\0\0\0\n{"step": -1}\n' + b'{"step": 6, "split": "train", "loss": 1}\n')
    (found,) = report(run)["runs"]
    assert found["latest"] == 6 and "Left out: 3 damaged lines of its metrics.jsonl" in found["notes"][0]
    samples = run / "samples.txt"
    samples.write_bytes(samples.read_bytes() + b"---- step 6, 500 bytes\nIt wa")
    assert [step for step, _ in report(run)["runs"][0]["samples"]] == [2, 4]


def test_values_that_are_no_numbers(run):
    rows = ['"loss": NaN', '"loss": Infinity', '"loss": 1e999', '"loss": "x"', '"loss": true', f'"loss": {10**400}']
    (run / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "split": "train", {row}}}\n' for i, row in enumerate(rows))
    )
    (found,) = report(run)["runs"]
    assert found["curves"]["loss"]["train"] == [[0, 1, 2, 5], [None] * 4]
    assert "4 values not finite" in found["notes"][0]


def test_runs_in_a_bucket(place, tmp_path, monkeypatch, capsys):
    bucket = make_bucket(tmp_path, monkeypatch)
    shutil.copytree(place / "run", bucket / "run")
    (there,), (here,) = report("gs://b/run")["runs"], report(place / "run")["runs"]
    assert there == here
    main(["report", "gs://b/run", "-o", "gs://b/report.html"])
    assert data_of((bucket / "report.html").read_text("utf-8"))["runs"] == [here]
    with pytest.raises(UserError, match="must be a directory"):
        report("gs://b/other")


def test_a_run_without_metrics(run):
    (run / "metrics.jsonl").unlink()
    (run / "samples.txt").unlink()
    (found,) = report(run)["runs"]
    assert found["curves"] == {} and found["notes"] == ["It has no rows of metrics yet."]


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_missing_or_damaged(run, content):
    (run / "config.json").unlink()
    if content is not None:
        (run / "config.json").write_bytes(content)
    (found,) = report(run)["runs"]
    what = "missing" if content is None else "damaged"
    assert found["notes"] == [f"Its config.json is {what}; its settings are unknown."]


def test_damaged_scores(run):
    strange = [{"classes": ["a"], "confusion": [[1, 2]]}, {"classes": 3, "loss": "x", "split": None}, {}]
    lines = ["{", *map(json.dumps, strange)]
    (run / "scores.jsonl").write_text("\n".join(lines))
    (found,) = report(run)["runs"]
    assert "Line 1 of its scores.jsonl is damaged" in found["notes"][0]
    assert all("confusion" not in scores for scores in found["scores"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: [path / "absent"], "must be a directory"),
        (lambda path: [path], "must hold config.json, metrics.jsonl or checkpoints"),
        (lambda path: [path / "run", path / "run"], "named once"),
        (lambda path: [""], "must not be empty"),
        (lambda path: [], "at least one run"),
    ],
    ids=["absent", "no run", "twice", "empty", "none"],
)
def test_what_is_no_run(run, make, message):
    with pytest.raises(UserError, match=message):
        report_page(make(run.parent))


def test_runs_of_one_name(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other" / "run")
    assert [found["name"] for found in report(run, other)["runs"]] == [str(run), str(other)]


def test_the_page_must_be_new(run, tmp_path, capsys):
    for output, message in (("page.txt", ".html"), ("absent/page.html", "is none"), ("there.html", "exists")):
        (tmp_path / "there.html").write_text("mine")
        with pytest.raises(SystemExit):
            main(["report", str(run), "-o", str(tmp_path / output)])
        assert message in capsys.readouterr().err
    assert (tmp_path / "there.html").read_text() == "mine"


def test_times_are_left_out_of_comparisons(place):
    rows = read_jsonl(place / "run" / "metrics.jsonl")
    assert all(f"{part}_seconds" in TIMINGS for part in PARTS)
    assert rows[-1]["split"] == "validation" and rows[-1]["evaluation_seconds"] > 0
    assert rows[0]["compile_seconds"] > 0 and "start_seconds" in rows[0]


def test_the_pages_of_the_main_job(run, capsys, monkeypatch):
    write_run_pages(str(run), "It was cold")
    first = capsys.readouterr().err.replace("\n", " ")
    assert "attention.html" in first and "report.html" in first and "not written" not in first
    written = (run / "attention.html").read_text("utf-8")
    assert "It was cold" in "".join(data_of(written)["texts"]["decoder"])
    assert data_of((run / "report.html").read_text("utf-8"))["runs"][0]["name"] == "run"
    times = [(run / name).stat().st_mtime_ns for name in ("attention.html", "report.html")]
    write_run_pages(str(run), "It was cold")
    assert times == [(run / name).stat().st_mtime_ns for name in ("attention.html", "report.html")]

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("transformer.cli.pages.write_whole", full)
    later = (run / "report.html").stat().st_mtime + 5  # times are compared in seconds
    os.utime(run / "metrics.jsonl", (later, later))
    capsys.readouterr()
    write_run_pages(str(run), "It was cold")
    assert capsys.readouterr().err.replace("\n", " ").count("the disk is full") == 2
    assert (run / "attention.html").read_text("utf-8") == written
