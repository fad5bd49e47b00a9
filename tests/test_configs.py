"""The published architectures, counted to the unit without allocating any."""

import importlib.util
import pathlib

import jax
import pytest

from transformer.parts import count_parameters, initialize

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def load(name, variant=""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


@pytest.mark.parametrize(
    ("name", "variant", "parameters"),
    [
        ("gpt2_124m", "", 124_439_808),
        ("llama_1b", "", 1_235_814_400),
        ("llama_8b", "", 8_030_261_248),
        ("llama_70b", "", 70_553_706_496),
        ("llama_70b", "llama2", 68_976_648_192),
    ],
)
def test_published_architectures_have_their_parameters(name, variant, parameters):
    config = load(name, variant)
    shapes, _ = initialize(config.objective, config.objective.make_model(config.model), None)
    assert count_parameters(shapes) == parameters
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))
