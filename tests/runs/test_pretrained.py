"""A run becomes a Hugging Face folder, a folder a run, and a run goes on from it; without torch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import transformer
from transformer.cli.main import main
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.data.tokenizers.bpe import BytePairs
from transformer.interop.tensors import read_header
from transformer.layers.adapters import split
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.parallel.mesh import make_mesh
from transformer.runs import recipe, saved
from transformer.runs.export import export_model
from transformer.runs.pretrained import import_model
from transformer.runs.train import train
from transformer.types import UserError

BLOCK = BlockConfig(
    AttentionConfig(num_heads=4, num_kv_heads=2), FeedForwardConfig(24, "silu", gated=True), RMSNorm(epsilon=1e-6)
)
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, a run on it, and that run exported."""
    path = tmp_path_factory.mktemp("pretrained")
    (path / "text.txt").write_text(TEXT)
    config = Config(
        model=ModelConfig(num_layers=2, embed_dim=16, pattern=(BLOCK,)),
        data=DataConfig(
            source=(str(path / "text.txt"),), sequence_length=16, batch_size=8, data_dir=str(path / "data")
        ),
        training=TrainingConfig(steps=2, log_every=1, eval_every=0, sample_length=0),
        workdir=str(path / "run"),
    )
    train(config)
    bpe = dataclasses.replace(config, workdir=str(path / "bpe"))
    train(dataclasses.replace(bpe, data=dataclasses.replace(config.data, tokenizer=BytePairs(size=270))))
    export_model(path / "run", path / "folder")
    return path


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_comes_back_from_its_folder_bit_for_bit(place):
    run, folder = transformer.load(place / "run"), transformer.load(place / "folder")
    same(run.params, folder.params)
    tokens = jnp.array([run.tokenizer.encode("the clocks")])
    same(run.model.apply({"params": run.params}, tokens), folder.model.apply({"params": folder.params}, tokens))
    config = json.loads((place / "folder" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "float32" and config["num_key_value_heads"] == 2
    tensors, metadata = read_header(place / "folder" / "model.safetensors")
    assert metadata == {"format": "pt"} and "model.layers.1.self_attn.q_proj.weight" in tensors


def test_a_folder_writes_past_its_length_with_samples_stops_and_a_draft(place, capsys, tmp_path):
    """The id that begins each text stays in its window; rows of the run begin anywhere."""
    flags = ["--prompt", "It was a bright", "--max-new-tokens", "40", "--temperature", "0"]

    def generated(*arguments):
        main(["generate", *map(str, arguments)])
        return capsys.readouterr()

    plain = generated(place / "folder", *flags)
    assert "only the first 1 and the last 7 are kept" in plain.err
    assert "only the last 8 are kept" in generated(place / "run", *flags).err
    assert generated(place / "folder", *flags, "--draft", place / "run").out == plain.out
    stop = plain.out[20:24]
    assert generated(place / "folder", *flags, "--stop", stop).out == plain.out[: plain.out.index(stop, 15)] + "\n"
    (tmp_path / "rows.jsonl").write_text('{"text": "It was"}\n{"text": "a"}\n')
    rows = generated(
        place / "folder", "--prompt-file", tmp_path / "rows.jsonl", "--num-samples", "2", "--max-new-tokens", "20"
    ).out.splitlines()
    expected = transformer.load(place / "folder").generate(["It was", "a"], max_new_tokens=20, num_samples=2)
    assert [[row["continuation"], row["continuation_2"]] for row in map(json.loads, rows)] == expected


@pytest.mark.parametrize("name", ["run", "bpe"])
@pytest.mark.parametrize("text", ["the clocks", "", "Žluťoučký kůň\n\tna 😀\0", "a <|endoftext|> b"])
def test_the_tokenizer_of_a_folder_reads_as_the_runs_own(name, text, place):
    folder = place / "folder" if name == "run" else place / "bpe-folder"
    if not folder.exists():
        export_model(place / name, folder)
    own, theirs = (
        transformer.load(place / name).tokenizer,
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    theirs.encode_special_tokens = True
    assert theirs.encode(text).ids == [own.end_of_text, *own.encode(text).tolist()]
    again = transformer.load(folder).tokenizer
    assert again.encode(text).tolist() == own.encode(text).tolist()
    assert again.decode(again.encode(text)) == text
    assert (again.begin, again.end_of_text) == ((own.end_of_text,), own.end_of_text)


def test_an_imported_folder_is_a_run_that_others_start_from(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["import", str(place / "folder"), "--workdir", "base"])
    source = json.loads((tmp_path / "base" / "import.json").read_text())
    assert len(source["files"]["model.safetensors"]) == 64 and source["dtypes"] == "float32"
    main(["generate", "base", "--prompt", "the", "--max-new-tokens", "3", "--temperature", "0"])
    imported = capsys.readouterr().out
    main(["generate", str(place / "run"), "--prompt", "the", "--max-new-tokens", "3", "--temperature", "0"])
    assert imported == capsys.readouterr().out
    flags = ["--data.source", str(place / "text.txt"), "--data.data-dir", str(place / "data"), "--training.steps", "2"]
    main(["train", "base", *flags, "--training.log-every", "1", "--training.eval-every", "0"])
    told = capsys.readouterr().err
    assert "parameters taken" in told and "fresh" not in told and "differs" not in told
    tuned = transformer.load("base-tuned")
    assert not np.array_equal(
        tuned.params["token_embedding"]["embedding"], transformer.load("base").params["token_embedding"]["embedding"]
    )
    main(["export", "base-tuned", "out", "--dtype", "bfloat16"])
    before, after = (json.loads((p / "config.json").read_text()) for p in (place / "folder", tmp_path / "out"))
    assert after == before | {"torch_dtype": "bfloat16"}
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(transformer.load("out").params))


def test_adapters_are_trained_beside_an_import_in_bfloat16_and_come_back(place, tmp_path, monkeypatch, capsys):
    """The commands of the page, for the type that most models are published in."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data.source", str(place / "text.txt"), "--data.data-dir", str(place / "data"), "--training.steps", "2"]
    main(["import", str(place / "folder"), "--workdir", "base", "--dtype", "bfloat16"])
    main(["train", "base", "--adapter.rank", "2", *flags, "--workdir", "adapted"])
    main(["export", "adapted", "peft", "--adapter"])
    main(["import", "peft", "--base", "base", "--workdir", "back"])
    main(["train", "back", *flags, "--workdir", "more", "--optimizer.learning-rate", "1e-12"])
    assert "adapters as back has them" in " ".join(capsys.readouterr().err.split())
    found = [split(transformer.load(name).params) for name in ("adapted", "back", "more")]
    base = transformer.load("base").params
    for frozen, trained in found:
        jax.tree.map(np.testing.assert_array_equal, frozen, base)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(frozen))
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(trained))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), trained, found[0][1])
    main(["train", "base", *flags])
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(transformer.load("base-tuned").params))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "base"], "needs data of its own"),
        (
            ["train", "base", "--data.source", "{place}/text.txt", "--workdir", "base", "--training.init-from", ""],
            "in another",
        ),
        (["evaluate", "base"], "--data.source"),
        (["import", "{place}/folder", "--workdir", "base"], "base holds a run; choose another --workdir"),
        (["import", "{place}/folder"], "--workdir"),
        (["import", "{place}/nowhere", "--workdir", "x"], "must be a folder"),
        (["import", "{place}/run", "--workdir", "x"], "is the directory of a run; use it as it is"),
        (["export", "base", "{place}/folder"], "exists"),
        (["export", "base", "x", "--family", "bert"], "next_token"),
        (["export", "base", "x", "--family", "gpt2"], "positions"),
        (["export", "base", "x", "--family", "gpt5"], "model_type must be one of"),
    ],
)
def test_what_cannot_be_is_a_short_error(arguments, message, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import_model(place / "folder", "base")
    with pytest.raises(SystemExit) as stop:
        main([word.replace("{place}", str(place)) for word in arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_model_that_no_family_has_is_refused_by_its_fields(place, tmp_path):
    run = transformer.load(place / "run")
    odd = dataclasses.replace(run.config.model, logits_soft_cap=5.0, scale_embeddings=True)
    config = dataclasses.replace(run.config, model=odd, workdir=str(tmp_path / "odd"))
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, source=(str(place / "text.txt"),))))
    with pytest.raises(UserError, match=r"(?s)cannot express.*scale_embeddings: True -> False"):
        export_model(tmp_path / "odd", tmp_path / "out")


def test_parameters_are_read_onto_a_mesh(place):
    """Each device holds its part; nothing is read twice for a part that is not there."""
    mesh, folder = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), place / "even"  # a vocabulary of 270
    export_model(place / "bpe", folder)
    spread, whole = transformer.load(folder, mesh=mesh), transformer.load(folder)
    same(jax.device_get(spread.params), jax.device_get(whole.params))
    kernel = spread.params["decoder"]["blocks"]["block_0"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 2, 4)
    same(jax.device_get(transformer.load(place / "bpe", mesh=mesh).params), jax.device_get(whole.params))


def test_lighter_weights_of_a_folder_a_run_and_a_mesh(place):
    """Matrices are int8 in memory, also sharded over devices, and scores stay near the full model's scores."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    export_model(place / "bpe", place / "light")
    whole = transformer.load(place / "light")
    expected = whole.score(["It was a bright cold day"])[0].log_probability
    for light in (
        transformer.load(place / "light", weights="int8"),
        transformer.load(place / "bpe", weights="int8"),
        transformer.load(place / "bpe", weights="int8", mesh=mesh),
    ):
        kernel = light.params["decoder"]["blocks"]["block_0"]["attention"]["query"]["kernel"]
        assert kernel.values.dtype == jnp.int8
        found = light.score(["It was a bright cold day"])[0].log_probability
        assert 0 < abs(found - expected) < 0.01 * abs(expected)
    with pytest.raises(
        UserError, match="weights='int8' is for the package's models, this run has a user-defined Decoder"
    ):
        saved._lightened(dataclasses.replace(whole, own_model=True), "int8")


def test_parameters_do_not_alias_their_file(place, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in (place / "folder").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    run = transformer.load(folder)
    before = jax.device_get(jax.tree.map(jnp.copy, run.params))
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\xff" * (weights.stat().st_size // 2))
    same(run.params, before)


def test_a_run_reads_what_it_starts_from_onto_its_devices(place, tmp_path, monkeypatch):
    """No process holds a whole copy beside its shards; the state takes the place of what was read."""
    monkeypatch.setattr(recipe, "inherit_params", None)
    import_model(place / "folder", tmp_path / "base")
    base = transformer.load(tmp_path / "base")
    training = TrainingConfig(steps=1, eval_every=0, sample_length=0, init_from=str(tmp_path / "base"))
    data = dataclasses.replace(base.config.data, source=(str(place / "text.txt"),), data_dir=str(place / "data"))
    config = dataclasses.replace(base.config, data=data, training=training, parallel=ParallelConfig(fsdp=2))
    run = recipe.make_run(config)
    assert "parameters taken" in run.notes
    state = run.init_state()
    same(jax.device_get(state.params), jax.device_get(base.params))
    kernel = state.params["decoder"]["blocks"]["block_0"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 4, 4)
    # Parameters are trained in float32, whatever they are stored in.
    import_model(place / "folder", tmp_path / "half", dtype="bfloat16")
    started = dataclasses.replace(config, training=dataclasses.replace(training, init_from=str(tmp_path / "half")))
    params = recipe.make_run(started).init_state().params
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    same(
        jax.device_get(params),
        jax.tree.map(lambda x: np.asarray(x, np.float32), transformer.load(tmp_path / "half").params),
    )


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("place_of_kill", ["opened", "write_copies", "Checkpointer.save"])
def test_a_killed_import_leaves_no_run_and_the_same_command_works(place_of_kill, place, tmp_path, monkeypatch):
    def kill(*_, **__):
        raise Killed

    name = "Opened.params" if place_of_kill == "opened" else place_of_kill
    with monkeypatch.context() as patch:
        patch.setattr(f"transformer.runs.pretrained.{name}", kill)
        with pytest.raises(Killed):
            import_model(place / "folder", tmp_path / "run")
    with pytest.raises(UserError, match="must have a checkpoint"):
        transformer.load(tmp_path / "run")
    import_model(place / "folder", tmp_path / "run")
    same(transformer.load(tmp_path / "run").params, transformer.load(place / "folder").params)


@pytest.mark.parametrize("place_of_kill", ["write_weights", "tokenizer_texts"])
def test_a_killed_export_leaves_no_folder_and_the_same_command_works(place_of_kill, place, tmp_path, monkeypatch):
    def kill(*_, **__):
        (tmp_path / "out.tmp").mkdir(exist_ok=True)
        (tmp_path / "out.tmp" / "model.safetensors").write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"transformer.runs.export.{place_of_kill}", kill)
        with pytest.raises(Killed):
            export_model(place / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_model(place / "run", tmp_path / "out")
    same(transformer.load(tmp_path / "out").params, transformer.load(place / "folder").params)
    assert not (tmp_path / "out.tmp").exists()
