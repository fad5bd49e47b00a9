"""configs/gpt.py: everything follows from the depth and the budget; a flag wins; a depth that cannot be is refused."""

import dataclasses
import importlib.util
import pathlib

import jax
import pytest

from transformer.cli.arguments import load_config, parse_config
from transformer.parts import initialize
from transformer.types import UserError

ROOT = pathlib.Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("ladder", ROOT / "benchmarks" / "ladder.py")
ladder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ladder)


def matrices(config):
    """Parameters of the matrices of blocks, counted in the model itself."""
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 257)
    params, _ = initialize(config.objective, config.objective.make_model(model), None)
    named = jax.tree_util.tree_leaves_with_path(params)
    found = [leaf.size for path, leaf in named if "blocks" in str(path) and "kernel" in str(path[-1])]
    return sum(found)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8, 12, 24])
def test_the_rule(depth):
    config = load_config(f"gpt:d{depth}")
    assert (config.model.num_layers, config.model.embed_dim) == (depth, 64 * depth)
    (block,) = config.model.pattern
    assert block.attention.num_heads == depth and block.attention.resolved_head_dim(config.model.embed_dim) == 64
    assert config.optimizer.learning_rate == pytest.approx(2.56 / config.model.embed_dim)
    batch = config.data.batch_size * config.data.sequence_length
    budget = 20 * 49_152 * depth**3
    assert budget <= batch * config.training.steps < budget + batch
    assert 1 / 2 <= batch**2 / (32 * budget) <= 2  # the nearest power of two
    assert batch & (batch - 1) == 0
    if depth <= 8:
        assert matrices(config) == 49_152 * depth**3


def test_the_budget_follows_from_the_depth():
    batch = {ratio: load_config(f"gpt:d4x{ratio}") for ratio in ("20", "80", "2.5")}
    tokens = {ratio: c.training.steps * c.data.batch_size * c.data.sequence_length for ratio, c in batch.items()}
    assert tokens["80"] == pytest.approx(4 * tokens["20"], rel=0.01)
    assert tokens["2.5"] == pytest.approx(tokens["20"] / 8, rel=0.01)
    assert batch["20"] == load_config("gpt:d4")
    assert load_config("gpt") == load_config("gpt:d12")


def test_a_flag_wins():
    words = ["gpt:d3", "--optimizer.learning-rate", "0.5", "--training.steps", "7", "--model.embed-dim", "96"]
    config = parse_config(words, command="transformer train")
    assert (config.optimizer.learning_rate, config.training.steps, config.model.embed_dim) == (0.5, 7, 96)
    assert config.workdir == "runs/gpt-d3"


@pytest.mark.parametrize(
    "variant", ["d0", "dx", "d-1", "d1000", "d97", "d", "12", "d12x", "d12x0", "d12x-3", "d1 ", "d²"]
)
def test_a_depth_that_cannot_be_is_refused(variant):
    with pytest.raises(
        UserError,
        match=r"A variant of gpt must be a depth from d1 to d96 \(d12\), or .* \(d12x40; 20 by default\), got '",
    ):
        load_config(f"gpt:{variant}")


def test_the_ladder_finds_the_exponent_of_a_power_law():
    sizes = [49_152.0 * depth**3 for depth in (1, 2, 3, 4)]
    fit = ladder.exponent(sizes, [7 * size**-0.076 for size in sizes])
    assert fit == {"exponent": 0.076, "half_interval": 0.0, "between": [0.076] * 3}
    assert ladder.exponent(sizes[:2], [2.0, 1.0])["half_interval"] is None
    bent = ladder.exponent(sizes, [1 + 7 * size**-0.5 for size in sizes])
    assert bent["between"] == sorted(bent["between"], reverse=True) and bent["half_interval"] > 0


def test_the_ladder_takes_runs_as_they_are(tmp_path, monkeypatch, capsys):
    """Finished runs are measured, not trained again."""
    for depth, loss in ((1, 2.0), (2, 1.5)):
        steps = load_config(f"gpt:d{depth}x4").training.steps
        rows = [
            f'{{"step": {steps}, "split": "train", "loss": 1.0, "tokens_per_second": 1000.0}}',
            f'{{"step": {steps}, "split": "validation", "loss": {loss}, "bits_per_byte": {loss}}}',
        ]
        (tmp_path / f"d{depth}x4").mkdir()
        (tmp_path / f"d{depth}x4" / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    monkeypatch.setattr("sys.argv", ["ladder.py", str(tmp_path), "--depths", "2", "1"])
    monkeypatch.setattr("subprocess.run", None)
    ladder.main()
    line = ladder.json.loads(capsys.readouterr().out)
    assert [rung["depth"] for rung in line["rungs"]] == [1, 2]
    assert line["rungs"][0]["tokens"] == 2048 * 96 and line["rungs"][0]["minutes"] == 3.3
    assert line["by_parameters"]["exponent"] == 0.138  # log(2 / 1.5) / log(8)
