"""A run as a model of lm-eval: its answers agree with the model's logits, and user-defined tasks are scored with them."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markdown_blocks import fenced_blocks

from transformer import load
from transformer.cli.main import main
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.data.tokenizers.bpe import BytePairs
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objectives.masked_lm import MaskedLM
from transformer.objectives.prefix_lm import PrefixLM
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.runs.export import export_model
from transformer.runs.train import train
from transformer.types import UserError

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval and datasets have warnings of their own
TASKS = pathlib.Path(__file__).parent / "tasks"
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "use.md"
LENGTH = 24
BLOCK = BlockConfig(
    AttentionConfig(num_heads=4, num_kv_heads=2), FeedForwardConfig(24, "silu", gated=True), RMSNorm(epsilon=1e-6)
)
CONTEXTS = [
    ("the cat sat on the", " mat"),
    ("", "the cat"),
    ("a ", "b"),  # the space goes to the continuation
    ("a context that is longer than all that the model reads", " and its continuation"),
    ("x", " sat on the mat. the dog sat on the log. the cat"),  # longer than a window by itself
    ("the", " dog"),
]


def trained(path, name, steps, **kinds):
    config = Config(
        model=ModelConfig(num_layers=1, embed_dim=16, pattern=(BLOCK,), init_std=0.3),
        data=DataConfig(
            source=(str(path / "text.txt"),), sequence_length=LENGTH, batch_size=8, data_dir=str(path / "d"), **kinds
        ),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=steps, log_every=steps, eval_every=0, sample_length=0),
        objective=OBJECTIVES.get(name, Config().objective),
        workdir=str(path / name),
    )
    train(config)


OBJECTIVES = {"masked": MaskedLM(), "prefix": PrefixLM()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs, one of them exported and imported again, and the folder of tasks."""
    path = tmp_path_factory.mktemp("lm_eval")
    (path / "text.txt").write_text("the cat sat on the mat. the dog sat on the log.\n" * 60)
    trained(path, "run", 60, tokenizer=BytePairs(size=300))
    for name in OBJECTIVES:
        trained(path, name, 2)
    export_model(path / "run", path / "folder")
    main(["import", str(path / "folder"), "--workdir", str(path / "imported")])
    (path / "tasks").mkdir()
    for file in TASKS.iterdir():
        (path / "tasks" / file.name).write_text(file.read_text("utf-8").replace("FOLDER", str(path / "tasks")), "utf-8")
    rows = [json.loads(line) for line in (TASKS / "generation.jsonl").read_text().splitlines()]
    rows[0]["answer"] = greedy_text(load(path / "run"), rows[0]["question"], 12, (".",))  # one that is right
    (path / "tasks" / "generation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module", params=["run", "prefix", "imported", "folder"])
def both(request, place):
    """A model as it is, and as lm-eval takes it."""
    from transformer.runs.harness import HarnessModel  # noqa: PLC0415

    run = load(place / request.param)
    return run, HarnessModel(run, batch_size=3)


def instances(kind, arguments):
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    return [
        instance(request_type=kind, doc={}, arguments=args, idx=index, metadata=("t", index, 1))
        for index, args in enumerate(arguments)
    ]


@functools.partial(jax.jit, static_argnums=0)
def full_pass(model, params, row, prefix):
    return model.apply({"params": params}, row, **prefix)


def logits_of(run, ids, num_context):
    """Of each place of a row, by one full pass over all that the model reads: nothing behind a token has a part in its logits."""
    row = np.pad(ids, (0, LENGTH - len(ids)))[None]
    prefix = {"prefix_BT": np.arange(LENGTH)[None] < num_context} if run.model.bidirectional_prefix else {}
    return np.asarray(full_pass(run.model, run.params, row, prefix)[0], np.float32)[: len(ids)]


