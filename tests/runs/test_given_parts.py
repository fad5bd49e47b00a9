"""A model, batches, a tokenizer and an objective of the caller's own: trained, gone on with to the bit, and asked for again."""

import dataclasses
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.cli.main import main
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.data.batches import BatchData
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objective import Objective
from transformer.objectives.classification import Classification
from transformer.objectives.next_token import NextToken
from transformer.optimizers.adamw import AdamW
from transformer.runs.directory import Record
from transformer.runs.given import Given, _same, describe
from transformer.runs.saved import load
from transformer.runs.scoring import evaluate
from transformer.runs.train import train
from transformer.training.writers import read_jsonl
from transformer.types import Batch, UserError

V, ROWS, T = 11, 8, 4


class Bigrams(nn.Module):
    """Two tables: the logits of a token are looked up by the one before."""

    width: int = 8
    axes: tuple[str | None, ...] | None = None

    @nn.compact
    def __call__(self, tokens_BT, *, positions_BT=None, segment_ids_BT=None, train=False):
        init = nn.initializers.normal(0.1)
        kernel_init = init if self.axes is None else nn.with_partitioning(init, self.axes)
        return nn.Dense(V, kernel_init=kernel_init)(nn.Embed(V, self.width, embedding_init=init)(tokens_BT))


class Letters:
    kind = "letters"
    vocab_size = V
    end_of_text = 0
    token_bytes = np.ones(V, np.int32)

    def encode(self, text):
        return np.array([1 + ord(letter) % (V - 1) for letter in text], np.int32)

    def decode(self, ids):
        return "".join(chr(96 + int(i)) for i in ids)

    def save(self, directory):
        raise AssertionError("it is given again")


def make_batch(seed, rows=ROWS):
    ids = np.random.default_rng(seed).integers(1, V, (rows, T + 1), dtype=np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def endless():
    return (make_batch(seed) for seed in itertools.count())


class Counted:
    """An iterator with a state of its own."""

    def __init__(self):
        self.seed, self.made = 0, []

    def __iter__(self):
        return self

    def __next__(self):
        self.made.append(self.seed)
        self.seed += 1
        return make_batch(self.seed - 1)

    def get_state(self):
        return {"seed": self.seed}

    def set_state(self, state):
        self.seed = state["seed"]


def config_of(workdir, parallel=None, vocab_size=V, **training):
    block = BlockConfig(AttentionConfig(num_heads=2))
    return Config(
        model=ModelConfig(vocab_size=vocab_size, num_layers=1, embed_dim=8, pattern=(block,)),
        data=DataConfig(sequence_length=T, batch_size=ROWS),
        parallel=parallel or ParallelConfig(data=1),
        training=TrainingConfig(**{"steps": 4, "log_every": 1, "checkpoint_every": 2, **training}),
        workdir=str(workdir),
    )


def leaves(workdir, **given):
    return [np.asarray(x) for x in jax.tree.leaves(load(workdir, **given).params)]


def rows(workdir, split="train"):
    return [row for row in read_jsonl(workdir / "metrics.jsonl") if row["split"] == split]


class Accident(Exception):
    pass


def die(step, state, statistics):
    if step == 3:
        raise Accident


@pytest.mark.parametrize(
    "make", [endless, Counted, lambda: [make_batch(seed) for seed in range(3)]], ids=["generator", "state", "list"]
)
@pytest.mark.parametrize("model", [None, Bigrams()], ids=["config's", "own"])
def test_batches_are_trained_on_and_gone_on_with_to_the_bit(tmp_path, make, model):
    """An endless iterator, an iterator with a state, and a repeated list, for the config's model and a user-defined one."""
    train(config_of(tmp_path / "whole"), data=make(), model=model)
    with pytest.raises(Accident):
        train(config_of(tmp_path / "other"), data=make(), model=model, hooks=(die,))
    going_on = make()
    train(config_of(tmp_path / "other"), data=going_on, model=model)
    given = {} if model is None else {"model": model}
    pairs = zip(leaves(tmp_path / "whole", **given), leaves(tmp_path / "other", **given), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert [row["step"] for row in rows(tmp_path / "other")] == [1, 2, 3, 4]
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "other")]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4
    if isinstance(going_on, Counted):
        assert going_on.made[0] == 2, "no batch is made again only to be skipped"
    assert set(json.loads((tmp_path / "other" / "given.json").read_text())) == {"data", *given}


