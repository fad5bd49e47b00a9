"""The examples in the docstrings of layers and models run and print what they say."""

import doctest
import importlib

import pytest

MODULES = {
    "layers": ["adapters", "attention", "block", "cache", "experts", "feed_forward", "linear", "norm", "runtime"],
    "models": ["classifier", "decoder", "embedder", "encoder", "encoder_decoder"],
}


@pytest.mark.parametrize("name", [f"transformer.{package}.{name}" for package in MODULES for name in MODULES[package]])
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
