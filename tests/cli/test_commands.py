"""Every command, end to end on eight devices: train, go on, evaluate, generate, inspect, prepare."""

import dataclasses
import json
import random
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from tiny_tokenizers import make_folder

from transformer.cli.main import main
from transformer.config import DataConfig, ParallelConfig
from transformer.data.datasets import open_data
from transformer.data.tokenizers.bpe import BytePairs
from transformer.data.tokenizers.folder import from_folder
from transformer.data.tokenizers.words import Words
from transformer.objectives.classification import Classification
from transformer.objectives.next_token import NextToken
from transformer.objectives.seq2seq import Seq2Seq
from transformer.parts import count_parameters
from transformer.runs.recipe import make_run
from transformer.runs.saved import load
from transformer.training import manifest
from transformer.training.checkpoint import Checkpointer

pytestmark = pytest.mark.usefixtures("compiled_once")

CONFIG = """
from transformer import AdamW, CosineSchedule
from transformer.config import Config, DataConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig

def get_config():
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=16, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(sequence_length=32, batch_size=8, record_bytes=512, validation_fraction=0.2, test_fraction=0.2),
        optimizer=AdamW(ema_decay=0.5),
        training=TrainingConfig(steps=6, log_every=2, eval_every=3, checkpoint_every=3, sample_length=8),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a config file and a folder of text."""
    directory = tmp_path_factory.mktemp("commands")
    words = random.Random(0)
    (directory / "text").mkdir()
    for index in range(40):
        text = " ".join(words.choice(("to", "be", "or", "not", "question")) for _ in range(words.randint(20, 90)))
        (directory / "text" / f"{index}.txt").write_text(f"file {index}: {text}")
    (directory / "config.py").write_text(CONFIG)
    return directory


@pytest.fixture
def arguments(place):
    """The config's arguments for `train` and `inspect`."""
    return [
        str(place / "config.py"),
        *("--data.source", str(place / "text"), "--data.data-dir", str(place / "prepared")),
    ]


@pytest.fixture(scope="module")
def workdir(place):
    """A finished run."""
    data = ("--data.source", str(place / "text"), "--data.data-dir", str(place / "prepared"))
    main(["train", str(place / "config.py"), *data, "--workdir", str(place / "run")])
    return place / "run"


