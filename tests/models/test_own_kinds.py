"""User-defined positions, norm, block pattern and pooling: each is one class in one file outside the package."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.cli.fields import flags
from transformer.config import Config
from transformer.config_io import from_dict, to_dict
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import NORMS, PATTERNS, POOLINGS, POSITIONS, Norm, Pattern, Pooling, Positions
from transformer.models.classifier import Classifier
from transformer.models.decoder import Decoder
from transformer.objectives.classification import Classification
from transformer.overrides import override
from transformer.types import UserError


@dataclasses.dataclass(frozen=True)
class Clock(Positions):
    """Learned vectors of positions on a dial."""

    kind = "clock"
    absolute = True

    hours: int = 3

    def embed(self, x_BTD, positions_BT, max_length, parameter):
        dial = parameter("dial", (self.hours, x_BTD.shape[-1]), ("position", "embed"), fan_in=x_BTD.shape[-1])
        return x_BTD + dial[positions_BT % self.hours]


@dataclasses.dataclass(frozen=True)
class PeakNorm(Norm):
    """Vectors divided by their largest element."""

    kind = "peak"

    def normalize(self, x, vector):
        return x / (jnp.abs(x).max(axis=-1, keepdims=True) + self.epsilon) * vector("scale", 1.0)


@dataclasses.dataclass(frozen=True)
class Neighbours(Pattern):
    """Blocks beside each other."""

    kind = "neighbours"

    block_size: int = 2

    def sees(self, query_blocks, key_blocks):
        return abs(query_blocks - key_blocks) <= 1


@dataclasses.dataclass(frozen=True)
class LastPooling(Pooling):
    """The last valid vector."""

    kind = "final"

    def pool(self, x_BTD, valid_BT, scores):
        last_B = jnp.maximum(valid_BT.sum(axis=1) - 1, 0)
        return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]


OWN = {POSITIONS: Clock, NORMS: PeakNorm, PATTERNS: Neighbours, POOLINGS: LastPooling}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for family, kind in OWN.items():
        monkeypatch.setattr(family, "_kinds", dict(family._kinds))
        family.register(kind)


def config(**changes):
    block = BlockConfig(AttentionConfig(num_heads=2, pattern=Neighbours()), FeedForwardConfig(16), norm=PeakNorm())
    settings = {"vocab_size": 7, "max_length": 8, "num_layers": 2, "embed_dim": 8, "pattern": (block,), **changes}
    return ModelConfig(positions=Clock(hours=4), **settings)


def test_they_train_and_decode():
    model, tokens = Decoder(config()), jnp.array([[1, 2, 3, 4, 5, 6]])
    params = model.init(jax.random.key(0), tokens)["params"]
    assert params["decoder"]["position_embedding"]["dial"].shape == (4, 8)
    gradient = jax.grad(lambda params: (model.apply({"params": params}, tokens) ** 2).sum())(params)
    assert np.abs(gradient["decoder"]["position_embedding"]["dial"]).max() > 0
    assert np.abs(gradient["decoder"]["final_norm"]["scale"]).max() > 0
    full = model.apply({"params": params}, tokens)
    first, cache = model.apply({"params": params}, tokens[:, :4], cache=model.init_cache(1, 8))
    second, _ = model.apply({"params": params}, tokens[:, 4:], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), full, atol=1e-5)
    # The first token is no neighbour of the last.
    changed = model.apply({"params": params}, tokens.at[0, 0].set(6))
    one = Decoder(config(num_layers=1))
    single = {**params, "decoder": {**params["decoder"], "blocks": {"block_0": params["decoder"]["blocks"]["block_0"]}}}
    np.testing.assert_allclose(
        one.apply({"params": single}, tokens)[0, 5], one.apply({"params": single}, tokens.at[0, 0].set(6))[0, 5]
    )
    assert np.abs(changed - full).max() > 1e-3


def test_a_classifier_pools_by_it():
    model = Classifier(config(pooling=LastPooling()), num_classes=3)
    tokens, segments = jnp.array([[1, 2, 3, 0]]), jnp.array([[1, 1, 1, 0]])
    logits, variables = model.init_with_output(jax.random.key(0), tokens, segment_ids_BT=segments)
    assert set(variables["params"]) == {"token_embedding", "encoder", "classifier"}
    other = model.apply(variables, tokens.at[0, 3].set(5), segment_ids_BT=segments)
    np.testing.assert_array_equal(logits, other)


def test_configs_and_flags_have_them():
    made = Config(model=config(max_length=0))
    assert from_dict(Config, to_dict(made)) == made
    assert "--model.positions.hours" in flags(made)
    chosen = override(
        Config(objective=Classification()),
        {"model.positions.kind": "clock", "model.positions.hours": 5, "model.pooling.kind": "final"},
    )
    assert chosen.model.positions == Clock(hours=5)
    with pytest.raises(UserError, match=r"hours is a setting of clock, model\.positions\.kind is rotary"):
        override(Config(), {"model.positions.hours": 5})


def test_what_nobody_registered_is_refused(monkeypatch):
    values = to_dict(Config(model=config(max_length=0)))
    monkeypatch.delitem(POSITIONS._kinds, "clock")
    with pytest.raises(UserError, match=r"got 'clock'\. Your own kind is known once the module that registers it"):
        from_dict(Config, values)


def test_own_vectors_of_positions_are_no_blocks_own():
    """Before, the block took them and nothing was added."""
    with pytest.raises(UserError, match="Clock positions are added to the embeddings of a model, a block cannot have"):
        ModelConfig(pattern=(BlockConfig(own_positions=Clock()),))
