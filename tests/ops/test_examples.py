"""The examples in the docstrings of `transformer.ops` run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

from transformer import ops


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(ops.__path__)])
def test_docstring_examples_run(name):
    module = importlib.import_module(f"transformer.ops.{name}")
    assert doctest.testmod(module).failed == 0


def test_there_are_examples_to_run():
    module = importlib.import_module("transformer.ops.attention")
    assert doctest.testmod(module).attempted > 0
