"""From labelled files to scores on the command line: prepare, pre-train, classify from there, evaluate."""

import json
import random
import re
import shutil

import jax
import numpy as np
import pytest

from transformer.cli.main import main
from transformer.layers.adapters import split
from transformer.runs.saved import load

pytestmark = pytest.mark.usefixtures("compiled_once")

CONFIG = """
from transformer import AdamW
from transformer.data.tokenizers.words import Words
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.classification import Classification
from transformer.objectives.masked_lm import MaskedLM

def get_config(variant=""):
    return Config(
        model=ModelConfig(
            num_layers=1, embed_dim=16, pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
            init_std=0.0,
        ),
        data=DataConfig(
            source=("mine",), tokenizer=Words(size=300), sequence_length=32, batch_size=8,
            **{"record_bytes": 512} if variant == "mlm" else {},
        ),
        objective=MaskedLM() if variant == "mlm" else Classification(),
        optimizer=AdamW(learning_rate=1e-2),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=100, log_every=20, eval_every=0, checkpoint_every=0),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dataset in which one word tells the class, prepared by name."""
    directory = tmp_path_factory.mktemp("classifier")
    words = random.Random(0)
    telling = {"good": "wonderful", "bad": "dreadful", "so-so": "tolerable"}
    for part, count in (("train", 200), ("test", 41)):
        with (directory / f"{part}.jsonl").open("w") as file:
            for index in range(count):
                label = list(telling)[index % 3]
                text = [
                    words.choice(["a", "film", "with", "some", "people", "in", "it"])
                    for _ in range(words.randint(1, 40))
                ]
                text.insert(words.randint(0, min(20, len(text))), telling[label])
                file.write(json.dumps({"text": " ".join(text), "label": label}) + "\n")
    (directory / "config.py").write_text(CONFIG)
    main(
        [
            *("prepare", str(directory / "train.jsonl"), "--kind", "labelled", "--name", "mine"),
            *("--test", str(directory / "test.jsonl"), "--data-dir", str(directory / "data")),
        ]
    )
    return directory


def train(place, name, *options, variant=""):
    config = str(place / "config.py") + (f":{variant}" if variant else "")
    main(["train", config, "--data.data-dir", str(place / "data"), "--workdir", str(place / name), *options])
    return place / name


def words(capsys):
    """What was said on the way, whatever the width of its lines."""
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def pretrained(place):
    return train(place, "mlm", "--data.source", str(place / "train.jsonl"), variant="mlm")


def test_a_classifier_learns_and_is_scored(place, capsys):
    workdir = train(place, "scratch")
    cut = re.search(
        r"batches of \d+ texts: \d+% padding, (\d+)% of texts cut A row has room for 31 tokens", words(capsys)
    )
    assert cut is not None
    assert 10 < int(cut[1]) < 50
    main(["evaluate", str(workdir), "--split", "test"])
    scores = json.loads(capsys.readouterr().out)
    confusion = np.array(scores["confusion"])
    assert scores["classes"] == ["bad", "good", "so-so"]
    assert confusion.sum(axis=1).tolist() == [14, 14, 13]
    assert scores["targets"] == 41
    texts = [json.loads(line)["text"] for line in (place / "test.jsonl").read_text().splitlines()]
    assert scores["cut_texts"] == sum(len(text.split()) > 31 for text in texts) > 0
    assert scores["accuracy"] == pytest.approx(np.trace(confusion) / 41)
    assert scores["accuracy"] > 0.8
    assert 0.5 < scores["macro_f1"] <= 1
    assert list(scores["per_class"]) == scores["classes"]
    assert [score["support"] for score in scores["per_class"].values()] == [14, 14, 13]
    recalls = np.diag(confusion) / confusion.sum(axis=1)
    assert [score["recall"] for score in scores["per_class"].values()] == pytest.approx(recalls)
    assert "bits_per_byte" not in scores
    assert scores["averages"]["macro"]["f1"] == pytest.approx(scores["macro_f1"])
    assert scores["averages"]["weighted"]["recall"] == pytest.approx(scores["accuracy"])
    found = load(workdir).predict(
        [json.loads(line)["text"] for line in (place / "test.jsonl").read_text().splitlines()]
    )
    bins = scores["calibration"]
    assert sum(row["texts"] for row in bins) == 41
    confidence = sum(row["texts"] * row["confidence"] for row in bins)
    assert confidence == pytest.approx(sum(row["probability"] for row in found), rel=1e-4)
    distances = [row["texts"] / 41 * abs(row["accuracy"] - row["confidence"]) for row in bins]
    assert scores["expected_calibration_error"] == pytest.approx(sum(distances), rel=1e-6)
    with pytest.raises(SystemExit) as exit_info:
        main(["generate", str(workdir), "--prompt", "a film"])
    assert exit_info.value.code == 2
    assert "must be a language model or a translator" in capsys.readouterr().err


