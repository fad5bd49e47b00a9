"""Models of every family: our logits and transformers' on the same folder, in both directions."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import ALL, GREEDY, MODELS, TOKENS, TOLERANCE, VOCABULARY, difference, ours, theirs  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from transformer import generate, load  # noqa: E402
from transformer.generation.sampling import SamplingConfig  # noqa: E402
from transformer.generation.translate import translate  # noqa: E402
from transformer.interop.folder import Folder  # noqa: E402
from transformer.interop.reading import open_weights  # noqa: E402
from transformer.parts import Parts  # noqa: E402
from transformer.runs.export import export_model  # noqa: E402
from transformer.runs.pretrained import import_model  # noqa: E402

TABLE = "| `model_type` | class | variant | difference |\n|---|---|---|---|"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder of each case, saved once, with the model."""
    made = {}

    def folder(name):
        if name not in made:
            path = tmp_path_factory.mktemp("hf") / "model"
            model = ALL[name].build()
            model.save_pretrained(path)
            made[name] = path, model
        return made[name]

    return folder


@pytest.mark.parametrize("name", ALL)
def test_logits_are_theirs(name, folders):
    path, model = folders(name)
    expected, run = theirs(model, TOKENS), load(path)
    assert difference(ours(run, TOKENS), expected) <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_scanned_layers_are_read_as_looped_ones(name, folders):
    path, model = folders(name)
    opened = load(path)
    config = dataclasses.replace(opened.config, model=dataclasses.replace(opened.config.model, scan_layers=True))
    shapes = Parts(config, opened.tokenizer).shapes
    params = open_weights(Folder(path), config.model, shapes).read(shapes)
    assert difference(ours(opened, TOKENS, config.model, params), theirs(model, TOKENS)) <= TOLERANCE


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens_are_theirs(name, folders, record_property):
    """30 tokens for a batch of two rows of different length; where the two best logits nearly agree, either may be taken."""
    path, _ = folders(name)
    model = ALL[name].build()
    # Longer than the original length of longrope: transformers reads all again where a text crosses it, we do not.
    rows = [TOKENS[0][:20], TOKENS[1][:17]] if "longrope" in name else [TOKENS[0][:10], TOKENS[1][:7]]
    run, different = load(path), 0
    if run.config.objective.kind == "seq2seq":
        batch = translate(run.model, run.params, rows, end_of_text=VOCABULARY - 1, start=0, max_new_tokens=30)
    else:
        batch = generate(run.model, run.params, rows, max_new_tokens=30, sampling=SamplingConfig(temperature=0)).tokens
    width = max(map(len, rows))
    ids = torch.tensor(np.stack([np.pad(row, (width - len(row), 0)) for row in rows])).long()
    mask = torch.tensor(np.stack([np.arange(width) >= width - len(row) for row in rows])).long()
    theirs = model.generate(
        ids, attention_mask=mask, max_new_tokens=30, min_new_tokens=30, do_sample=False, eos_token_id=None
    )
    theirs = theirs[:, 1:] if run.config.objective.kind == "seq2seq" else theirs[:, width:]
    for row, found, expected in zip(rows, batch, theirs, strict=True):
        wrong = np.flatnonzero(np.asarray(found)[:30] != expected.numpy()[: len(found)])
        if len(wrong):
            different += 1
            assert near_tie(model, row, expected.numpy(), wrong[0]), f"{name}: {found} is not {expected}"
    record_property("near ties", (different, len(rows)))
    assert different <= 1