def test_the_loss_agrees_with_the_batch(tmp_path):
    """Of uniform logits, ln V; and fields that are given count."""

    class Uniform(nn.Module):
        @nn.compact
        def __call__(self, tokens_BT, *, positions_BT=None, segment_ids_BT=None, train=False):
            return jnp.zeros((*tokens_BT.shape, V)) + self.param("nothing", nn.initializers.zeros, ())

    batch = make_batch(0) | {"weights": np.array([[False, True, False, False]] * ROWS)}
    train(config_of(tmp_path, steps=1), data={"train": [batch], "validation": [batch, batch]}, model=Uniform())
    assert rows(tmp_path)[0]["loss"] == pytest.approx(np.log(V))
    assert rows(tmp_path, "validation")[0]["loss"] == pytest.approx(np.log(V))


def test_a_run_is_loaded_with_what_made_it(tmp_path, capsys):
    made = {"model": Bigrams(), "tokenizer": Letters()}
    train(config_of(tmp_path), data=endless(), **made)
    for given, message in (
        (
            {"tokenizer": Letters()},
            r"with the model it was made with; .* was made with .*Bigrams\(width=8.*\), got none; in Py",
        ),
        ({**made, "model": Bigrams(width=9)}, r"Bigrams\(width=8, axes=None\), got .*Bigrams\(width=9"),
        ({"model": Bigrams()}, r"with the tokenizer it was made with; .*Letters, got none"),
        ({**made, "objective": NextToken()}, r"was made with none, got .*NextToken.*; leave out objective="),
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path, **given)
    run = load(tmp_path, **made)
    assert run.model == Bigrams() and run.tokenizer.encode("ab").tolist() == [8, 9]
    for command in (["evaluate"], ["generate", "--prompt", "a"], ["predict", "x.txt"]):
        with pytest.raises(SystemExit) as ended:
            main([command[0], str(tmp_path), *command[1:]])
        assert ended.value.code == 2
        assert "was made with" in capsys.readouterr().err.replace("\n", " ")
    for given, message in (
        ({}, r"A run continues with the model it began with, .*; give train\(model=...\) the same again"),
        (made, r"the data it began with"),
        ({**made, "data": endless(), "objective": NextToken()}, r"leave out objective="),
    ):
        with pytest.raises(UserError, match=message):
            train(config_of(tmp_path, steps=5), **given)


