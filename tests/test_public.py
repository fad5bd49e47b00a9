"""What a public function takes or returns is public: every type of ours in a public signature or field."""

import ast
import inspect
import types
import typing

import flax.linen as nn
import optax
import pytest

import transformer

OURS = "transformer."
PUBLIC = [getattr(transformer, name) for name in transformer.__all__]
# Some annotations name what is imported for type checkers only.
NAMES = {"nn": nn, "optax": optax} | dict(zip(transformer.__all__, PUBLIC, strict=True))


def parts(annotation):
    """The classes in an annotation, through unions, generics and callables."""
    if isinstance(annotation, list | tuple):
        for inner in annotation:
            yield from parts(inner)
    elif isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        yield annotation
    else:
        yield from parts(typing.get_args(annotation))


def hints(function):
    return typing.get_type_hints(inspect.unwrap(function), localns=NAMES).values()


def annotations(public):
    """The annotations of a function, or of a class with its fields, constructor, properties and public methods."""
    if not isinstance(public, type):
        yield from hints(public) if callable(public) else [type(public)]
        return
    yield from typing.get_type_hints(public, localns=NAMES).values()
    for name, member in vars(public).items():
        if isinstance(member, property):
            member = member.fget
        member = getattr(member, "__func__", member)
        if inspect.isfunction(member) and (name in ("__init__", "__call__") or not name.startswith("_")):
            yield from hints(member)


@pytest.mark.parametrize("name", sorted(transformer.__all__))
def test_types_of_public_signatures_are_public(name):
    of_ours = {part for hint in annotations(getattr(transformer, name)) for part in parts(hint)}
    hidden = {part.__name__ for part in of_ours if part.__module__.startswith(OURS) and part not in PUBLIC}
    assert not hidden, (
        f"transformer.{name} mentions {', '.join(sorted(hidden))}, which transformer/__init__.py does not have"
    )


def test_the_table_the_list_and_the_type_checkers_imports_agree():
    source = inspect.getsource(transformer)
    checked = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS)
        for alias in node.names
    }
    assert set(transformer.__all__) == set(transformer._MODULES) == checked
    assert transformer.__all__ == sorted(transformer.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Transformer'"):
        transformer.Transformer  # noqa: B018


def test_what_the_walk_sees():
    def function(
        a: dict[str, tuple["transformer.Block", int]] | None,
    ) -> typing.Callable[[int], transformer.Decoder]: ...

    found = {part for hint in annotations(function) for part in parts(hint)}
    assert {transformer.Block, transformer.Decoder} <= found