def refused(arguments, capsys):
    """The message of a command that exits with 2."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# ---- train -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_readme_names(workdir):
    names = {path.name for path in workdir.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "tokenizer.json", "samples.txt", "tensorboard", "checkpoints"}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["split"]) for row in rows] == [
        (2, "train"),
        (3, "validation"),
        (4, "train"),
        (6, "train"),
        (6, "validation"),
    ]
    assert {"loss", "bits_per_byte", "accuracy", "tokens_per_second", "learning_rate", "grad_norm"} <= set(rows[0])
    assert all(row["bits_per_byte"] == pytest.approx(row["loss"] / np.log(2), rel=0.2) for row in rows)


def test_a_finished_run_says_so_and_more_steps_go_on(workdir, arguments, capsys, tmp_path):
    command = ["train", *arguments, "--workdir", str(workdir)]
    main(command)
    assert "is finished: step 6 of 6" in capsys.readouterr().err.replace("\n", "")
    before = (workdir / "metrics.jsonl").read_text()
    main([*command, "--training.steps", "6"])
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_finished_run_goes_on_with_a_new_schedule(workdir, arguments, capsys, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    command = ["train", *arguments, "--workdir", str(tmp_path / "run")]
    main(command)
    assert "--optimizer.schedule.restarts 6" in " ".join(capsys.readouterr().err.split())
    main([*command, "--training.steps", "8", "--optimizer.schedule.restarts", "6"])
    out = " ".join(capsys.readouterr().err.split())
    assert "learning rate 0.0001 at step 6, 0.001 at step 7: a new schedule begins." in out
    rates = [
        json.loads(line).get("learning_rate") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert rates[-2] == pytest.approx(1e-4)
    assert "before step 8, which this run has taken" in refused([*command, "--training.steps", "9"], capsys)


def test_the_hint_of_a_finished_run_can_be_followed(place, arguments, capsys, tmp_path):
    """Its warm-up is as it was, and so are the restarts that it has had, whatever the command line says of them."""
    (tmp_path / "config.py").write_text(CONFIG.replace("ema_decay=0.5", "schedule=CosineSchedule(warmup_steps=4)"))
    command = ["train", str(tmp_path / "config.py"), *arguments[1:], "--training.sample-length", "0"]
    command += ["--workdir", str(tmp_path / "run")]
    main(command)
    for done, restarts in ((6, "6"), (10, "6 10")):
        capsys.readouterr()
        main([*command, "--training.steps", str(done)])
        said = " ".join(capsys.readouterr().err.split())
        assert f"With --optimizer.schedule.restarts {restarts} it warms up" in said
        assert f"(--training.steps {done + 4} or more)" in said
        longer = [*command, "--optimizer.schedule.restarts", *restarts.split(), "--training.steps"]
        error = " ".join(refused([*longer, str(done + 3)], capsys).split())
        assert "at least --optimizer.schedule.warmup-steps=4, got 3; raise --training.steps" in error
        main([*longer, str(done + 4)])
        assert "a new schedule begins" in " ".join(capsys.readouterr().err.split())


def test_a_run_of_fewer_steps_goes_on_with_the_files(place, arguments, capsys, tmp_path):
    """The warm-up that followed the first steps stays when they are the file's again; with the command typed once more, too."""
    (tmp_path / "config.py").write_text(CONFIG.replace("ema_decay=0.5", "schedule=CosineSchedule(warmup_steps=4)"))
    command = ["train", str(tmp_path / "config.py"), *arguments[1:], "--training.sample-length", "0"]
    command += ["--workdir", str(tmp_path / "run")]
    main([*command, "--training.steps", "3"])
    capsys.readouterr()
    for _ in range(2):
        main(command)
        assert "note: --optimizer.schedule.warmup-steps 4 -> 2, as in the run that goes on" in capsys.readouterr().err
    assert load(tmp_path / "run").step == 6


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--model.num-layers", 10**9), ("--model.embed-dim", 10**9), ("--model.embed-dim", 200_000)),
        *(("--data.batch-size", 8 * 10**9), ("--data.batch-size", 3), ("--model.feed-forward.hidden-dim", 10**11)),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_data_is_prepared(flag, value, place, capsys, tmp_path):
    data = ("--data.source", str(place / "text"), "--data.data-dir", str(tmp_path / "prepared"))
    command = ["train", str(place / "config.py"), *data, flag, str(value), "--workdir", str(tmp_path / "run")]
    error = " ".join(refused(command, capsys).split())
    assert flag in error
    assert "documents" not in error
    assert not any(tmp_path.iterdir())