def test_the_report_is_a_table_of_80_columns_and_a_picture(place, tmp_path, capsys, monkeypatch):
    """Names of classes come from elsewhere: markup, control characters, and any length."""
    names = {"good": "[/bold] \x1b[2J" + "very " * 20, "bad": "<script>", "so-so": "so-so"}
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()[:60]]
    path = tmp_path / "named.jsonl"
    path.write_text("".join(json.dumps(row | {"label": names[row["label"]]}) + "\n" for row in rows))
    workdir = tmp_path / "run"
    data = ("--data.source", str(path), "--data.data-dir", str(tmp_path / "d"), "--training.steps", "1")
    main(["train", str(place / "config.py"), *data, "--workdir", str(workdir)])
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    capsys.readouterr()
    picture = tmp_path / "picture.svg"
    main(["evaluate", str(workdir), "--reliability", str(picture)])
    out, err = capsys.readouterr()
    scores, lines = json.loads(out), re.sub(r"\x1b\[[\d;]*m", "", err).splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in "".join(lines) and "\\x1b[2J" in "".join(lines)
    rows = [line.split() for line in lines if re.search(r"\d\.\d{4} +\d\.\d{4} +\d\.\d{4} +\d", line)]
    expected = [*scores["per_class"].values(), *scores["averages"].values()]
    shown = [f"{row[name]:.4f}" for row in expected for name in ("precision", "recall", "f1")]
    assert [number for row in rows for number in row[-4:-1]] == shown and len(rows) == 5
    assert f"expected calibration error {scores['expected_calibration_error']:.4f}" in err
    assert f"expected calibration error {scores['expected_calibration_error']:.4f}" in picture.read_text()
    with pytest.raises(SystemExit):
        main(["evaluate", str(workdir), "--reliability", str(picture)])
    assert "--reliability must be a new file" in capsys.readouterr().err.replace("\n", " ")


def test_pre_training_is_masked_and_scored_alike_each_time(pretrained, capsys):
    rows = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["split"] == "validation"
    assert rows[-1]["loss"] < rows[0]["loss"]
    capsys.readouterr()
    main(["evaluate", str(pretrained)])
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)


def test_a_classifier_starts_from_it_and_says_so(place, pretrained, capsys):
    capsys.readouterr()
    workdir = train(
        place,
        "finetuned",
        "--training.init-from",
        str(pretrained),
        "--training.steps",
        "1",
        "--optimizer.learning-rate",
        "1e-9",
        "--model.dropout",
        "0.1",
    )
    printed = " ".join(capsys.readouterr().err.split())
    assert "parameters taken" in printed
    assert "fresh: classifier/kernel" in printed
    assert "reshaped" not in printed
    assert "differs: model.dropout: 0.0 -> 0.1" in printed
    assert printed.count("differs: ") == 1
    donor, own = load(pretrained), load(workdir)
    assert donor.config.model.vocab_size == own.config.model.vocab_size
    np.testing.assert_allclose(
        own.params["token_embedding"]["embedding"], donor.params["token_embedding"]["embedding"], atol=1e-6
    )
    assert (workdir / "tokenizer.json").read_text() == (pretrained / "tokenizer.json").read_text()


def test_it_goes_on_without_the_run_that_it_started_from(place, pretrained, capsys):
    donor = place / "donor"
    shutil.copytree(pretrained, donor)
    options = ("--training.init-from", str(donor), "--data.tokenizer", "auto")
    capsys.readouterr()
    train(place, "orphan", *options, "--training.steps", "1")
    assert f"tokenizer from {donor}: words, 12 entries" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(donor)
    workdir = train(place, "orphan", *options, "--training.steps", "2")
    recorded = json.loads((workdir / "config.json").read_text())["data"]
    assert recorded["tokenizer"] == {"kind": "words", "size": 300}
    assert "continuing from step 1" in " ".join(capsys.readouterr().err.split())
    assert load(workdir).step == 2


