"""The recipes of docs/how-to-add.md: each is saved as a file outside the package, its commands run, and its kind is used."""

import dataclasses
import json
import pathlib
import re
import runpy
import shlex
import sqlite3
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_folders
import pytest
from markdown_blocks import fenced_blocks

from transformer.cli.main import main
from transformer.data import registry
from transformer.kinds import _LOADED
from transformer.ops.attention import dot_product_attention
from transformer.ops.masks import AttentionMask
from transformer.ops.positions.none import NoPositions
from transformer.runs.saved import load
from transformer.types import UserError

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "how-to-add.md"
TINY = shlex.split(
    "--training.steps 2 --training.log-every 1 --training.sample-length 0 --training.eval-every 0 "
    "--optimizer.schedule.warmup-steps 0 --model.num-layers 1 --model.embed-dim 16 --model.attention.num-heads 2 "
    "--data.sequence-length 32 --data.batch-size 4 --data.buckets --data.data-dir data --parallel.data 1"
)


def recipes():
    """The sections of the page: for each heading, its Python and its lines of text."""
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]:
        found = fenced_blocks(section)
        blocks = {language: [text for kind, text in found if kind == language] for language in ("python", "text")}
        yield section.partition("\n")[0], blocks


RECIPES = dict(recipes())


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    """Saves the file of a recipe, and runs its commands in turn; gives what they printed, the last one last."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_KINDS", list(registry._KINDS))
    (tmp_path / "my_text.txt").write_text("A line of a user's own text, again and again.\n" * 40)

    def follow(heading):
        (code,), commands = RECIPES[heading]["python"], RECIPES[heading]["text"][-1].splitlines()
        (name,) = set(re.findall(r"\b(\w+)\.py\b", "\n".join(commands))) or {"size"}
        pathlib.Path(f"{name}.py").write_text(code)
        capsys.readouterr()
        return [type_line(shlex.split(line)) for line in commands]

    def type_line(words):
        if words[0] == "python":  # a file that ends with main()
            forget()
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
        else:
            assert words[0] == "transformer"
            main([*words[1:], *(TINY if words[1] == "train" else ())])
        return capsys.readouterr().out

    def forget():
        """As in a new process: the kinds of the package only."""
        for family in {kind.family for kind in _LOADED.values()}:
            ours = {name: kind for name, kind in family._kinds.items() if kind.__module__.startswith("transformer.")}
            monkeypatch.setattr(family, "_kinds", ours)

    return follow


def rows(run):
    found = map(json.loads, pathlib.Path(run, "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["split"] == "train"]


def config(run):
    return json.loads(pathlib.Path(run, "config.json").read_text())


def test_every_recipe_is_in_the_table_and_followed_here():
    linked = re.findall(r"^\| \[(.*?)\]\(#", PAGE.read_text(), flags=re.M)
    assert [name.capitalize() for name in linked] == [name.capitalize() for name in RECIPES]
    here = pathlib.Path(__file__).read_text()
    assert all(f'recipe("{name}")' in here for name in RECIPES)


def test_an_objective(recipe):
    _, scores = recipe("An objective")
    assert config("runs/focal")["objective"]["kind"] == "focal"
    first, second = rows("runs/focal")
    # Before training each of V tokens has about 1 / V: the factor (1 - 1 / V) to the power of one.
    assert 0.95 < first["objective"] / first["loss"] < 0.9999 and second["loss"] != first["loss"]
    assert json.loads(scores)["loss"] < first["loss"]


def test_a_position_kind(recipe):
    recipe("A position kind")
    assert config("runs/logarithmic")["model"]["positions"] == {"kind": "logarithmic", "steepest": 2.0}
    assert len(rows("runs/logarithmic")) == 2
    run = load("runs/logarithmic")
    bias = run.config.model.positions.bias(2, None).block(jnp.array([[3]]), jnp.array([[0, 3]]))
    np.testing.assert_allclose(bias, [[[[-2 * np.log(4), 0]], [[-np.log(4), 0]]]], rtol=1e-6)
    other = run.model.clone(config=dataclasses.replace(run.model.config, positions=NoPositions()))
    logits, without = (
        jax.jit(model.apply)({"params": run.params}, jnp.arange(10)[None]) for model in (run.model, other)
    )
    assert np.abs(without - logits).max() > 1e-4


def test_a_norm(recipe):
    recipe("A norm")
    assert len(rows("runs/l1_norm")) == 2
    run = load("runs/l1_norm")
    (block,) = run.config.model.pattern
    assert (block.norm.kind, block.norm.epsilon) == ("l1_norm", 1e-6)
    assert run.params["decoder"]["final_norm"]["scale"].shape == (16,)
    np.testing.assert_allclose(
        block.norm.normalize(jnp.array([3.0, -1.0]), lambda name, fill: fill), [1.5, -0.5], rtol=1e-5
    )


def test_an_attention_backend(recipe):
    recipe("An attention backend")
    assert len(rows("runs/einsum")) == 2
    assert config("runs/einsum")["model"]["pattern"][0]["attention"]["implementation"] == "einsum"
    query, key, value = (jax.random.normal(jax.random.key(n), (2, 7, heads, 4)) for n, heads in enumerate((4, 2, 2)))
    mask = AttentionMask.packed(jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2]]), causal=True, window=3)
    own, reference = (dot_product_attention(query, key, value, mask=mask, implementation=n) for n in ("einsum", "xla"))
    np.testing.assert_allclose(own, reference, atol=1e-6)
    with pytest.raises(UserError, match=r"einsum.*logits_soft_cap"):
        dot_product_attention(query, key, value, logits_soft_cap=1.0, implementation="einsum")


def test_an_optimizer(recipe):
    recipe("An optimizer")
    found = config("runs/signum")["optimizer"]
    assert (found["kind"], found["momentum"]) == ("signum", 0.5)
    assert len(rows("runs/signum")) == 2
    rule = load("runs/signum").config.optimizer.rule()
    gradient = {"w": jnp.array([2.0, -1.0])}
    state = rule.init(gradient)
    for turned, expected in ((1.0, [1, -1]), (-0.4, [1, -1]), (-4.0, [-1, 1])):
        update, state = rule.update(jax.tree.map(lambda x, by=turned: by * x, gradient), state)
        np.testing.assert_array_equal(update["w"], expected)


def test_a_data_source(recipe, tmp_path):
    database = sqlite3.connect(tmp_path / "texts.sqlite")
    database.execute("create table documents (number integer, body text)")
    database.executemany("insert into documents values (?, ?)", [(i, f"text number {i} " * 20) for i in range(40)])
    database.commit()
    database.close()
    recipe("A data source")
    assert len(rows("runs/sqlite")) == 2
    found = registry.find_source("texts.sqlite").rows("texts.sqlite", ("body",), "text")
    assert next(found) == ("texts.sqlite, row 1", {"number": 0, "body": "text number 0 " * 20})
    found.close()


def test_a_command(recipe, tmp_path, capsys):
    recipe("A norm")  # whose run it reads
    package = tmp_path / "size-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: size\nVersion: 1.0\n")
    declared = RECIPES["A command"]["text"][0].replace(
        '[project.entry-points."transformer.commands"]', "[transformer.commands]"
    )
    (package / "entry_points.txt").write_text(declared.replace('"', ""))
    (printed,) = recipe("A command")
    sizes = [leaf.size for leaf in jax.tree.leaves(load("runs/l1_norm").params)]
    assert printed == f"{sum(sizes):,} parameters\n"
    for arguments, code, expected in (
        (["size", "nowhere"], 2, "error: "),
        (["size"], 2, "error: `transformer size` needs WORKDIR"),
        (["size", "--help"], 0, "Count the parameters of a run's model."),
        (["sise"], 2, "  size      of size:main\n"),
    ):
        with pytest.raises(SystemExit, check=lambda stop, code=code: (stop.code or 0) == code):
            main(arguments)
        assert expected in "".join(capsys.readouterr()), arguments
    main(["--help"])
    assert "  size      of size:main\n" in capsys.readouterr().out


def test_a_command_of_the_package_comes_before_one_of_the_same_name(tmp_path, monkeypatch, capsys):
    package = tmp_path / "other-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[transformer.commands]\nprove = nowhere:main\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit):
        main(["prove", "--help"])
    assert "usage: transformer prove" in capsys.readouterr().out
    main(["--help"])
    assert "nowhere" not in capsys.readouterr().out


def test_a_model_family(recipe, tmp_path):
    values = {"model_type": "tinker", "architectures": ["TinkerForCausalLM"], "vocab_size": 11, "context": 16}
    values |= {"layers": 2, "width": 8, "heads": 2, "hidden": 12, "norm_eps": 1e-6}
    shapes = {"tokens": (11, 8), "norm": (8,)}
    for layer in range(2):
        shapes |= {f"layers.{layer}.attention.{name}": (8, 8) for name in "qkvo"}
        shapes |= {f"layers.{layer}.norm_{n}": (8,) for n in (1, 2)}
        shapes |= {f"layers.{layer}.up": (12, 8), f"layers.{layer}.down": (8, 12)}
    random = np.random.default_rng(0)
    tensors = {f"tinker.{n}.weight": random.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    pretrained_folders.write_folder(tmp_path / "tinker-tiny", values, tensors)
    described, *_ = recipe("A model family")
    assert "tinker" in described and "TinkerForCausalLM" in described
    again = tmp_path / "tinker-again"
    assert {key: json.loads((again / "config.json").read_text())[key] for key in values} == values
    assert stored(again / "model.safetensors") == stored(tmp_path / "tinker-tiny" / "model.safetensors")
    run, tokens = load("runs/tinker"), np.array([[1, 5, 7, 2]])
    logits = jax.jit(run.model.apply)({"params": run.params}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, by_hand(tensors, tokens), atol=1e-4)
    pretrained_folders.write_folder(tmp_path / "tinker-tiny", {**values, "twist": 3}, tensors)
    with pytest.raises(UserError, match="twist=3"):
        load(tmp_path / "tinker-tiny")


def stored(path):
    """Name -> shape and bytes of each tensor in a file of safetensors."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    header.pop("__metadata__", None)
    return {name: (entry["shape"], body[slice(*entry["data_offsets"])]) for name, entry in header.items()}