def test_pmap_goes_on_where_the_mesh_stopped(arguments, tmp_path):
    """Three steps over a mesh and three under pmap come as close to six over a mesh as rounding lets Adam."""
    sgd_like = ["--optimizer.eps", "1e-3", "--training.sample-length", "0"]
    command = ["train", *arguments, *sgd_like, "--optimizer.schedule.kind", "constant"]
    main([*command, "--workdir", str(tmp_path / "mesh")])
    main([*command, "--workdir", str(tmp_path / "both"), "--training.steps", "3"])
    main([*command, "--workdir", str(tmp_path / "both"), "--parallel.strategy", "pmap"])
    mesh, both = load(tmp_path / "mesh"), load(tmp_path / "both")
    assert mesh.step == both.step == 6
    for a, b in zip(jax.tree.leaves(mesh.params), jax.tree.leaves(both.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data.batch-size", "12", "--training.steps", "7"], "12"),
        (["--parallel.data", "9"], "9"),
        (["--model.vocab-size", "100"], "at least the tokenizer's 257, got 100"),
        (["--data.source", "nowhere.txt"], "nowhere.txt"),
        (["--training.sample-length", "5", "--training.sample-prompt", "x" * 31], "with end-of-text it has 32, and"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(arguments, change, message, capsys, tmp_path):
    workdir = tmp_path / "run"
    assert message in refused(["train", *arguments, *change, "--workdir", workdir], capsys)
    assert not workdir.exists()


def test_another_runs_directory_is_refused(workdir, arguments, capsys, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    message = refused(["train", *arguments, "--optimizer.learning-rate", "0.5", "--workdir", workdir], capsys)
    assert "--optimizer.learning-rate: 0.001 -> 0.5" in message
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds other files" in refused(["train", *arguments, "--workdir", tmp_path], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ---- load, evaluate, generate ----------------------------------------------------------------------------------------


def test_load_gives_the_average_where_there_is_one(workdir):
    loaded = load(workdir)
    config = dataclasses.replace(loaded.config, parallel=ParallelConfig(data=1))
    target = make_run(config, tokenizer=loaded.tokenizer).state
    state = Checkpointer(workdir / "checkpoints").restore(target).state
    average, last = jax.tree.leaves(state.ema_params), jax.tree.leaves(state.params)
    for got, average_leaf in zip(jax.tree.leaves(loaded.params), average, strict=True):
        np.testing.assert_array_equal(got, average_leaf)
    assert any(not np.array_equal(a, b) for a, b in zip(average, last, strict=True))


def test_evaluate_repeats_the_last_score_and_scores_other_text(workdir, place, capsys):
    main(["evaluate", str(workdir)])
    scores = json.loads(capsys.readouterr().out)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert scores["split"] == last["split"] == "validation"
    assert scores["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)
    assert 0 < scores["xz_bits_per_byte"] < 8

    # A document's bytes and its end are the tokens of the split.
    (place / "other.txt").write_text("to be or not to be " * 100)
    main(["evaluate", str(workdir), "--split", "train", "--data.source", str(place / "other.txt")])
    other = json.loads(capsys.readouterr().out)
    assert other["source"] == [str(place / "other.txt")]
    assert 0 < other["bytes"] < 1900
    assert other["loss"] != scores["loss"]


def test_evaluate_with_more_context_on_fewer_bytes(workdir, capsys):
    """With as much context as there is room for, and next to compressors on the same bytes."""

    def scores(*options):
        main(["evaluate", str(workdir), *options])
        return json.loads(capsys.readouterr().out)

    whole, cut = scores(), scores("--data.stride", "8", "--data.limit", "500")
    assert cut["targets"] == 500 < whole["targets"]
    assert 490 < cut["bytes"] <= 500
    assert whole["compressed_bytes"] == whole["bytes"] and abs(cut["compressed_bytes"] - cut["bytes"]) < 9
    assert cut["xz_bits_per_byte"] > whole["xz_bits_per_byte"]


def test_generate_repeats_by_seed(workdir, capsys):
    def generate(*options):
        main(["generate", str(workdir), "--prompt", "to be", "--max-new-tokens", "20", *options])
        return capsys.readouterr().out

    assert generate().startswith("to be")
    assert generate("--seed", "1") == generate("--seed", "1") != generate("--seed", "2")
    assert generate("--temperature", "0") == generate("--top-k", "1", "--temperature", "3")


def test_generate_goes_on_past_the_length(workdir, capsys):
    """The model's 32 tokens include the prompt and the token before it; beyond them, a note describes the window."""
    options = ("--seed", "1", "--max-new-tokens")
    main(["generate", str(workdir), "--prompt", "to be", *options, "26"])
    within = capsys.readouterr()
    assert within.err == ""
    main(["generate", str(workdir), "--prompt", "to be", *options, "70"])
    beyond = capsys.readouterr()
    assert beyond.out.startswith(within.out.removesuffix("\n")) and len(beyond.out.encode()) > 60
    assert beyond.err == (
        "note: the model reads 32 tokens at a time, and the text is longer. Whenever this window is full, only the last 16 are "
        "kept. The others have no effect any more: names and facts may change.\n"
    )
    main(["generate", str(workdir), "--prompt", "to be or not to be, " * 4, *options, "9"])
    long = capsys.readouterr()
    assert long.out.startswith("to be or not to be, " * 4)
    assert "The last 17 of the prompt's 81 tokens are read" in long.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{run}", "--prompt", "x" * 40], "leaves room for 0"),
        (["generate", "{run}", "--prompt", "x" * 40], "say how many tokens to add (--max-new-tokens)"),
        (
            ["generate", "{run}", "--prompt", "x", "--beams", "2", "--max-new-tokens", "32"],
            "leaves room for 30 of the model's 32, --max-new-tokens is 32; shorten the prompt or ask for fewer",
        ),
        (
            ["generate", "{run}", "--prompt", "x", "--max-new-tokens", "-5"],
            "error: --max-new-tokens must be at least 0 (up to the model's length), got -5.",
        ),
        (["generate", "{run}", "--prompt", "x", "--top-p", "2"], "--top-p must be above 0"),
        (["generate", "{place}", "--prompt", "x"], "must have a checkpoint, there is none in"),
        (["evaluate", "{place}/nowhere"], "must have a checkpoint, there is none in"),
        (
            ["evaluate", "{run}", "--split", "validaton"],
            "A split to score (--split) must be one of train, validation, test, or all, for {place}/text, got 'validaton'.",
        ),
        (["prepare", "{place}/nowhere"], "nowhere"),
        (
            ["prepare", "{place}/text", "--validation", "x", "--validation-fraction", "0.2"],
            "--validation-fraction is for text without --validation files",
        ),
        (
            ["prepare", "{place}/text", "--test", "x"],
            "--test is for --kind labelled or pairs, got --kind text",
        ),
        (
            ["prepare", "x", "--kind", "pairs", "--name", "x", "--record-bytes", "9"],
            "--record-bytes is for --kind text, got",
        ),
        (
            ["prepare", "{place}/text", "--tokenizer", "wordpiece"],
            "bytes, characters, bpe, words, or the directory of a run or of a pretrained model, got 'wordpiece'",
        ),
        (
            ["prepare", "{place}/text", "--tokenizer", "bytes", "--tokenizer-size", "300"],
            "--tokenizer-size and --tokenizer-bytes are for --tokenizer bpe or words, got 'bytes'",
        ),
        (
            ["prepare", "{place}/text", "--tokenizer", "{place}"],
            "must be a tokenizer.json or a SentencePiece tokenizer.model, {place} has neither",
        ),
    ],
)
def test_bad_requests_are_named(workdir, place, arguments, message, capsys):
    arguments = [argument.format(run=workdir, place=place) for argument in arguments]
    error = refused(arguments, capsys)
    assert message.format(place=place) in error
    assert "scoring" not in error, "before it was known that it could be scored"


# ---- inspect, prepare ------------------------------------------------------------------------------------------------


def test_inspect_shows_rows_masks_and_parameters(workdir, arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["inspect", *arguments])
    text = capsys.readouterr().out
    assert "file " in text  # decoded documents
    assert "■ ■ ·" in text
    assert "token_embedding/embedding" in text
    assert "257×16" in text
    params = load(workdir).params
    assert f"{count_parameters(params):,} parameters, vocabulary 257" in text
    assert all(name in text for name in ("query/kernel", "pre_attention_norm/scale", "down/kernel"))


def test_a_row_holds_as_many_documents_as_it_may(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "short.jsonl").write_text("".join(f'{{"text": "no {index}"}}\n' for index in range(400)))
    data = ["--data.source", str(tmp_path / "short.jsonl"), "--data.data-dir", str(tmp_path / "data")]
    shown = {}
    for most in (0, 3):
        command = [str(place / "config.py"), *data, "--data.max-segments", str(most)]
        main(["inspect", *command])
        out = capsys.readouterr().out
        assert re.search(
            r"^rows of \d+ documents: \d+% padding, \d+% cut, mean context lost \d+ tokens?$", out, re.MULTILINE
        )
        shown[most] = {int(count) for count in re.findall(r"row \d+: (\d+) documents", out)}
    assert shown[3] == {3} and min(shown[0]) > 3
    main(["train", *command, "--workdir", str(tmp_path / "run"), "--training.steps", "3"])
    assert (tmp_path / "run" / "checkpoints" / "3").exists()
    told = capsys.readouterr().err
    assert re.search(r"rows of \d+ documents: \d\d% padding, 0% cut", told)
    assert "A row ends after 3 documents; a larger data.max_segments packs more" in told
    main(["train", *command, "--workdir", str(tmp_path / "whole"), "--training.steps", "3", "--data.max-segments", "0"])
    told = capsys.readouterr().err
    assert re.search(r"rows of \d+ documents: 0% padding, \d+% cut", told) and "max_segments" not in told


def test_prepare_writes_what_train_would_read(place, capsys, tmp_path):
    command = ["prepare", str(place / "text"), "--data-dir", str(tmp_path)]
    main(command)
    first = capsys.readouterr().out
    assert first.startswith("text: train 36 documents, ")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    assert files
    main(command)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")} == files


def test_prepare_stores_the_tokens_that_train_would_read(place, capsys, tmp_path):
    options = ["--tokenizer", "bpe", "--tokenizer-size", "300", "--data-dir", str(tmp_path)]
    main(["prepare", str(place / "text"), *options])
    assert "tokens of the tokenizer bpe, 300 entries: stored\n" in capsys.readouterr().out
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("tokens-*.array_record*")}
    assert {path.name.split(".")[0] for path in stored} == {"tokens-train", "tokens-validation"}
    config = DataConfig(source=(str(place / "text"),), data_dir=str(tmp_path), tokenizer=BytePairs(size=300))
    data = open_data(config, NextToken())
    tokenizer = data.make_tokenizer()
    next(data.train_batches(tokenizer))
    list(data.evaluation_batches(tokenizer, "validation"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("tokens-*.array_record*")} == stored


@pytest.mark.parametrize("of", ["run", "pretrained"])
def test_prepare_stores_the_tokens_of_a_run_or_of_a_pretrained_model(workdir, place, capsys, tmp_path, of):
    folder = workdir if of == "run" else make_folder(tmp_path, "gpt2")
    main(["prepare", str(place / "text"), "--tokenizer", str(folder), "--data-dir", str(tmp_path / "data")])
    assert ": stored\n" in capsys.readouterr().out
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("tokens-*.array_record*")}
    assert {path.name.split(".")[0] for path in stored} == {"tokens-train", "tokens-validation"}
    data = open_data(DataConfig(source=(str(place / "text"),), data_dir=str(tmp_path / "data")), NextToken())
    if of == "run":
        tokenizer = load(workdir).tokenizer
    else:
        kind, files = from_folder(folder)
        tokenizer = kind.load(files["tokenizer.json"].decode())
    next(data.train_batches(tokenizer))
    list(data.evaluation_batches(tokenizer, "validation"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("tokens-*.array_record*")} == stored


@pytest.mark.parametrize("kind", ["labelled", "pairs"])
def test_prepare_stores_the_tokens_of_examples(capsys, tmp_path, kind):
    rows = [{"text": f"it is {i}", "label": i % 2, "source": f"it is {i}", "target": f"{i} it is"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "prepare",
        str(tmp_path / "rows.jsonl"),
        "--kind",
        kind,
        "--name",
        "mine",
        "--test",
        str(tmp_path / "rows.jsonl"),
    ]
    main([*command, "--tokenizer", "words", "--tokenizer-size", "30", "--data-dir", str(tmp_path)])
    assert "tokens of the tokenizer words, 30 entries: stored\n" in capsys.readouterr().out
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("tokens-*.array_record*")}
    assert {path.name.split(".")[0] for path in stored} == {"tokens-train", "tokens-test"}
    config = DataConfig(source=("mine",), data_dir=str(tmp_path), tokenizer=Words(size=30), batch_size=4)
    data = open_data(config, Classification() if kind == "labelled" else Seq2Seq())
    tokenizer = data.make_tokenizer()
    next(data.train_batches(tokenizer))
    for split in data.split_names:
        list(data.evaluation_batches(tokenizer, split))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("tokens-*.array_record*")} == stored


# ---- The requested checkpoint ----------------------------------------------------------------------------------------


def test_a_step_can_be_named_wherever_a_run_is_opened(workdir, arguments, capsys, tmp_path):
    """Two checkpoints, of which the earlier is made the better one."""
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    path = run / "checkpoints" / "6" / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"validation_loss": 99.0}))
    manifest.write_manifest(epath.Path(path.parent))
    found = {step: load(run, step=step) for step in ("latest", "best", 3, "6")}
    assert {step: loaded.step for step, loaded in found.items()} == {"latest": 6, "best": 3, 3: 3, "6": 6}
    assert not np.array_equal(*(jax.tree.leaves(found[step].params)[0] for step in ("latest", "best")))
    capsys.readouterr()
    for step, number in (("best", 3), ("latest", 6), ("3", 3)):
        main(["evaluate", str(run), "--step", step])
        assert json.loads(capsys.readouterr().out)["step"] == number
    greedy = ["--temperature", "0", "--max-new-tokens", "8", "--prompt", "a"]
    said = {}
    for step in ("best", "latest", "3"):
        main(["generate", str(run), "--step", step, *greedy])
        said[step] = capsys.readouterr().out
    assert said["best"] == said["3"]
    assert "step 5 has none: " in refused(["generate", run, "--step", "5", "--prompt", "a"], capsys)
    assert "must be latest, best or the number of one, got 'bset'" in refused(
        ["evaluate", run, "--step", "bset"], capsys
    )
    begin = ["train", *arguments, "--training.init-from", str(run), "--training.steps", "2"]
    main([*begin, "--training.init-from-step", "best", "--workdir", str(tmp_path / "other")])
    assert f"from {run}, step 3: " in capsys.readouterr().err.replace("\n", "")
    assert "--training.init-from-step must be latest, best" in refused(
        [*begin, "--training.init-from-step", "no"], capsys
    )


def test_training_stops_for_want_of_a_lower_loss(place, arguments, capsys, tmp_path):
    """Nothing is learnt: the first evaluation stays the best one."""
    still = ["--optimizer.learning-rate", "1e-30", "--optimizer.weight-decay", "0", "--training.sample-length", "0"]
    every = ["--training.eval-every", "1", "--training.checkpoint-every", "0", "--training.patience", "2"]
    command = ["train", *arguments, *still, *every, "--training.steps", "50", "--workdir", str(tmp_path / "run")]
    main(command)
    said = " ".join(capsys.readouterr().err.split())
    assert "Training stopped at step 3: no lower validation loss in 2 evaluations; the lowest, " in said
    assert load(tmp_path / "run", step="best").step == 1
    main(command)
    said = " ".join(capsys.readouterr().err.split())
    assert "is finished: step 3 of 50. Training stopped at step 3" in said
    main([*command, "--training.patience", "4"])
    assert load(tmp_path / "run").step == 5
    none = [*command, "--data.validation-fraction", "0", "--workdir", str(tmp_path / "none")]
    assert "--training.patience=2 counts evaluations of a validation split, and the data has none" in refused(
        none, capsys
    )
