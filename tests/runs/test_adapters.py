"""A run with adapters: its base is frozen, lies in no checkpoint, and is found again or refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from transformer.cli.main import main
from transformer.config import AdapterConfig, Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.config_io import CONFIG_FILE, to_dict
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.layers.adapters import merge, split
from transformer.layers.scan_params import loop_params
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objectives.classification import Classification
from transformer.optimizers.adamw import AdamW
from transformer.parts import Parts, StandIn, Steps, resolve
from transformer.runs.directory import BASE_FILE, read_run, stored_record
from transformer.runs.saved import load
from transformer.runs.scoring import evaluate
from transformer.runs.train import train
from transformer.schedules.constant import ConstantSchedule
from transformer.training.checkpoint import Checkpointer, read_description
from transformer.training.state import TrainState
from transformer.types import UserError

pytestmark = pytest.mark.usefixtures("compiled_once")
BYTES = ByteTokenizer()
TEXT = "the quick brown fox jumps over the lazy dog. " * 60


def config_of(tmp_path, name, *, steps=4, scan=False, dtype="float32", **parts):
    (tmp_path / "text.txt").write_text(TEXT)
    block = BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=2), FeedForwardConfig(hidden_dim=32, gated=True))
    model = ModelConfig(
        num_layers=2, vocab_size=264, embed_dim=16, pattern=(block,), scan_layers=scan, param_dtype=dtype
    )
    training = TrainingConfig(steps=steps, checkpoint_every=2, eval_every=0, log_every=1, sample_length=0)
    return dataclasses.replace(
        Config(
            model=model,
            data=DataConfig(source=(str(tmp_path / "text.txt"),), sequence_length=16, batch_size=8),
            optimizer=AdamW(learning_rate=0.01, schedule=ConstantSchedule()),
            training=training,
            parallel=ParallelConfig(data=1),
            workdir=str(tmp_path / name),
        ),
        **parts,
    )


def adapted(tmp_path, name, base, *, rank=4, steps=4, adapter=None, **parts):
    config = config_of(tmp_path, name, steps=steps, **parts)
    training = dataclasses.replace(config.training, init_from=str(tmp_path / base))
    return dataclasses.replace(config, training=training, adapter=adapter or AdapterConfig(rank=rank, dropout=0.1))


@pytest.fixture(name="trained", scope="module")
def train_base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    train(config_of(directory, "base"))
    return directory / "base"


@pytest.fixture(name="base")
def copy_base(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "base")
    return load(tmp_path / "base")


def same(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_the_base_is_frozen_and_the_checkpoint_holds_adapters_alone(tmp_path, base):
    reached = train(adapted(tmp_path, "lora", "base"))
    run = load(tmp_path / "lora")
    frozen, trained = split(run.params)
    assert same(frozen, base.params)
    assert all(np.abs(x).sum() > 0 for x in jax.tree.leaves(trained))
    arrays = read_description(checkpoint(tmp_path, "lora", 4))["arrays"]
    assert not [name for name in arrays if "kernel" in name or "embedding" in name or "scale" in name]
    assert arrays["params/decoder/blocks/block_0/attention/query/lora_a"] == "float32[16,4]"
    assert arrays["params/decoder/blocks/block_0/attention/query/lora_b"] == "float32[4,4,4]"
    assert arrays["params/decoder/blocks/block_1/attention/out/lora_a"] == "float32[4,4,4]"
    # What training measured is what is loaded.
    assert evaluate(tmp_path / "lora")["loss"] == pytest.approx(reached.metrics["loss"], abs=1e-6)
    # Merged, it is the same model.
    plain = run.model.clone(runtime=dataclasses.replace(run.model.runtime, adapter=AdapterConfig()))
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    logits = run.model.apply({"params": run.params}, tokens)
    merged = plain.apply({"params": merge(run.params, run.config.adapter.scale)}, tokens)
    assert float(jnp.abs(logits - plain.apply({"params": base.params}, tokens)).max()) > 1e-2
    np.testing.assert_allclose(logits, merged, atol=1e-5)


def checkpoint(tmp_path, name, step):
    return epath.Path(tmp_path / name / "checkpoints" / str(step))


def test_a_run_goes_on_to_the_bit(tmp_path, base):
    """A scanned stack beside the base of a looped one."""
    scan = True
    train(adapted(tmp_path, "whole", "base", scan=scan))
    train(adapted(tmp_path, "parts", "base", scan=scan, steps=2))
    train(adapted(tmp_path, "parts", "base", scan=scan))
    whole, parts = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert same(whole.params, parts.params)
    assert whole.params["decoder"]["blocks"]["block_0"]["attention"]["query"]["lora_a"].shape == (2, 16, 4)
    assert same(loop_params(split(whole.params)[0]), base.params)


def test_another_base_is_refused_and_a_moved_one_is_found(tmp_path, base, monkeypatch):
    train(adapted(tmp_path, "lora", "base", steps=2))
    go_on = adapted(tmp_path, "lora", "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    there = str(tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"(?s)need the base that they were trained on, step 4 of .*set training.init_from"
    ):
        train(go_on)
    with pytest.raises(UserError, match=r"(?s)there is none in .*If it is elsewhere, give it: --base DIR"):
        load(tmp_path / "lora")
    found = load(tmp_path / "lora", base=there)
    assert same(split(found.params)[0], base.params)
    assert evaluate(tmp_path / "lora", base=there)["step"] == 2
    train(dataclasses.replace(go_on, training=dataclasses.replace(go_on.training, init_from=there)))
    assert load(tmp_path / "lora").step == 4  # the run names the new place

    config = config_of(tmp_path, "base")
    train(dataclasses.replace(config, training=dataclasses.replace(config.training, seed=1)))
    with pytest.raises(UserError, match=r"whose manifest has the SHA-256 .*: it is another model, or it changed"):
        train(adapted(tmp_path, "lora", "base", steps=6))
    with pytest.raises(UserError, match="it is another model, or it changed"):
        load(tmp_path / "lora", base=tmp_path / "base")
    with pytest.raises(UserError, match="must have their rank and paths"):
        train(adapted(tmp_path, "twice", "lora", rank=2))
    assert not (tmp_path / "twice" / "metrics.jsonl").exists()

    # Another user, who has the directories and has never trained, names the base; the run's word is not taken.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    with pytest.raises(UserError, match="may name only a base that you have trained with"):
        load(tmp_path / "lora")
    assert load(tmp_path / "lora", base=there).step == 4
    with pytest.raises(UserError, match="A base belongs to adapters"):
        load(tmp_path / "base", base=there)


def test_a_base_in_bfloat16_stays_as_it_is_under_float32_adapters(tmp_path, base):
    """As an imported model is; training itself makes none."""
    record = read_run(tmp_path / "base", lambda record: record)
    shutil.rmtree(tmp_path / "base" / "checkpoints")
    config = dataclasses.replace(record.config, model=dataclasses.replace(record.config.model, param_dtype="bfloat16"))
    files = record.files | {CONFIG_FILE: json.dumps(to_dict(config)).encode()}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params)
    checkpointer = Checkpointer(tmp_path / "base" / "checkpoints", record=stored_record(files))
    checkpointer.save(TrainState(np.zeros((), np.int32), params, (), (), (), ()), {"evaluations": {}})
    checkpointer.close()
    with pytest.raises(UserError, match=r"(?s)as model.param_dtype; .*bfloat16"):
        train(adapted(tmp_path, "other", "base"))
    train(adapted(tmp_path, "lora", "base", steps=1, dtype="bfloat16"))
    frozen, trained = split(load(tmp_path / "lora").params)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert same(frozen, params)


def test_what_is_trained_whole_is_float32_too(tmp_path):
    config = dataclasses.replace(adapted(tmp_path, "x", "base", dtype="bfloat16"), objective=Classification())
    model = dataclasses.replace(config.model, pooler=True)
    trained = split(
        Parts(resolve(dataclasses.replace(config, model=model), BYTES), BYTES, class_names=("a", "b")).shapes
    )[1]
    assert {"classifier", "pooler"} < trained.keys()
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}


def test_gradients_of_the_base_are_not_computed(tmp_path):
    """They would be a third of a step's products."""

    def products(config):
        steps = Steps(resolve(config, BYTES), BYTES)
        batch = config.objective.batch_shapes(config)
        lowered = jax.jit(steps.train_step).lower(steps.state, batch)
        return lowered.compile().cost_analysis()["flops"]

    wide = {"model": dataclasses.replace(config_of(tmp_path, "x").model, embed_dim=128, remat="none")}
    with_adapters = adapted(tmp_path, "x", "base", adapter=AdapterConfig(rank=1), **wide)
    assert products(with_adapters) < 0.75 * products(config_of(tmp_path, "x", **wide))


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(data=2, fsdp=2, tensor=2), ParallelConfig(strategy="pmap", data=8)],
    ids=["mesh", "pmap"],
)
def test_over_devices_it_is_the_same_run(tmp_path, base, parallel):
    del base
    optimizer = AdamW(learning_rate=10.0, schedule=ConstantSchedule(), eps=1.0, weight_decay=0.0)
    adapter = AdapterConfig(rank=4)
    found = {}
    for name, devices in (("one", ParallelConfig(data=1)), ("several", parallel)):
        train(adapted(tmp_path, name, "base", steps=3, adapter=adapter, optimizer=optimizer, parallel=devices))
        found[name] = load(tmp_path / name).params
    assert np.abs(found["one"]["decoder"]["blocks"]["block_0"]["attention"]["query"]["lora_b"]).max() > 1e-5
    jax.tree.map(lambda one, several: np.testing.assert_allclose(one, several, atol=1e-5), *found.values())