def direct(run, context, continuation):
    """Log-probability of ids behind others in one window, filled from the left, and whether each is the most likely."""
    row = [*context, *continuation]
    num_context = len(context)
    inputs = row[:-1]
    cut = max(0, len(inputs) - LENGTH)
    logits = logits_of(run, inputs[cut:], max(0, num_context - cut))[-len(continuation) :]
    found = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    chosen = found[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((found.argmax(-1) == continuation).all())


def test_loglikelihoods_agree_with_the_logits(both):
    run, model = both
    start = [run.tokenizer.end_of_text]
    found = model.loglikelihood(instances("loglikelihood", CONTEXTS))
    for (context, continuation), (value, greedy) in zip(CONTEXTS, found, strict=True):
        moved = len(context) - len(context.rstrip())
        context, continuation = context.rstrip(), context[len(context) - moved :] + continuation
        before = [*start, *run.tokenizer.encode(context)]
        whole = [*start, *run.tokenizer.encode(context + continuation)]
        behind = whole[len(before) :]
        expected = 0.0, True
        for first in range(0, len(behind), LENGTH):  # a continuation longer than the model reads has several windows
            some = direct(run, whole[: len(before) + first], behind[first : first + LENGTH])
            expected = expected[0] + some[0], expected[1] and some[1]
        assert math.isclose(value, expected[0], rel_tol=1e-4, abs_tol=1e-4) and greedy == expected[1]


def test_the_most_likely_continuation_is_said_to_be_so(both):
    run, model = both
    context, ids = [run.tokenizer.end_of_text, 116, 104], []
    for _ in range(4):
        ids.append(int(logits_of(run, [*context, *ids], len(context))[-1].argmax()))
    others = [[*ids[:place], ids[place] ^ 1, *ids[place + 1 :]] for place in range(4)]
    found = model._loglikelihood_tokens([(("", ""), context, behind) for behind in (ids, *others)])
    assert [greedy for _, greedy in found] == [True] + [False] * 4


def test_rolling_likelihoods_agree_with_lm_evals_windows(both):
    run, model = both
    texts = [json.loads(line)["text"] for line in (TASKS / "texts.jsonl").read_text("utf-8").splitlines()]
    found = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in [*texts, ""]]))
    windows, disjoint = lm_eval.utils.get_rolling_token_windows, lm_eval.utils.make_disjoint_window
    for text, value in zip(texts, found, strict=False):
        tokens = run.tokenizer.encode(text).tolist()
        parts = [disjoint(part) for part in windows(tokens, model.prefix_token_id, LENGTH, 1)]
        # The prefix of a prefix language model is what stands before the text: one id, which has no part in later windows.
        context = [1] + [0] * len(parts)
        expected = sum(
            of_window(run, inputs, behind, count) for (inputs, behind), count in zip(parts, context, strict=False)
        )
        assert len(parts) == -(-len(tokens) // LENGTH)
        assert math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-4)
    assert found[-1] == 0.0 and len(parts) > 2


def of_window(run, inputs, behind, num_context):
    row = [*inputs, *behind][:-1]
    found = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_of(run, row, num_context))))[-len(behind) :]
    return float(found[np.arange(len(behind)), behind].sum())


