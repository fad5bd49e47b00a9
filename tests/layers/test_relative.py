"""Transformer-XL's attention equals its paper's formula, written out for every query, key and head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.attention import Attention
from transformer.layers.runtime import Runtime
from transformer.model_config import AttentionConfig
from transformer.ops.masks import AttentionMask
from transformer.ops.positions.transformer_xl import TransformerXLPositions

pytestmark = pytest.mark.usefixtures("strict_dtypes")
THETA = 50.0


def sinusoid(distance, width):
    angles = distance * THETA ** (-np.arange(0, width, 2) / width)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).ravel()


def as_published(params, inputs, config, head_dim, causal):
    """Dai et al. 2019, appendix B: (q + u)·k + (q + v)·W R, in Python's order and float64."""
    params, inputs = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, inputs))
    relative, (batch, length, width) = params["relative_position"], inputs.shape
    out = np.zeros_like(inputs)
    for row, head, i in np.ndindex(batch, config.num_heads, length):
        group = head * config.kv_heads // config.num_heads
        query = inputs[row, i] @ params["query"]["kernel"][:, head]
        logits, values = [], []
        for j in range(i + 1 if causal else length):
            key = inputs[row, j] @ params["key"]["kernel"][:, group]
            key_of_distance = sinusoid(i - j, width) @ relative["kernel"][:, group]
            content = (query + relative["content_bias"][head]) @ key
            position = (query + relative["position_bias"][head]) @ key_of_distance
            logits.append((content + position) / np.sqrt(head_dim))
            values.append(inputs[row, j] @ params["value"]["kernel"][:, group])
        weights = np.exp(logits) / np.exp(logits).sum()
        out[row, i] += (weights @ np.array(values)) @ params["out"]["kernel"][head]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["xla", "blockwise"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(4, 0), (2, 3)])
def test_equals_the_formula_of_the_paper(small, implementation, kv_heads, head_dim, causal):
    config = AttentionConfig(num_heads=4, num_kv_heads=kv_heads, head_dim=head_dim, implementation=implementation)
    layer = Attention(config, positions=TransformerXLPositions(theta=THETA))
    inputs = small.normal(2, 6, 8)
    params = small.random_params(layer, inputs)
    assert {name: x.shape for name, x in params["relative_position"].items()} == {
        "content_bias": (4, head_dim or 2),
        "position_bias": (4, head_dim or 2),
        "kernel": (8, kv_heads, head_dim or 2),
    }
    out = small.apply(layer, params, inputs, mask=AttentionMask(causal=causal))
    np.testing.assert_allclose(out, as_published(params, inputs, config, head_dim or 2, causal), atol=2e-5)


def test_half_precision_follows_float32(small):
    config, positions = AttentionConfig(num_heads=2), TransformerXLPositions()
    inputs = small.normal(2, 5, 8)
    params = small.random_params(Attention(config, positions=positions), inputs)
    expected = small.apply(Attention(config, positions=positions), params, inputs)
    out = small.apply(
        Attention(config, positions=positions, runtime=Runtime(dtype=jnp.bfloat16)),
        params,
        inputs.astype(jnp.bfloat16),
    )
    assert out.dtype == "bfloat16"
    np.testing.assert_allclose(out.astype("float32"), expected, atol=0.1)