def test_a_run_on_ids_has_no_tokenizer(tmp_path):
    train(config_of(tmp_path), data=endless())
    run = load(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer to read 'a word' with; give load\(tokenizer="):
        run.encode("a word")
    assert load(tmp_path, tokenizer=Letters()).encode("ab").tolist() == [0, 8, 9]
    assert "bits_per_byte" not in rows(tmp_path)[0]
    with pytest.raises(UserError, match=r"must know how many there are, got model.vocab_size=0"):
        train(config_of(tmp_path / "open", vocab_size=0), data=endless())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            lambda: [make_batch(0, rows=5)],
            r"must have data.batch_size=8 rows, got inputs of shape .5, 4.; set data.batch",
        ),
        (
            lambda: iter([make_batch(0), make_batch(1)]),
            r"as long as training does, data= ended after 2; give an iterable that",
        ),
        (lambda: [], r"data= ended after 0"),
        (lambda: {"validation": [make_batch(0)]}, r"data= must have a split train, got validation"),
        (
            lambda: {"train": endless(), "validation": iter([])},
            r"validation of data= can be iterated once; give a list",
        ),
        (lambda: "text.txt", r"data= must be batches or splits of batches, got 'text.txt' for train; names of files"),
        (
            lambda: [{"inputs": make_batch(0)["inputs"]}],
            r"must have inputs, targets and may have .*, got inputs; an obj",
        ),
        (
            lambda: [make_batch(0) | {"labels": 1}],
            r"may have .*, got inputs, targets, labels; an objective of your own",
        ),
        (lambda: [make_batch(0) | {"inputs": np.full((ROWS, T), V, np.int32)}], r"below vocab_size=11.*holds 11 to 11"),
    ],
    ids=[
        *("other rows", "too few", "empty", "no train", "read once"),
        *("names of files", "a field is missing", "an unknown field", "too high an id"),
    ],
)
def test_data_that_cannot_be_trained_on_is_named(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        train(config_of(tmp_path), data=data())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": np.ones(ROWS, np.float32)}, r"weights of a batch .* must have the axes of .8, 4. .*, got .8."),
        ({"positions": np.zeros((ROWS, 1), np.int32)}, r"positions of a batch .* as long as the others.*, got .8, 1."),
        (
            {"segment_ids": np.ones((ROWS, T), np.float32)},
            "segment_ids of a batch given as data= must be integers, got float32",
        ),
        (
            {"inputs": np.ones((ROWS, T + 1), np.int32)},
            r"inputs of a batch .*data.sequence_length at most.*, got .8, 5.",
        ),
        ({"weights": None}, r"got weights of shape \[\]"),
    ],
    ids=["weights", "positions", "segment_ids", "inputs", "no weights"],
)
def test_fields_have_the_axes_and_types_of_the_batch(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(config_of(tmp_path), data=[make_batch(0) | changes])


def test_rows_may_be_shorter_and_ids_of_another_width(tmp_path):
    short = {name: values[:, :2].astype(np.int64) for name, values in make_batch(0).items()}
    train(config_of(tmp_path, steps=1), data=[short])
    assert rows(tmp_path)[0]["loss"] > 0


def test_labels_have_one_axis(tmp_path):
    labelled = {"inputs": make_batch(0)["inputs"], "labels": np.zeros((ROWS, 1), np.int32)}
    config = dataclasses.replace(config_of(tmp_path, vocab_size=V + 1), objective=Classification())
    with pytest.raises(UserError, match=r"labels of a batch given as data= must have the axes of .8. .*, got .8, 1."):
        train(config, data=BatchData([labelled], class_names=("no", "yes")))
    with pytest.raises(UserError, match=r"got num_classes=0; for your own batches, BatchData\(class_names="):
        train(config, data=[labelled])


class Gated(Bigrams):
    activation: object = nn.gelu
    sizes: tuple = (2, 3)


class Untyped(Letters):
    encode = property()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": Bigrams}, r"model= must be an object, got the class .*Bigrams; call it"),
        ({"model": 3}, "model= must be a linen module, got 3"),
        ({"objective": NextToken}, "objective= must be an object, got the class"),
        ({"objective": 3}, "objective= must be a transformer.Objective, got 3"),
        ({"optimizer": optax.adam}, "optimizer= must be an optax transformation"),
        ({"optimizer": AdamW()}, r"belongs into Config\(optimizer="),
        ({"tokenizer": Letters}, "tokenizer= must be an object"),
        ({"tokenizer": "gpt2"}, "tokenizer= must have kind, .*'gpt2' lacks kind, vocab_size"),
        ({"evaluators": [len]}, "evaluators= must be functions by name"),
        ({"hooks": print}, "hooks= must be a list of functions"),
        ({"writers": [1]}, "writers= must be a list of objects"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_such_object_is_refused_first(given, message):
    empty = {
        "model": None,
        "objective": None,
        "optimizer": None,
        "tokenizer": None,
        "evaluators": {},
        "writers": (),
        "hooks": (),
    }
    with pytest.raises(UserError, match=message):
        Given(**(empty | given)).check()


def test_models_differ_in_functions_tuples_and_modules_too():
    first, second = describe(Gated()), describe(Gated(activation=jnp.sin, sizes=(2, 4)))
    assert "gelu" in first and "(2, 3)" in first and "sin" in second and "(2, 4)" in second
    same = "a.b.M(width=8)", "__main__.M(width=8)"
    record = Record(None, 0, None, (), (), {}, None, {"model": same[0]})
    assert _same(*same) and not _same("a.b.M(width=8)", "__main__.M(width=9)") and not _same("a.BM", "__main__.M")
    assert record.given["model"] == same[0]


@pytest.mark.parametrize("value", [np.float64(2.0), jnp.float32(2.0), 2])
def test_evaluators_give_numbers(tmp_path, value):
    train(config_of(tmp_path / "a", steps=1), data=endless(), evaluators={"mine": lambda params: {"score": value}})
    assert rows(tmp_path / "a", "mine")[0]["score"] == 2.0


def test_an_evaluator_that_gives_no_names_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"An evaluator must give numbers by name, .* got 2.0"):
        train(config_of(tmp_path, steps=1), data=endless(), evaluators={"mine": lambda params: 2.0})


class Flat(nn.Module):
    outputs: int = V
    dtype: type = jnp.float32
    pooled: bool = False

    @nn.compact
    def __call__(self, tokens_BT, *, positions_BT=None, segment_ids_BT=None, train=False):
        logits = nn.Embed(V, self.outputs)(tokens_BT).astype(self.dtype)
        return logits[:, 0] if self.pooled else logits


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Flat(outputs=7), "a logit for each of the tokenizer's 11 ids, got 7"),
        (Flat(dtype=jnp.int32), "logits of a floating type, got int32"),
        (Flat(pooled=True), "must give logits .B, T, V. alone"),
    ],
)
def test_logits_agree_with_a_language_model(tmp_path, model, message):
    with pytest.raises(UserError, match=message):
        train(config_of(tmp_path), data=endless(), model=model)


