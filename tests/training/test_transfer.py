"""Starting from another run's parameters: what is taken, cut to size, new and left, and that it is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.scan_params import loop_params, scan_params
from transformer.training.transfer import transfer
from transformer.types import UserError


def tree(start=0.0, **changes):
    shapes = {"embedding": (5, 3), "block/kernel": (3, 3), "head/kernel": (3, 2)} | changes
    nested = {}
    for name, shape in shapes.items():
        if shape:
            *path, last = name.split("/")
            node = nested
            for part in path:
                node = node.setdefault(part, {})
            node[last] = start + jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    return nested


def test_the_difference_is_reported():
    own, donor = tree(), tree(100.0, **{"embedding": (4, 3), "head/kernel": None, "other/kernel": (7,)})
    result = transfer(own, donor)
    np.testing.assert_array_equal(result.params["block"]["kernel"], donor["block"]["kernel"])
    np.testing.assert_array_equal(result.params["embedding"][:4], donor["embedding"])
    np.testing.assert_array_equal(result.params["embedding"][4:], own["embedding"][4:])
    np.testing.assert_array_equal(result.params["head"]["kernel"], own["head"]["kernel"])
    assert result.report().splitlines() == [
        "1 parameters taken",
        "  reshaped: embedding (the first 4 of 5 rows)",
        "  fresh: head/kernel",
        "  skipped: other/kernel",
    ]


def test_a_larger_table_is_cut():
    result = transfer(tree(), tree(100.0, embedding=(9, 3)))
    np.testing.assert_array_equal(result.params["embedding"], tree(100.0, embedding=(9, 3))["embedding"][:5])


def test_another_width_is_not_taken():
    result = transfer(tree(), tree(100.0, **{"block/kernel": (3, 4)}))
    np.testing.assert_array_equal(result.params["block"]["kernel"], tree()["block"]["kernel"])
    assert "block/kernel ([3, 3] here, [3, 4] there)" in result.fresh


def test_types_agree_with_the_new_run():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree())
    assert {x.dtype for x in jax.tree.leaves(transfer(tree(), half).params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("scanned", ["here", "there", "both"])
def test_layers_are_compared_one_by_one(scanned):
    def layers(count, start):
        kernels = start + jnp.arange(count * 8.0).reshape(count, 2, 2, 2)
        return {"blocks": {f"block_{i}": {"query": {"kernel": kernels[i]}} for i in range(count)}}

    own, donor = layers(4, 0.0), layers(2, 100.0)
    expected = {"blocks": {**own["blocks"], **donor["blocks"]}}
    if scanned != "there":
        # The donor's pattern has one block. Therefore its layers have other paths than the layers with the same numbers here.
        result = transfer(scan_params(own, 2), scan_params(donor) if scanned == "both" else donor, pattern_length=2)
        result = result._replace(params=loop_params(result.params))
    else:
        result = transfer(own, scan_params(donor))
    jax.tree.map(np.testing.assert_array_equal, result.params, expected)
    assert result.fresh == ("blocks/block_2/query/kernel", "blocks/block_3/query/kernel")


def test_nothing_in_common_is_refused():
    with pytest.raises(
        UserError, match=r"a run of a similar model; .*\(else, \.\.\.\) none fits this one \(block/kernel"
    ):
        transfer(tree(), {"else": jnp.zeros(3)})