def greedy_text(run, context, count, until=()):
    """A token at a time, each by a full pass."""
    prompt = [run.tokenizer.end_of_text, *run.tokenizer.encode(context).tolist()]
    prompt = prompt[-max(LENGTH - count, LENGTH // 2) :]
    ids = list(prompt)
    for _ in range(min(count, LENGTH - len(prompt))):
        chosen = int(logits_of(run, ids, len(prompt))[-1].argmax())
        if chosen == run.tokenizer.end_of_text:
            break
        ids.append(chosen)
    before, whole = run.tokenizer.decode(prompt), run.tokenizer.decode(ids)
    assert whole.startswith(before)
    text = whole[len(before) :]
    for stop in until:
        text = text.partition(stop)[0]
    return text


@pytest.mark.parametrize(("count", "until"), [(6, ()), (200, ()), (200, ("g", "t."))])
def test_generated_text_is_the_greedy_one(both, count, until):
    run, model = both
    contexts = ["the cat sat on the", "a", "the dog sat on the log. the cat sat on the mat. the dog sat on", "", "one"]
    asked = {"until": list(until), "max_gen_toks": count, "do_sample": False, "temperature": 0.7}
    found = model.generate_until(instances("generate_until", [(context, asked) for context in contexts]))
    assert found == [greedy_text(run, context, count, until) for context in contexts]
    assert any(found)


def test_what_a_task_may_ask_for(both):
    _, model = both

    def generate(**kwargs):
        return model.generate_until(instances("generate_until", [("the", {"max_gen_toks": 16, **kwargs})] * 4))

    drawn = generate(do_sample=True, temperature=2.0, top_k=40)
    assert len(set(drawn)) > 1 and drawn == generate(do_sample=True, temperature=2.0, top_k=40)
    assert len(set(generate(do_sample=True))) > 1 and len(set(generate(temperature=0.0))) == 1
    assert generate(until="a")[0] == generate()[0].partition("a")[0]
    with pytest.raises(UserError, match="must be of those known here, got num_beams"):
        generate(num_beams=3)
    with pytest.raises(UserError, match="at least one new token, got 0"):
        generate(max_gen_toks=0)
    with pytest.raises(UserError, match=r"must have a token of its own, got \('the', ''\)"):
        model.loglikelihood(instances("loglikelihood", [("the", "")]))


def scores_of(capsys, *words):
    capsys.readouterr()
    main(["evaluate", *map(str, words)])
    return json.loads(capsys.readouterr().out)


def test_tasks_are_scored_with_lighter_weights(place, capsys):
    """The given type is used: scores differ from float32's by its rounding."""
    task = ("--tasks", "local_rolling", "--include-path", place / "tasks")
    own, light = (
        scores_of(capsys, place / "run", *task, *weights)["tasks"]["local_rolling"]["bits_per_byte"]
        for weights in ((), ("--weights", "int8"))
    )
    assert light != own and light == pytest.approx(own, rel=0.05)


@pytest.mark.parametrize("name", ["run", "imported", "folder"])
def test_user_defined_tasks_on_the_command_line(place, capsys, name):
    tasks = ("local_choice", "local_rolling", "local_generation")
    found = scores_of(capsys, place / name, "--tasks", *tasks, "--include-path", place / "tasks")
    assert found["workdir"] == str(place / name) and list(found["tasks"]) == list(tasks)
    run, start = load(place / name), [load(place / name).tokenizer.end_of_text]
    rows = [json.loads(line) for line in (TASKS / "choice.jsonl").read_text().splitlines()]
    hits = hits_per_byte = 0
    for row in rows:
        before = [*start, *run.tokenizer.encode(row["question"])]
        whole = [[*start, *run.tokenizer.encode(f"{row['question']} {choice}")] for choice in row["choices"]]
        values = np.array([direct(run, before, ids[len(before) :])[0] for ids in whole])
        hits += int(values.argmax() == row["answer"])
        # lm-eval divides by the length of the choice.
        hits_per_byte += int((values / [len(choice) for choice in row["choices"]]).argmax() == row["answer"])
    choice = found["tasks"]["local_choice"]
    assert choice["examples"] == len(rows) and math.isclose(choice["acc"], hits / len(rows))
    assert math.isclose(choice["acc_norm"], hits_per_byte / len(rows)) and "acc_stderr" in choice
    texts = [json.loads(line)["text"] for line in (TASKS / "texts.jsonl").read_text("utf-8").splitlines()]
    sizes = sum(len(text.encode()) for text in texts)
    whole = sum(text.log_probability for text in run.score(texts, stride=LENGTH))
    assert math.isclose(found["tasks"]["local_rolling"]["bits_per_byte"], -whole / math.log(2) / sizes, rel_tol=1e-4)
    rows = [json.loads(line) for line in (place / "tasks" / "generation.jsonl").read_text().splitlines()]
    right = [greedy_text(run, row["question"], 12, (".",)) == row["answer"] for row in rows]
    assert 0 < sum(right) < len(rows)
    assert math.isclose(found["tasks"]["local_generation"]["exact_match"], sum(right) / len(rows))


def test_the_task_of_the_page_runs(place, capsys, tmp_path, monkeypatch):
    (task,) = (text for language, text in fenced_blocks(PAGE.read_text("utf-8")) if language == "yaml")
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "my_task.yaml").write_text(task)
    (tmp_path / "my_tasks" / "questions.jsonl").write_text((TASKS / "choice.jsonl").read_text("utf-8"), "utf-8")
    monkeypatch.chdir(tmp_path)
    found = scores_of(capsys, place / "run", "--tasks", "my_task", "--include-path", "my_tasks", "--num-fewshot", 2)
    expected = scores_of(
        capsys, place / "run", "--tasks", "local_choice", "--include-path", place / "tasks", "--num-fewshot", 2
    )
    assert found["tasks"]["my_task"] == expected["tasks"]["local_choice"]


def test_fewer_examples_and_some_before_each(place, capsys):
    words = (place / "run", "--tasks", "local_choice", "--include-path", place / "tasks", "--limit", 3)
    assert scores_of(capsys, *words)["tasks"]["local_choice"]["examples"] == 3
    assert scores_of(capsys, *words, "--num-fewshot", 2)["tasks"]["local_choice"]["examples"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("run", "--tasks", "no_such_task"),
            "A task must be one of lm-eval's or of --include-path's, got no_such_task;",
        ),
        (("run", "--tasks", "x", "--include-path", "nowhere"), "A folder of tasks must be there, nowhere is not."),
        (
            ("masked", "--tasks", "x"),
            "this run's model is Encoder, its objective masked_lm; use `transformer evaluate`",
        ),
    ],
)
def test_what_is_refused(place, capsys, words, message):
    with pytest.raises(SystemExit):
        main(["evaluate", str(place / words[0]), *words[1:]])
    assert message in capsys.readouterr().err