def near_tie(model, row, tokens, place):
    """Whether the token at a place was chosen by a hair's breadth."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            before = torch.tensor([[0, *tokens[:place]]]).long()
            logits = model(input_ids=torch.tensor(row[None]).long(), decoder_input_ids=before).logits[0, -1]
        else:
            logits = model(input_ids=torch.tensor([[*row, *tokens[:place]]]).long()).logits[0, -1]
    best = torch.topk(logits, 2).values
    return float(best[0] - best[1]) <= 1e-4 * float(logits.abs().max())


@pytest.mark.parametrize("name", ALL)
def test_an_export_is_the_import_bit_for_bit(name, folders, tmp_path):
    path, model = folders(name)
    import_model(path, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out")
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    ignored = set(json.loads((tmp_path / "run" / "import.json").read_text())["ignored_tensors"])
    assert set(after) == set(before) - ignored
    for tensor in after:
        assert after[tensor].dtype == before[tensor].dtype and after[tensor].tobytes() == before[tensor].tobytes(), (
            tensor
        )
    again, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    # Afresh: the growing base of a dynamic scaling depends on what a model has read before.
    first = type(model).from_pretrained(path, attn_implementation="eager")
    np.testing.assert_array_equal(theirs(again.eval(), TOKENS), theirs(first.eval(), TOKENS))
    assert_same_model(first.config, again.config)


def assert_same_model(before, after):
    """Nothing that a config says has changed, but for the version that wrote it."""
    left_out = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
    one, other = ({k: v for k, v in c.to_dict().items() if k not in left_out} for c in (before, after))
    assert {k: v for k, v in one.items() if other.get(k) != v} == {}


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_as_exact_as_theirs(name, folders):
    """The error of bfloat16 against float32 is at most 1.5 times transformers' own, on average over all logits."""
    path, model = folders(name)
    exact = theirs(model, TOKENS)
    run = load(path, dtype="bfloat16")
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(run.params))
    half = ours(run, TOKENS)
    model = type(model).from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    reference = theirs(model, TOKENS)
    error, own = (float(np.sqrt(np.mean((x - exact) ** 2))) for x in (half, reference))
    assert error <= 1.5 * own


def measured(folders):
    """A row of the table in docs/pretrained.md for each case."""
    for name in ALL:
        path, model = folders(name)
        logits = difference(ours(load(path), TOKENS), theirs(model, TOKENS))
        yield f"| `{model.config.model_type}` | {type(model).__name__} | {name.partition(', ')[2] or '–'} |", logits


def test_the_table_of_the_documentation_is_this(folders):
    """`UPDATE_TABLE=1 make test-parity` writes it anew."""
    page = pathlib.Path(__file__).parent.parent.parent / "docs" / "pretrained.md"
    text, rows = page.read_text(), dict(measured(folders))
    begin, end = text.index(TABLE) + len(TABLE), text.index("\n\n", text.index(TABLE))
    if os.environ.get("UPDATE_TABLE"):
        lines = "\n".join(f"{row} {value:.0e} |" for row, value in rows.items())
        page.write_text(f"{text[:begin]}\n{lines}{text[end:]}")
        return
    found = {
        line.rpartition("|")[0].rpartition("|")[0] + "|": float(line.split("|")[-2])
        for line in text[begin:end].split("\n")
        if line
    }
    assert set(found) == set(rows)
    assert all(rows[row] <= 4 * found[row] for row in rows), (
        "a difference has grown: UPDATE_TABLE=1 writes the table anew"
    )


def test_other_files_than_the_current_ones(folders, tmp_path):
    """Names without the prefix of models with a head, and configs as older versions of transformers wrote them."""
    path, model = folders("gpt2")
    model.transformer.save_pretrained(tmp_path / "bare")
    assert difference(ours(load(tmp_path / "bare"), TOKENS), theirs(model, TOKENS)) <= TOLERANCE
    path, model = folders("llama, llama3")
    old = tmp_path / "old"
    old.mkdir()
    for file in path.iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    values = json.loads((old / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope
    values["torch_dtype"] = values.pop("dtype")
    (old / "config.json").write_text(json.dumps(values))
    assert difference(ours(load(old), TOKENS), theirs(model, TOKENS)) <= TOLERANCE


def test_pieces_are_read_and_written(folders, tmp_path, monkeypatch):
    model = folders("llama")[1]
    model.save_pretrained(tmp_path / "pieces", max_shard_size="20KB")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 3
    assert difference(ours(load(tmp_path / "pieces"), TOKENS), theirs(model, TOKENS)) <= TOLERANCE
    monkeypatch.setattr("transformer.interop.writing.PIECE_BYTES", 20_000)
    import_model(tmp_path / "pieces", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    np.testing.assert_array_equal(theirs(again, TOKENS), theirs(model, TOKENS))