class Placed(nn.Module):
    """A table of positions, as long as the rows that it is initialised with."""

    @nn.compact
    def __call__(self, tokens_BT, *, positions_BT=None, segment_ids_BT=None, train=False):
        table = self.param("table", nn.initializers.zeros, (tokens_BT.shape[1], V))
        return nn.Embed(V, V)(tokens_BT) + table[None]


def test_a_model_may_depend_on_the_length(tmp_path):
    train(config_of(tmp_path), data=endless(), model=Placed())
    run = load(tmp_path, model=Placed())
    assert run.params["table"].shape == (T, V)
    with pytest.raises(UserError, match="Predictions are of the package's models, this run has a user-defined Placed"):
        run.predict(["a"])


def test_epochs_are_of_batches_that_can_be_counted(tmp_path):
    reached = train(config_of(tmp_path, epochs=2.0), data=[make_batch(seed) for seed in range(3)])
    assert reached.step == 6 and rows(tmp_path)[-1]["epoch"] == 2
    with pytest.raises(UserError, match=r"needs batches that can be counted \(len\), got generator"):
        train(config_of(tmp_path / "b", epochs=2.0), data=endless())


def test_classes_are_named(tmp_path):
    labelled = {"inputs": make_batch(0)["inputs"], "labels": np.int32([0, 1] * (ROWS // 2))}
    config = dataclasses.replace(config_of(tmp_path, vocab_size=V + 1), objective=Classification())
    data = BatchData({"train": [labelled], "validation": [labelled]}, class_names=("no", "yes"))
    reached = train(config, data=data)
    assert {"accuracy", "macro_f1"} <= set(reached.metrics) and load(tmp_path).class_names == ("no", "yes")
    scores = evaluate(tmp_path, data={"validation": [labelled], "test": [labelled, labelled]}, split="test")
    assert scores["targets"] == 2 * ROWS and scores["loss"] == pytest.approx(reached.metrics["loss"], rel=1e-5)
    assert evaluate(tmp_path, data=[labelled])["targets"] == ROWS
    with pytest.raises(UserError, match=r"trained on batches of its own.*; give evaluate\(data=...\) batches"):
        evaluate(tmp_path)


class Squares(Objective):
    """Reads arrays of its own, and is not registered."""

    kind = "squares"
    reads = "text"
    model_class = nn.Dense

    def init_inputs(self, length):
        return (np.zeros((1, 3), np.float32),)

    def batch_shapes(self, config):
        rows = config.data.batch_size
        shapes = {"x": (rows, 3), "y": (rows, 1)}
        return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}

    def weight(self, batch):
        return jnp.float32(len(batch["x"]))

    def loss(self, model, vocabulary, params, carry, batch, key, train):
        error = model.apply({"params": params}, batch["x"]) - batch["y"]
        return (jnp.sum(error**2), self.weight(batch)), (carry, {"worst": jnp.max(jnp.abs(error))})


def test_an_objective_reads_arrays_of_its_own(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, 3)).astype(np.float32)
    batch = {"x": x, "y": x @ np.float32([[1], [2], [3]])}
    given = {"model": nn.Dense(1), "objective": Squares(z_loss=0.5)}
    config = config_of(tmp_path, steps=20, vocab_size=0)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.3))
    reached = train(config, data={"train": [batch], "validation": [batch]}, **given)
    assert reached.metrics["loss"] < 0.5 * rows(tmp_path)[0]["loss"] and "worst" in reached.metrics
    with pytest.raises(UserError, match=r"made with .*Squares\(.*z_loss=0.5.*, got .*Squares\(.*z_loss=0.0"):
        load(tmp_path, model=nn.Dense(1), objective=Squares())
    assert load(tmp_path, **given).params["kernel"].shape == (3, 1)