def test_adapters_start_from_another_runs_adapters(tmp_path, base, monkeypatch):
    """On the command line: the directory of a run, and another for the new one."""
    monkeypatch.chdir(tmp_path)
    train(adapted(tmp_path, "lora", "base"))
    first = load(tmp_path / "lora")
    more = ["--workdir", "more", "--training.steps", "2", "--training.checkpoint-every", "1"]
    main(["train", "lora", *more, "--optimizer.learning-rate", "1e-12", "--optimizer.weight-decay", "0"])
    again = load(tmp_path / "more")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), again.params, first.params)
    assert same(split(again.params)[0], base.params)
    # It resumes to the bit, though its base is the base of the run that it started from.
    shutil.rmtree(tmp_path / "more" / "checkpoints" / "2")
    main(["train", "lora", *more, "--optimizer.learning-rate", "1e-12", "--optimizer.weight-decay", "0"])
    assert same(load(tmp_path / "more").params, again.params)
    with pytest.raises(SystemExit):
        main(["train", "lora", "--workdir", "other", "--adapter.rank", "2"])
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=r"need the base that they were trained on, step 4 of .*base"):
        load(tmp_path / "more")


def test_a_run_in_another_directory_starts_from_the_parameters(tmp_path, base, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    still = ["--training.steps", "1", "--optimizer.learning-rate", "1e-12", "--optimizer.weight-decay", "0"]
    main(["train", "base", "--workdir", "next", *still])
    assert "from base, step 4" in capsys.readouterr().err
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), load(tmp_path / "next").params, base.params)
    # Its own directory, however it is written, goes on; and one may start anew.
    main(["train", "base", "--workdir", "./base/", "--training.steps", "4"])
    assert "from base" not in capsys.readouterr().err
    main(["train", "base", "--workdir", "anew", "--training.init-from", "", *still])
    kernel = load(tmp_path / "anew").params["decoder"]["blocks"]["block_0"]["attention"]["query"]["kernel"]
    assert not np.allclose(
        kernel, base.params["decoder"]["blocks"]["block_0"]["attention"]["query"]["kernel"], atol=1e-3
    )


