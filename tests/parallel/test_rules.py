"""Logical axis names become shardings by one table."""

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.positions.learned import LearnedPositions
from transformer.parallel.mesh import make_mesh
from transformer.parallel.rules import RULES, parameter_shardings, tree_shardings


def test_every_name_of_a_model_has_a_rule():
    attention, norm = AttentionConfig(num_heads=2, use_bias=True, qk_norm=True), LayerNorm(use_bias=True)
    networks = (FeedForwardConfig(use_bias=True), FeedForwardConfig(num_experts=2))
    config = ModelConfig(
        vocab_size=5,
        max_length=4,
        num_layers=2,
        embed_dim=8,
        pattern=tuple(BlockConfig(attention, network, norm) for network in networks),
        positions=LearnedPositions(),
        scan_layers=True,
        tie_embeddings=False,
    )
    model = Decoder(config)
    params, axes = init_params(model, jax.random.key(0))
    shardings = parameter_shardings(make_mesh(), axes)
    assert jax.tree.structure(shardings) == jax.tree.structure(params)
    assert all(isinstance(s, NamedSharding) and s.is_fully_replicated for s in jax.tree.leaves(shardings))


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"must have a name of the sharding rules, got 'headz'; there are"):
        RULES.spec(PartitionSpec("embed", "headz"))


def test_axes_without_a_name_are_kept():
    assert RULES.spec(PartitionSpec("embed", None)) == PartitionSpec("fsdp", None)


def test_what_stands_in_for_a_moment_is_whole():
    """Adafactor keeps an array of one element where it has no factors, under the name of a bias with one axis."""
    mesh, axes = make_mesh({"fsdp": 8}), {"out": {"bias": PartitionSpec("embed")}}
    state = {"v": {"out": {"bias": jax.ShapeDtypeStruct((16,), "float32")}}}
    placeholder = {"v_row": {"out": {"bias": jax.ShapeDtypeStruct((1,), "float32")}}}
    assert tree_shardings(mesh, axes, state)["v"]["out"]["bias"].spec == PartitionSpec("fsdp")
    assert tree_shardings(mesh, axes, placeholder)["v_row"]["out"]["bias"].is_fully_replicated


def test_an_axis_of_the_mesh_cuts_a_parameter_once():
    with pytest.raises(ValueError, match=r"along each axis of a mesh once, got the names \('heads', 'hidden'\)"):
        parameter_shardings(make_mesh(), {"kernel": PartitionSpec("heads", "hidden")})