def test_another_tokenizer_than_the_starting_runs_is_refused(place, pretrained, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train(place, "refused", "--training.init-from", str(pretrained), "--data.tokenizer", "bpe")
    assert exit_info.value.code == 2
    assert (
        "has that run's tokenizer, got --data.tokenizer.kind=bpe (there words); give the same or"
        in capsys.readouterr().err
    )
    assert not (place / "refused").exists()


def test_classes_have_weights_from_the_training_split(place, capsys):
    weights = "--objective.class-weights"
    capsys.readouterr()
    train(place, "balanced", weights, "balanced", "--training.steps", "1")
    printed = " ".join(capsys.readouterr().err.split())
    # 180 of 200 texts train: 59 bad, 63 good, 58 so-so.
    (named,) = re.findall(r"class weights: bad ([\d.]+), good ([\d.]+), so-so ([\d.]+)", printed)
    counts = [180 / (3 * float(weight)) for weight in named]
    assert sum(counts) == pytest.approx(180, rel=1e-3) and counts == pytest.approx([round(n) for n in counts], rel=1e-3)
    train(place, "balanced", weights, "balanced", "--training.steps", "2")
    assert "continuing from step 1" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        train(place, "balanced", weights, "1", "2", "3", "--training.steps", "3")
    assert "--objective.class-weights: balanced -> [1.0, 2.0, 3.0]" in capsys.readouterr().err
    main(["evaluate", str(place / "balanced")])
    rows = [json.loads(line) for line in (place / "balanced" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["split"] == "validation"
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)


def test_a_dataset_is_scored_under_the_names_of_the_run(place, pretrained, capsys):
    workdir = train(place, "few", "--training.init-from", str(pretrained), "--training.steps", "1")
    lines = [json.loads(line) for line in (place / "test.jsonl").read_text().splitlines()]
    for name, renamed in (("two", "good"), ("strange", "fine")):
        rows = [line | {"label": line["label"].replace("good", renamed)} for line in lines if line["label"] != "bad"]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = ("--data-dir", str(place / "data"))
        main(["prepare", str(place / f"{name}.jsonl"), "--kind", "labelled", "--name", name, *data])
    capsys.readouterr()
    main(["evaluate", str(workdir), "--data.source", "two"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["classes"] == ["bad", "good", "so-so"]
    assert [sum(row) for row in scores["confusion"]] == [0, 14, 13]
    with pytest.raises(SystemExit):
        main(["evaluate", str(workdir), "--data.source", "strange"])
    error = " ".join(capsys.readouterr().err.split())
    assert "The classes of strange must be among the run's classes, bad, good, so-so, got fine too" in error


def test_inspect_shows_classes(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["inspect", str(place / "config.py"), "--data.data-dir", str(place / "data")])
    text = capsys.readouterr().out
    assert "class so-so" in text or "class good" in text or "class bad" in text
    assert "classifier/kernel" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective.class-weights", "1", "2"], "one a class (bad, good, so-so), got 2 numbers"),
        (["--objective.class-weights", "some"], "must be one of none, balanced, or numbers, got 'some'"),
        (["--data.source", "mine", "mine"], "read from one dataset, or from files"),
        (["--data.source", "unknown_name"], "unknown_name"),
        (["--data.label-key", "text"], "must name a ClassLabel"),
        (["--training.init-from", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work_is_refused(place, options, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train(place, "refused", *options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (place / "refused").exists()


def adapt(place, name, base, *options):
    return train(place, name, "--training.init-from", str(base), "--adapter.rank", "4", *options)


def trained_params(workdir):
    """Path -> array of what is trained."""
    leaves = jax.tree_util.tree_leaves_with_path(split(load(workdir).params)[1])
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}


def test_adapters_and_a_new_head_are_trained_beside_a_plain_encoder(place, pretrained, capsys):
    """Which has a head of its own, for masked words, that is left where it is."""
    workdir = adapt(place, "adapted", pretrained)
    assert "trained whole: classifier, 51 parameters, new" in words(capsys)
    found = trained_params(workdir)
    assert {path for path in found if "lora" not in path} == {"classifier/bias", "classifier/kernel"}
    arrays = json.loads((workdir / "checkpoints" / "100" / "checkpoint.json").read_text())["arrays"]
    assert {name for name in arrays if name.startswith("params/")} == {f"params/{name}" for name in found}
    frozen, body = load(workdir).params, load(pretrained).params
    np.testing.assert_array_equal(frozen["token_embedding"]["embedding"], body["token_embedding"]["embedding"])
    main(["evaluate", str(workdir), "--split", "test"])
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.8
    (place / "review.txt").write_text("a wonderful film")
    main(["predict", str(workdir), str(place / "review.txt")])
    assert json.loads(capsys.readouterr().out)["class"] == "good"


def test_adapters_and_a_head_go_on_to_the_bit(place, pretrained):
    options = ("--training.checkpoint-every", "10")
    whole = trained_params(adapt(place, "at_once", pretrained, *options, "--training.steps", "20"))
    adapt(place, "twice", pretrained, *options, "--training.steps", "20")
    shutil.rmtree(place / "twice" / "checkpoints" / "20")
    twice = trained_params(adapt(place, "twice", pretrained, *options, "--training.steps", "20"))
    assert all(np.array_equal(whole[path], twice[path]) for path in whole | twice)


@pytest.mark.parametrize("other", [False, True])
def test_a_head_of_the_same_classes_is_trained_on(place, pretrained, other, capsys):
    base = train(place, f"base{other}", "--training.init-from", str(pretrained), "--training.steps", "20")
    options = ("--optimizer.learning-rate", "1e-12", "--training.steps", "10", "--optimizer.weight-decay", "0")
    if other:  # the same texts with the names of their classes swapped
        names = {"good": "a", "bad": "b", "so-so": "c"}
        rows = map(json.loads, (place / "train.jsonl").read_text().splitlines())
        (place / "other.jsonl").write_text(
            "".join(json.dumps({"text": row["text"], "label": names[row["label"]]}) + "\n" for row in rows)
        )
        options += ("--data.source", str(place / "other.jsonl"))
    capsys.readouterr()
    found = trained_params(adapt(place, f"same{other}", base, *options))
    assert f"trained whole: classifier, 51 parameters, {'new' if other else f'as {base} has it'}" in words(capsys)
    kernel = np.asarray(load(base).params["classifier"]["kernel"])
    assert np.allclose(found["classifier/kernel"], kernel, atol=1e-6) != other