@pytest.mark.parametrize("strategy", ["fsdp", "pmap"])
def test_a_model_is_sharded_by_its_metadata(tmp_path, strategy, capsys):
    """Sharded is single; what has no metadata is whole on every device, and named."""
    spread = ParallelConfig(data=2, strategy="pmap") if strategy == "pmap" else ParallelConfig(data=1, fsdp=2)
    seen = {}

    def look(step, state, statistics):
        seen["kernel"] = state.params["Dense_0"]["kernel"].sharding
        seen["embedding"] = state.params["Embed_0"]["embedding"].sharding

    model = Bigrams(axes=("embed", "tensor"))
    train(config_of(tmp_path / "one"), data=endless(), model=model)
    capsys.readouterr()
    train(config_of(tmp_path / "spread", spread), data=endless(), model=model, hooks=(look,))
    said = capsys.readouterr().err.replace("\n", " ")
    if strategy == "fsdp":
        assert seen["kernel"].spec[0] == "fsdp" and seen["embedding"].is_fully_replicated
        assert "metadata, whole on every device: Dense_0/bias, Embed_0/embedding" in said
    for a, b in zip(*(leaves(tmp_path / name, model=model) for name in ("one", "spread")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    if strategy == "fsdp":
        with pytest.raises(UserError, match="must have a name of the sharding rules, got 'wide'; there are"):
            train(config_of(tmp_path / "c", spread), data=endless(), model=Bigrams(axes=("wide", None)))
        with pytest.raises(UserError, match="can be cut along each axis of a mesh once, got the names"):
            train(config_of(tmp_path / "d", spread), data=endless(), model=Bigrams(axes=("fsdp", "embed")))


class Narrow(nn.Module):
    @nn.compact
    def __call__(self, tokens_BT):
        return nn.Embed(V, V)(tokens_BT)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, tokens_BT, *, positions_BT=None, segment_ids_BT=None, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Embed(V, V)(tokens_BT))


@pytest.mark.parametrize("model", [Narrow(), Normed()], ids=lambda model: type(model).__name__)
def test_a_module_that_is_called_otherwise_is_refused_before_anything_is_written(tmp_path, model):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 100)
    config = config_of(tmp_path / "run", vocab_size=0)
    data = dataclasses.replace(config.data, source=(str(text),), data_dir=str(tmp_path / "data"), record_bytes=256)
    with pytest.raises(
        UserError, match=rf"model= must be a module that NextToken can train.*{type(model).__name__} gave"
    ):
        train(dataclasses.replace(config, data=data), model=model)
    assert not (tmp_path / "run" / "config.json").exists()


def test_batches_are_their_named_fields():
    batch = Batch.of(**make_batch(0), weights=np.zeros((ROWS, T), np.float32))
    assert batch.weights.sum() == 0 and batch.segment_ids is None and batch.positions[0].tolist() == [0, 1, 2, 3]
