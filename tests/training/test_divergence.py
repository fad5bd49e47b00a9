"""A run that diverges names the first layer whose activations or gradients were not finite, however it was trained."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.optimizers.adamw import AdamW
from transformer.runs import train as runs_train
from transformer.training.divergence import first_not_finite, split
from transformer.types import Loss, UserError


class Model(nn.Module):
    """Three layers; a switch makes one of them go wrong."""

    wrong: str = ""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        x = nn.Dense(4, name="second")(x)
        if self.wrong == "activation":
            x = x / jnp.zeros_like(x)
        x = nn.Dense(4, name="third")(x)
        if self.wrong == "gradient":
            return x * 0 + jnp.sqrt(x * 0)  # of which the derivative at 0 is infinite
        return x


class Tied(nn.Module):
    """As a language model whose embedding is its last layer, too; the gradient goes wrong after one of its layers."""

    wrong: str = ""

    @nn.compact
    def __call__(self, x):
        def spoil(x, name):
            return x * 0 + jnp.sqrt(x * 0) if name == self.wrong else x

        embedding = nn.Embed(3, 4, name="embedding")
        x = spoil(embedding(jnp.int32(x[:, 0])), "embedding")
        for name in ("first", "second", "third"):
            x = spoil(nn.Dense(4, name=name)(x), name)
        return spoil(embedding.attend(x), "logits")


@pytest.mark.parametrize("wrong", ["embedding", "first", "second", "third", "logits"])
def test_a_tied_embedding_is_not_named_for_what_goes_wrong_before_it(wrong):
    assert f"the first gradient that is not belongs to {wrong.replace('logits', 'embedding')}" in find(
        wrong, model=Tied
    )


def find(wrong, *, model=Model, params=lambda p: p, weight=1.0):
    model = model(wrong)
    made = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]

    def loss(params, carry, batch, key, train):
        del key, train
        return (jnp.sum(model.apply({"params": params}, batch)) * weight, jnp.float32(len(batch))), (carry, {})

    objective = Loss(lambda batch: jnp.float32(len(batch)), loss)
    parts = split((), np.ones((4, 4), np.float32), jax.random.key(0), accumulate_steps=2)
    return first_not_finite(objective, params(made), list(parts))


def test_what_is_named():
    assert find("") == ""
    assert find("activation") == "The first activations of that step that are not finite are in third."
    assert "finite; the first gradient that is not belongs to third (its output)." in find("gradient")
    assert (
        find("", weight=np.inf)
        == "All activations of that step are finite, its loss is not: look at the targets and weights."
    )

    def spoilt(params):
        return {**params, "second": jax.tree.map(lambda x: x * jnp.nan, params["second"])}

    assert find("", params=spoilt) == "The parameter second/bias was not finite before that step."


@pytest.mark.parametrize(("devices", "accumulate_steps"), [(1, 1), (1, 4), (2, 2)])
def test_parts_agree_with_the_step(devices, accumulate_steps):
    """Rows of each device, and of these every n-th, each part with a key of its own."""
    parts = list(
        split(np.arange(8), {"x": np.arange(8)}, jax.random.key(1), devices=devices, accumulate_steps=accumulate_steps)
    )
    rows = [part["x"].tolist() for _, part, _ in parts]
    expected = {
        (1, 1): [[0, 1, 2, 3, 4, 5, 6, 7]],
        (1, 4): [[0, 4], [1, 5], [2, 6], [3, 7]],
        (2, 2): [[0, 2], [1, 3], [4, 6], [5, 7]],
    }
    assert rows == expected[devices, accumulate_steps] == [carry.tolist() for carry, _, _ in parts]
    assert len({jax.random.key_data(key).tobytes() for *_, key in parts}) == len(parts)


CASES = {
    "looped": {},
    "scanned": {"model": {"scan_layers": True, "remat": "full"}, "objective": {"loss_chunks": 2}},
    "pmap": {"parallel": {"strategy": "pmap", "data": 2}, "optimizer": {"accumulate_steps": 2}},
    "mesh": {"parallel": {"fsdp": 2, "data": 1}},
    "float16": {"model": {"dtype": "float16"}},
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.exhaustive] * (c in ("looped", "mesh"))) for c in CASES]
)
def test_a_run_that_diverges_names_the_layer(tmp_path_factory, monkeypatch, case):
    """Its second block's last product overflows; it is found from the first state, in float16 sixteen steps later."""
    directory = tmp_path_factory.getbasetemp() / "divergence"
    directory.mkdir(exist_ok=True)
    (directory / "text.txt").write_text("".join(f"Line {i} of a text.\n" for i in range(400)))
    config = Config(
        model=ModelConfig(num_layers=2, embed_dim=8, pattern=(BlockConfig(AttentionConfig(num_heads=2)),)),
        data=DataConfig(
            source=(str(directory / "text.txt"),), data_dir=str(directory / "data"), sequence_length=16, batch_size=8
        ),
        optimizer=AdamW(learning_rate=1e-5),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(steps=30, log_every=1, sample_length=0, eval_every=0),
        workdir=str(directory / case),
    )
    config = dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **changes) for name, changes in CASES[case].items()}
    )
    made = runs_train.make_run

    def spoil(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("decoder/blocks/")
        block = "block_0" if case == "scanned" else "block_1"
        if name == f"{block}/feed_forward/down/kernel":
            large = 3e38
        elif name == f"{block}/feed_forward/up/kernel" and case != "float16":
            large = 1e20
        else:
            return x
        return x.at[1].set(jnp.sign(x[1]) * large) if case == "scanned" else jnp.sign(x) * large

    def make_run(*arguments, **options):
        run = made(*arguments, **options)

        def init_state():
            state = run.runner.fetch_state(run.init_state())
            large = jax.tree_util.tree_map_with_path(spoil, state.params)
            return run.runner.place_state(state._replace(params=large))

        return run._replace(init_state=init_state)

    monkeypatch.setattr(runs_train, "make_run", make_run)
    monkeypatch.setattr(runs_train, "peak_flops", lambda *_: 0.0)
    named = r"The first activations of that step that are not finite are in decoder/blocks/block_1/feed_forward/down\."
    with pytest.raises(UserError, match=f"must be finite, .*{named}"):
        runs_train.train(config)