def test_equal_to_lm_evals_own_model_of_transformers(place):
    """The same folder in PyTorch: log-probabilities, choices, rolling likelihoods and greedy text."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    # Its cache of logits gives one of two texts that begin alike the other's value, where their continuations differ in length.
    options = {"batch_size": 2, "dtype": "float32", "max_length": LENGTH, "logits_cache": False}
    hugging_face = pytest.importorskip("lm_eval.models.huggingface").HFLM(
        pretrained=str(place / "folder"), device="cpu", **options
    )
    model = __import__("transformer.runs.harness", fromlist=["harness"]).HarnessModel(load(place / "folder"))
    texts = [json.loads(line)["text"] for line in (TASKS / "texts.jsonl").read_text("utf-8").splitlines()]
    assert hugging_face.prefix_token_id == model.prefix_token_id
    short = [pair for pair in CONTEXTS if len(model.tok_encode(pair[1])) <= LENGTH]
    for kind, arguments in (("loglikelihood", short), ("loglikelihood_rolling", [(text,) for text in texts])):
        # It scores a token that the tokenizer puts before a text once more behind the one that stands there.
        hugging_face.add_bos_token = False if kind == "loglikelihood_rolling" else None
        theirs, ours = (getattr(lm, kind)(instances(kind, arguments)) for lm in (hugging_face, model))
        np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), rtol=1e-4, atol=1e-4)
    hugging_face.add_bos_token = None
    asked = [(context, {"until": ["."], "max_gen_toks": 10}) for context, _ in CONTEXTS if context]
    theirs, ours = (lm.generate_until(instances("generate_until", asked)) for lm in (hugging_face, model))
    assert theirs == ours