def test_a_run_without_adapters_has_nothing_of_them(tmp_path, base):
    assert split(base.params)[0] == ()
    assert not (tmp_path / "base" / BASE_FILE).exists()


def test_adapters_as_a_whole_model_to_start_from(tmp_path, base):
    """A run that trains all parameters starts from the merged model."""
    train(adapted(tmp_path, "lora", "base"))
    config = config_of(tmp_path, "full", steps=1)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-12)
    training = dataclasses.replace(config.training, init_from=str(tmp_path / "lora"))
    train(dataclasses.replace(config, training=training, optimizer=optimizer))
    merged = merge(load(tmp_path / "lora").params, AdapterConfig(rank=4).scale)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), load(tmp_path / "full").params, merged)


def test_settings_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"adapter.rank=2 without one; set training.init_from"):
        Config(adapter=AdapterConfig(rank=2))
    with pytest.raises(UserError, match=r"adapter.alpha is for runs with adapters \(adapter.rank\), got 2.0"):
        Config(adapter=AdapterConfig(alpha=2.0))
    with pytest.raises(UserError, match=r"must be regular expressions, got '\('"):
        AdapterConfig(rank=1, paths=("(",))
    config = resolve(
        adapted(tmp_path, "x", "base", adapter=AdapterConfig(rank=2, paths=("query/", "embedding"))), StandIn(11)
    )
    with pytest.raises(UserError, match=r"adapter.paths: 'embedding' must match the kernel of a linear layer"):
        Steps(config, StandIn(11))
