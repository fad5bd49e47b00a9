"""Parameters of loops and scans, converted there and back."""

import jax
import numpy as np
import pytest

from transformer.layers.scan_params import loop_params, scan_params


@pytest.mark.parametrize("pattern_length", [1, 2])
def test_conversion_there_and_back(pattern_length):
    blocks = {f"block_{i}": {"kernel": np.full((2, 3), i)} for i in range(4)}
    params = {"token_embedding": np.ones(5), "decoder": {"blocks": blocks, "final_norm": {"scale": np.ones(2)}}}
    scanned = scan_params(params, pattern_length)
    expected = {1: {"block_0": [0, 1, 2, 3]}, 2: {"block_0": [0, 2], "block_1": [1, 3]}}[pattern_length]
    kernels = {name: np.asarray(block["kernel"]) for name, block in scanned["decoder"]["blocks"].items()}
    assert {name: kernel[:, 0, 0].tolist() for name, kernel in kernels.items()} == expected
    assert scanned["decoder"]["final_norm"] == params["decoder"]["final_norm"]
    back = loop_params(scanned)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
