"""Public signatures say what they take and return: none has a bare `Any`, beyond a named list that only shrinks."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "transformer"
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

MAY_BE_ANY = {
    "an annotation, such as a union or a generic type, or a value of its type; Python 3.11 has no type of these": """
        config_io.py from_dict.kind, config_io.py from_dict ->, config_io.py from_json.kind, config_io.py from_json ->,
        validation.py typed.hint, validation.py typed.value, validation.py typed ->
    """,
    "dataclasses.field declares the type of the field": "cli/fields.py repeated ->",
    "a kind of the family, whose class only the caller knows": "kinds.py Family.default ->",
    "a model of the objective's own class, with methods besides those of a linen module": """
        trained.py Trained.model ->, runs/saved.py Loaded.model, parts.py Parts.model ->, objective.py Objective.model_class,
        objective.py Objective.generation_scores.model, objectives/seq2seq.py Seq2Seq.generation_scores.model
    """,
    "options of the objective's own methods": """
        runs/saved.py Loaded.predict.options, runs/saved.py Loaded.generate.options, runs/saved.py Loaded.stream.options,
        runs/saved.py Loaded.embeddings.options, runs/saved.py Loaded.predictions.options
    """,
    "arguments that another function declares": """
        data/sources/tfds.py tfds_split.options, generation/text.py generate_texts.options,
        layers/stack.py Blocks.__call__.context
    """,
    "an example of the form: a NamedTuple of its own, with texts, or with ids": """
        data/forms/examples.py ExampleForm.with_class.example, data/forms/examples.py ExampleForm.with_class ->,
        data/forms/examples.py ExampleForm.label.example, data/forms/examples.py ExampleForm.text.example,
        data/forms/examples.py ExampleForm.text ->, data/forms/examples.py ExampleForm.encode.example,
        data/forms/examples.py ExampleForm.tokens.example, data/forms/examples.py ExampleForm.tokens ->,
        data/forms/examples.py ExampleForm.frame.tokens, data/forms/examples.py ExampleForm.frame ->,
        data/forms/examples.py ExampleForm.length.encoded, data/forms/examples.py ExampleForm.lengths.tokens,
        data/forms/labelled.py LabelledTexts.frame.tokens, data/forms/labelled.py LabelledTexts.length.encoded,
        data/forms/pairs.py Pairs.frame.tokens, data/forms/pairs.py Pairs.length.encoded,
        data/forms/pairs.py Pairs.lengths.tokens, objectives/seq2seq.py Seq2Seq.generation_scores.data
    """,
    "a pretrained tokenizer, whose `encode` has an option": """
        data/tokenizers/chat.py chat_ids.tokenizer, data/tokenizers/chat.py learnt_ids.tokenizer,
        objectives/masked_lm.py MaskedLM.encode.tokenizer
    """,
    "an object of a package without types": "data/stored.py in_order.stored, data/tokenizers/pieces.py read_proto ->",
    "batches until they are opened, then a Dataset": "runs/given.py Given.data",
    "a batch of any form": "types.py CheckpointableIterator.__next__ ->",
}
NAMED = {name.strip() for names in MAY_BE_ANY.values() for name in names.replace("\n", " ").split(",")}
MOST_NAMED = 48
"""A bound that only falls."""


def is_public(name):
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def is_bare(annotation):
    """Whether an annotation is `Any`, or a union with it; also as a string, and in ClassVar, Optional and Final."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        return is_bare(annotation.left) or is_bare(annotation.right)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in ("ClassVar", "Optional", "Final"):
        return is_bare(annotation.slice)
    return annotation is not None and ast.unparse(annotation) in ("Any", "typing.Any")


def bare(tree, within=""):
    """Names of a module's parameters, results (`->`) and fields that are bare `Any`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            yield from bare(node, f"{within}{node.name}.")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_public(node.target.id):
            if is_bare(node.annotation):
                yield within + node.target.id
        elif isinstance(node, FUNCTIONS) and is_public(node.name):
            a = node.args
            for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))):
                if is_bare(argument.annotation):
                    yield f"{within}{node.name}.{argument.arg}"
            if is_bare(node.returns):
                yield f"{within}{node.name} ->"


def test_public_signatures_have_types():
    files = sorted(ROOT.rglob("*.py"))
    found = {f"{path.relative_to(ROOT)} {name}" for path in files for name in bare(ast.parse(path.read_text()))}
    assert found <= NAMED, f"bare Any: {', '.join(sorted(found - NAMED))}; name the type"
    assert found >= NAMED, f"typed by now: {', '.join(sorted(NAMED - found))}; take them out of MAY_BE_ANY"
    assert len(NAMED) <= MOST_NAMED


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(a: Any, *b: Any, c: int = 0, **d: Any) -> Any: ...", ["f.a", "f.b", "f.d", "f ->"]),
        ("def f(a: Any | None, b: 'None | Any', c: dict[str, Any]) -> Callable[..., Any]: ...", ["f.a", "f.b"]),
        ("class A:\n a: ClassVar[Any] = 1\n _b: Any\n def __init__(self, c: typing.Any): ...", ["A.a", "A.__init__.c"]),
        ("class _A:\n a: Any\ndef _f(a: Any): ...\ndef f():\n def g(a: Any): ...", []),
    ],
)
def test_bare_types_are_seen(text, found):
    assert list(bare(ast.parse(text))) == found