def by_hand(tensors, tokens_BT):
    """Logits of the model, in NumPy."""
    weight = {name.removeprefix("tinker.").removesuffix(".weight"): value for name, value in tensors.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight[name]

    def heads(x, name):
        return (x @ weight[name].T).reshape(*x.shape[:2], 2, 4).transpose(0, 2, 1, 3)

    def rotate(x):
        angles = np.arange(x.shape[2])[:, None] * 10_000.0 ** (-np.arange(0, 4, 2) / 4)
        (one, other), cos, sin = np.split(x, 2, axis=-1), np.cos(angles), np.sin(angles)
        return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)

    x = weight["tokens"][tokens_BT]
    for layer in ("layers.0", "layers.1"):
        y = norm(x, f"{layer}.norm_1")
        query, key, value = (heads(y, f"{layer}.attention.{name}") for name in "qkv")
        logits = rotate(query) @ rotate(key).swapaxes(-1, -2) / 2
        weights = np.exp(np.where(np.tri(tokens_BT.shape[1], dtype=bool), logits, -np.inf))
        y = (weights / weights.sum(-1, keepdims=True) @ value).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + y @ weight[f"{layer}.attention.o"].T
        y = norm(x, f"{layer}.norm_2")
        x = x + np.maximum(y @ weight[f"{layer}.up"].T, 0) @ weight[f"{layer}.down"].T
    return norm(x, "norm") @ weight["tokens"].T
