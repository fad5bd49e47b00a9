"""Too little memory ends in what a step needs and what would make it fit, wherever it runs out; the arithmetic is the plan's."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer.cli import generate as cli_generate
from transformer.cli.main import main
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.classification import Classification
from transformer.runs import saved, scoring
from transformer.runs import train as runs_train
from transformer.training import out_of_memory
from transformer.training.out_of_memory import Needs, OutOfMemory, activation_bytes, explained, output_bytes
from transformer.training.state import TrainState
from transformer.types import UserError

FULL = [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456 bytes."),
    jax.errors.JaxRuntimeError("INTERNAL: std::bad_alloc"),
    MemoryError("Unable to allocate 7.45 GiB"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("memory")
    (directory / "text.txt").write_text("".join(f"Line {i} of a text.\n" for i in range(400)))
    return Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(
            source=(str(directory / "text.txt"),), data_dir=str(directory / "data"), sequence_length=16, batch_size=16
        ),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=2, sample_length=0),
    )


def large(**parts):
    """A model of a gigabyte of activations, and its state's shapes."""
    block = BlockConfig(AttentionConfig(num_heads=8))
    config = Config(
        model=ModelConfig(vocab_size=32_000, num_layers=12, embed_dim=512, pattern=(block,)),
        data=DataConfig(batch_size=16, sequence_length=512),
        parallel=ParallelConfig(data=1),
    )
    config = dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **c) for name, c in parts.items()}
    )
    weight = jax.ShapeDtypeStruct((10_000_000,), jnp.float32)
    return config, TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), weight, (weight, weight), (), jax.eval_shape(lambda: jax.random.key(0)), ()
    )


@pytest.mark.parametrize("error", FULL, ids=["device", "allocation", "host"])
@pytest.mark.parametrize("moment", ["make_run", "init_state", "step", "evaluate_step"])
def test_wherever_memory_runs_out_in_a_run(config, tmp_path, monkeypatch, moment, error):
    """While it is built, at the first state, at compilation or a step, at an evaluation."""
    made = runs_train.make_run

    def fail(*_, **__):
        raise error

    def make_run(*arguments, **options):
        run = made(*arguments, **options)
        if moment == "init_state":
            return run._replace(init_state=fail)
        # Of these tests only the first state is compiled.
        steps = {"step": lambda state, batch: (state, {}), moment: fail}
        monkeypatch.setattr(runs_train.loop._Report, "settle", lambda self: None)
        vars(run.runner).update(steps)
        return run

    monkeypatch.setattr(runs_train, "peak_flops", lambda *_: 0.0)
    monkeypatch.setattr(runs_train, "make_run", fail if moment == "make_run" else make_run)
    with pytest.raises(OutOfMemory) as raised:
        runs_train.train(dataclasses.replace(config, workdir=str(tmp_path / "run")))
    message = str(raised.value)
    if moment == "make_run":
        assert message.startswith("Building this run needs more memory than there is")
    else:
        assert re.search(
            r"A step needs about [\d.]+ MB: .* of state, .* of gradients, .* of activations and .* output", message
        )
        assert "optimizer.accumulate_steps=2 (about" in message and "objective.loss_chunks=8" in message


@pytest.mark.parametrize("name", ["load", "evaluate"])
def test_a_saved_run_that_does_not_fit(name, monkeypatch, tmp_path):
    def fail(*_):
        raise MemoryError

    for module in (saved, scoring):
        monkeypatch.setattr(module, "read_run", fail)
    with pytest.raises(OutOfMemory, match="this run needs more memory than there is"):
        getattr({"load": saved, "evaluate": scoring}[name], name)(tmp_path)


def test_a_generation_that_does_not_fit(monkeypatch, tmp_path, capsys):
    def load(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123456 bytes.")

    monkeypatch.setattr(cli_generate, "load", load)
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(tmp_path), "--prompt", "a"])
    assert ended.value.code == 2
    assert "error: Generating needs more memory than there is" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("no"), jax.errors.JaxRuntimeError("INTERNAL: no"), UserError("no")])
def test_other_errors_pass(error):
    with pytest.raises(type(error), match="no"), explained():
        raise error


def test_remedies_make_it_fit():
    needs = Needs(*large(), devices=1)
    parts = needs.state + needs.gradients + activation_bytes(needs.config) + output_bytes(needs.config)
    assert needs.total == parts
    assert needs.state == pytest.approx(3 * 4e7, abs=100) and needs.gradients == 4e7
    every = needs.remedies(0)
    assert "optimizer.accumulate_steps=2" in every and "fsdp=" not in every
    # Of less memory, fewer are left, and each one that is named does fit.
    for free in (needs.total * 0.6, needs.total * 0.3):
        for size, unit in re.findall(r"about ([\d.]+) ([GM]B)", needs.remedies(free)):
            assert float(size) * {"GB": 1e9, "MB": 1e6}[unit] <= free * 1.01
    assert "accumulate_steps=2 " not in needs.remedies(needs.total * 0.3)
    assert needs.remedies(1.0).startswith("What takes less:") and "a smaller model" in needs.remedies(1.0)


def test_what_is_used_already_is_not_offered():
    changed = {"optimizer": {"accumulate_steps": 16}, "model": {"remat": "full"}, "objective": {"loss_chunks": 8}}
    assert Needs(*large(**changed), devices=1).remedies(0) == (
        "What takes less: a smaller model, parallel.fsdp over more devices."
    )
    assert "parallel.fsdp=4" in Needs(*large(parallel={"data": -1}), devices=4).remedies(0)
    config, state = large()
    assert "loss_chunks" in Needs(config, state, devices=1).remedies(0)
    classifier = dataclasses.replace(config, objective=Classification())
    assert "loss_chunks" not in Needs(classifier, state, devices=1).remedies(0)


def test_a_device_has_its_part():
    config, state = large(parallel={"data": -1})
    alone, four = (Needs(config, state, devices=n) for n in (1, 4))
    assert activation_bytes(four.config) == activation_bytes(alone.config) / 4
    sharding = NamedSharding(Mesh(jax.devices()[:2], ("x",)), PartitionSpec("x"))
    spread = jax.ShapeDtypeStruct(state.params.shape, jnp.float32, sharding=sharding)
    assert Needs(config, state._replace(params=spread), 4).gradients == 2e7
    # The devices of a host share its memory.
    assert Needs(config, state, 4, local=4).state == 4 * four.state


def test_a_warning_before_the_first_step(monkeypatch):
    needs = Needs(*large(), devices=1)
    monkeypatch.setattr(out_of_memory, "free_bytes", lambda: needs.total * 0.7)
    assert re.search(
        r"GB are free\. It may not fit\. What would make it fit: \S+=\S+ \(about", out_of_memory.warning(needs)
    )
    for free in (0.0, needs.total):
        monkeypatch.setattr(out_of_memory, "free_bytes", lambda free=free: free)
        assert out_of_memory.warning(needs) == ""


def test_free_memory_is_the_least_of_machine_and_container(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    2000 kB\n",
        "/sys/fs/cgroup/memory.max": "1500000\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }
    monkeypatch.setattr(out_of_memory, "_read", lambda path: files.get(path, ""))
    assert out_of_memory.free_bytes() == 500_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert out_of_memory.free_bytes() == 2_048_000
    files.clear()
    assert out_of_memory.free_bytes() == 0
