"""Forms, files of tensors, and what a run keeps of the folder that it was read from: nothing that the folder can change."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrained_folders import LLAMA, llama_tensors, write_folder

from transformer import load
from transformer.interop.families import gpt2, parts
from transformer.interop.forms import PART, parse
from transformer.interop.table import Bound, check_tensors, leaves, looped_shapes
from transformer.interop.tensors import Planned, map_file, pieces, read_header, write_tensors
from transformer.types import UserError

FUSED = "in (part heads head_dim) -> part in heads head_dim"
PER_HEAD = "(heads part head_dim) embed -> part embed heads head_dim"
FORMS = (
    *(parts.HEADS, parts.HEADS_BIAS, parts.FROM_HEADS, parts.LINEAR, parts.VECTOR, parts.TABLE),
    *(FUSED, PER_HEAD, gpt2._KEPT, "(part out) in -> part in out"),
)


@pytest.mark.parametrize("text", FORMS)
@given(sizes=st.lists(st.integers(1, 4), min_size=4, max_size=4), count=st.integers(1, 3))
@settings(max_examples=20, deadline=None, database=None)
def test_a_form_is_a_bijection(text, sizes, count):
    """There and back is the same, and so is back and there; no element is lost or doubled."""
    form = parse(text)
    count = count if form.fused else 1
    shape = tuple(sizes[: form.num_axes])
    whole = form.shape([shape] * count)
    theirs = np.arange(np.prod(whole)).reshape(whole)
    found = form.to_ours(theirs, [shape] * count)
    assert [x.shape for x in found] == [shape] * count
    assert sorted(np.concatenate([x.ravel() for x in found])) == list(range(theirs.size))
    np.testing.assert_array_equal(form.to_theirs(found), theirs, strict=True)
    assert all(np.shares_memory(x, theirs) for x in found)


@pytest.mark.parametrize(
    ("text", "sizes"), [(parts.HEADS, [(3, 4, 2), (3, 1, 2), (3, 2, 2)]), (parts.VECTOR, [(2,), (5,)])]
)
def test_parts_of_unequal_sizes_follow_each_other(text, sizes):
    form = parse(text)
    whole = form.shape(sizes)
    theirs = np.arange(np.prod(whole)).reshape(whole)
    found = form.to_ours(theirs, sizes)
    assert [x.shape for x in found] == sizes
    assert sorted(np.concatenate([x.ravel() for x in found])) == list(range(theirs.size))
    np.testing.assert_array_equal(form.to_theirs(found), theirs, strict=True)


def test_the_axes_of_fused_heads_are_in_their_order():
    """Shown by single elements, since all sizes are equal: the order of parts and heads differs between families."""
    theirs = np.arange(8).reshape(8, 1)
    in_turn, per_head = (parse(text) for text in ("(part heads head_dim) embed -> part embed heads head_dim", PER_HEAD))
    assert in_turn.to_ours(theirs, [(1, 2, 2)] * 2)[1].ravel().tolist() == [4, 5, 6, 7]
    assert per_head.to_ours(theirs, [(1, 2, 2)] * 2)[1].ravel().tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("text", ["a b", "a -> b", "a a -> a a", "a b -> b", f"a {PART} -> a {PART}", "a! -> a"])
def test_what_is_no_form_is_refused(text):
    with pytest.raises(ValueError, match="a form names"):
        parse(text)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("shapes", [[()], [(0,)], [(3,), (0, 4), (2, 5), ()], [(1, 1, 1)]])
def test_what_is_written_is_read(dtype, shapes, tmp_path):
    values = {f"t{i}": np.asarray(np.random.default_rng(i).normal(size=s)).astype(dtype) for i, s in enumerate(shapes)}
    planned = {name: Planned(x.dtype, x.shape, lambda x=x: x) for name, x in values.items()}
    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, planned, {"format": "pt"})
    found, metadata = read_header(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0 and metadata == {"format": "pt"}
    mapped = map_file(tmp_path / "file")
    for name, x in values.items():
        view = found[name].view(mapped)
        assert view.dtype == x.dtype and view.shape == x.shape and view.tobytes() == x.tobytes()


def test_values_are_fetched_in_turn_also_without_a_file(tmp_path):
    fetched = []
    planned = {n: Planned(np.float32, (2,), lambda n=n: fetched.append(n) or np.zeros(2)) for n in "abc"}
    write_tensors(None, planned, {})
    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, planned, {})
    assert fetched == list("abcabc")


def test_a_piece_is_filled_to_its_bound():
    planned = {
        name: Planned(np.float32, (size,), lambda: None) for name, size in zip("abcd", (2, 2, 1, 9), strict=True)
    }
    assert [list(group) for group in pieces(planned, 16)] == [["a", "b"], ["c"], ["d"]]
    assert [list(group) for group in pieces(planned, 15)] == [["a"], ["b", "c"], ["d"]]
    assert [list(group) for group in pieces(planned, 10**6)] == [list("abcd")]


def test_a_run_keeps_its_values_when_the_file_is_written_over(tmp_path):
    path = write_folder(tmp_path / "hf", LLAMA)
    run = load(path)
    content = (path / "model.safetensors").read_bytes()
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(b"\xff" * (len(content) - len(content) // 2))
    np.testing.assert_array_equal(run.params["output"]["kernel"], llama_tensors()["lm_head.weight"].T)
    np.testing.assert_array_equal(run.params["decoder"]["final_norm"]["scale"], llama_tensors()["model.norm.weight"])


def test_a_parameter_that_no_tensor_fills_is_named():
    bound = [Bound("theirs", ("ours",), None, parse(parts.VECTOR))]
    shapes = {"ours": (3,), "other": (4,)}
    assert check_tensors({"theirs": (3,)}, bound, {"ours": (3,)}, (), {}, "folder") == []
    with pytest.raises(UserError, match="folder must fill every parameter, it does not fill other"):
        check_tensors({"theirs": (3,)}, bound, shapes, (), {}, "folder")


@pytest.mark.parametrize(("num_first", "period"), [(0, 1), (0, 2), (1, 2), (2, 1)])
def test_a_scanned_layer_stands_for_its_numbers(num_first, period):
    """First blocks, three periods and one block after them: each parameter names the looped layers whose rows it has."""
    block = {"kernel": np.zeros((3, 5))}
    tree = {
        "decoder": {
            "first": {f"block_{i}": {"kernel": np.zeros(5)} for i in range(num_first)},
            "blocks": {f"block_{i}": block for i in range(period)},
            "last": {"block_0": {"kernel": np.zeros(5)}},
        }
    }
    found = leaves(tree, num_first, period, scanned=True)
    numbers = {
        path: [int(name.split("/")[2].removeprefix("block_")) for name in leaf.looped] for path, leaf in found.items()
    }
    for index in range(period):
        assert numbers[f"decoder/blocks/block_{index}/kernel"] == [num_first + index + period * n for n in range(3)]
    assert numbers["decoder/last/block_0/kernel"] == [num_first + 3 * period]
    assert sorted(itertools.chain(*numbers.values())) == list(range(num_first + 3 * period + 1))
    assert set(looped_shapes(found).values()) == {(5,)}
