"""Adapters of kernels that are one tensor of theirs: the product of the two factors is the tensor of the products."""

import numpy as np
import pytest

from transformer.adapter_config import AdapterConfig
from transformer.interop.forms import parse
from transformer.interop.peft import config_values, pairs
from transformer.interop.table import Bound
from transformer.layers.adapters import LORA_A, LORA_B

RANK, D, H, K = 3, 6, 4, 5
FORMS = {
    "a kernel": ("(heads head_dim) embed -> embed heads head_dim", [(D, H, K)], 1),
    "back to the stream": ("embed (heads head_dim) -> heads head_dim embed", [(H, K, D)], 2),
    "input first": ("embed hidden -> embed hidden", [(D, 7)], 1),
    "fused, input first": ("embed (part heads head_dim) -> part embed heads head_dim", [(D, H, K)] * 3, 1),
    "fused by head": ("(heads part head_dim) embed -> part embed heads head_dim", [(D, H, K)] * 3, 1),
    "fused of unequal parts": ("(heads head_dim) embed -> embed heads head_dim", [(D, H, K), (D, 2, K), (D, 2, K)], 1),
}


@pytest.mark.parametrize("adapted", ["all", "the last"])
@pytest.mark.parametrize("name", FORMS)
def test_the_product_of_theirs_is_the_tensor_of_ours(name, adapted):
    text, sizes, inputs = FORMS[name]
    form, paths = parse(text), tuple(f"part{i}/kernel" for i in range(len(sizes)))
    chosen, draw = paths if adapted == "all" else paths[-1:], np.random.default_rng(0)
    (pair,) = pairs([Bound("theirs.weight", paths, None, form)], dict.fromkeys(chosen, inputs))
    shapes = dict(zip(paths, sizes, strict=True))
    factors = {
        path: (draw.normal(size=(*shapes[path][:inputs], RANK)), draw.normal(size=(RANK, *shapes[path][inputs:])))
        for path in chosen
    }
    products = [
        np.tensordot(*factors[path], 1) if path in factors else np.zeros(shape) for path, shape in shapes.items()
    ]
    whole = form.to_theirs(products)
    first, second = pair.to_theirs(factors, shapes, RANK * len(sizes) + 1)  # another tensor may need more columns
    assert first.shape[0] == second.shape[1] == RANK * len(sizes) + 1
    product = second @ first
    np.testing.assert_allclose(product.T if pair.transposed else product, whole, atol=1e-6)
    assert pair.transposed == (name in ("input first", "fused, input first"))

    again = pair.to_ours({LORA_A: first, LORA_B: second}, sizes)
    for ours, expected in zip(again, products, strict=True):
        np.testing.assert_allclose(np.tensordot(ours[LORA_A], ours[LORA_B], 1), expected, atol=1e-6)


def test_the_scale_of_a_file_is_that_of_the_run():
    """The rank in the file may be larger, for a tensor whose parts have separate factors."""
    bound = [Bound("layer.query.weight", ("query/kernel",), None, parse(FORMS["a kernel"][0]))]
    found = pairs(bound, {"query/kernel": 1})
    values = config_values(AdapterConfig(rank=4, alpha=8.0), 12, found, bound, "next_token", "base")
    assert values["lora_alpha"] / values["r"] == 8.0 / 4
