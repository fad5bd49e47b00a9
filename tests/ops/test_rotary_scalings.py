"""Scalings of rotary positions: numbers of transformers' `modeling_rope_utils` (5.24), and what each looks at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.attention import Attention
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.ops.positions.rotary import RotaryPositions
from transformer.ops.positions.scalings import attention_factor, frequencies
from transformer.types import UserError

pytestmark = pytest.mark.usefixtures("strict_dtypes")
SHORT, LONG = tuple(1 + 0.05 * i for i in range(8)), tuple(1 + 0.7 * i for i in range(8))
# Settings, of a head whose 16 elements are turned, and the length that is read.
CASES = {
    "linear": ({"scaling": "linear", "scaling_factor": 4.0}, 10),
    "llama3": ({"scaling": "llama3", "scaling_factor": 8.0, "original_length": 64, "theta": 500.0}, 10),
    "llama3 of other bounds": (
        {"scaling": "llama3", "scaling_factor": 8.0, "original_length": 256, "low_factor": 2.0, "high_factor": 6.0},
        10,
    ),
    "yarn": ({"scaling": "yarn", "scaling_factor": 4.0, "original_length": 2048}, 10),
    "yarn of other bounds": (
        {
            "scaling": "yarn",
            "scaling_factor": 40.0,
            "original_length": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.7,
        },
        10,
    ),
    "yarn, not rounded": ({"scaling": "yarn", "scaling_factor": 32.0, "original_length": 4096, "truncate": False}, 10),
    "yarn of a short context": ({"scaling": "yarn", "scaling_factor": 2.0, "original_length": 8, "beta_slow": 0.5}, 10),
    "longrope, short": (
        {
            "scaling": "longrope",
            "scaling_factor": 32.0,
            "original_length": 64,
            "short_factors": SHORT,
            "long_factors": LONG,
        },
        64,
    ),
    "longrope, long": (
        {
            "scaling": "longrope",
            "scaling_factor": 32.0,
            "original_length": 64,
            "short_factors": SHORT,
            "long_factors": LONG,
            "attention_factor": 1.25,
        },
        65,
    ),
    "dynamic, short": ({"scaling": "dynamic", "scaling_factor": 2.0, "original_length": 64}, 50),
    "dynamic, long": ({"scaling": "dynamic", "scaling_factor": 2.0, "original_length": 64}, 200),
}
GOLDEN = {
    "linear": (1, 0.25, 0.025, 0.0079056947, 0.0024999999, 7.9056947e-05),
    "llama3": (1, 1, 0.097616628, 0.012156156, 0.0055901702, 0.00054363982),
    "llama3 of other bounds": (1, 1, 0.057876769, 0.0039528473, 0.00125, 3.9528473e-05),
    "yarn": (1.1386294, 1, 0.1, 0.025693506, 0.0062499996, 7.9056947e-05),
    "yarn of other bounds": (1.7, 1, 0.1, 0.031622779, 0.0067499992, 7.9056945e-06),
    "yarn, not rounded": (1.3465736, 1, 0.1, 0.027735936, 0.0055527543, 9.8821183e-06),
    "yarn of a short context": (1.0693147, 1, 0.050000001, 0.015811389, 0.0049999999, 0.00015811389),
    "longrope, short": (1.3540064, 1, 0.090909094, 0.027498068, 0.0083333328, 0.00023424279),
    "longrope, long": (1.25, 1, 0.041666668, 0.010200896, 0.0026315791, 5.3597927e-05),
    "dynamic, short": (1, 1, 0.1, 0.031622779, 0.0099999998, 0.00031622779),
    "dynamic, long": (1, 1, 0.062264454, 0.015536753, 0.0038768628, 6.0233862e-05),
}
"""The attention factor, and frequencies 0, 2, 3, 4 and 7, as transformers computes them."""


def computed(name):
    settings, length = CASES[name]
    positions = RotaryPositions(**settings)
    found = jax.jit(lambda length: frequencies(positions, 16, length))(jnp.int32(length))
    return np.asarray(found), attention_factor(positions)


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_transformers(name):
    found, factor = computed(name)
    assert found.dtype == np.float32
    np.testing.assert_allclose([factor, *found[[0, 2, 3, 4, 7]]], GOLDEN[name], rtol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name):
    rope = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is not installed")
    torch = pytest.importorskip("torch")
    configs = pytest.importorskip("transformers")
    settings, length = CASES[name]
    names = {
        "scaling": "rope_type",
        "scaling_factor": "factor",
        "original_length": "original_max_position_embeddings",
        "low_factor": "low_freq_factor",
        "high_factor": "high_freq_factor",
        "short_factors": "short_factor",
        "long_factors": "long_factor",
    }
    ours = dataclasses.asdict(RotaryPositions(**settings))
    used = {*settings, *(("low_factor", "high_factor") if settings["scaling"] == "llama3" else ())}
    parameters = {names.get(key, key): value for key, value in ours.items() if key in used}
    parameters = {key: list(v) if isinstance(v, tuple) else v for key, v in parameters.items()}
    parameters["rope_theta"] = ours["theta"]
    config = configs.LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=16,
        max_position_embeddings=settings.get("original_length", 64),
        rope_parameters=parameters,
    )
    expected, factor = rope.ROPE_INIT_FUNCTIONS[settings["scaling"]](config, torch.device("cpu"), seq_len=length)
    found, own = computed(name)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)
    assert own == pytest.approx(factor)


def layer(**settings):
    positions = RotaryPositions(original_length=8, **settings)
    return Attention(AttentionConfig(num_heads=2, head_dim=16), positions=positions)


def test_the_factor_multiplies_what_is_turned():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3, 16)), jnp.float32)
    places = jnp.arange(5, dtype=jnp.int32)[None]
    yarn = RotaryPositions(scaling="yarn", scaling_factor=4.0, fraction=0.5)
    turned = [
        dataclasses.replace(yarn, attention_factor=factor).rotate(x, x, lambda: (places, places))[0]
        for factor in (1.0, 1.5, 0.0)
    ]
    np.testing.assert_allclose(turned[1][..., :8], 1.5 * turned[0][..., :8], rtol=1e-5)
    np.testing.assert_allclose(turned[2][..., :8], (1 + 0.1 * np.log(4)) * turned[0][..., :8], rtol=1e-5)
    for each in turned:
        np.testing.assert_array_equal(each[..., 8:], x[..., 8:])


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling": "dynamic", "scaling_factor": 2.0},
        {"scaling": "longrope", "scaling_factor": 4.0, "short_factors": SHORT, "long_factors": LONG},
    ],
    ids=["dynamic", "longrope"],
)
def test_the_largest_position_of_a_call_counts(small_normal, settings):
    """A call of 9 tokens sees other frequencies than its first 8 alone, and the same ones wherever it begins in a row."""
    attention, x = layer(**settings), small_normal(2, 9, 8)
    params = attention.init(jax.random.key(0), x)
    mask = {"mask": jnp.tri(9, dtype=bool)[None, None]}
    whole = attention.apply(params, x, **mask)
    first = attention.apply(params, x[:, :8], mask=jnp.tri(8, dtype=bool)[None, None])
    assert np.abs(whole[:, :8] - first).max() > 1e-3
    within = attention.apply(params, x, positions_BT=jnp.minimum(jnp.arange(9), 7)[None], **mask)
    np.testing.assert_allclose(within[:, :8], first, atol=1e-5)
    # The row that is longest says so for all rows, compiled or not.
    positions = jnp.stack([jnp.arange(9), jnp.minimum(jnp.arange(9), 7)])
    compiled = jax.jit(lambda positions: attention.apply(params, x, positions_BT=positions, **mask))(positions)
    np.testing.assert_allclose(compiled[:, :8], whole[:, :8], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotaryPositions(low_factor=4.0), "low_factor must be above 0 and below high_factor=4, got 4"),
        (lambda: RotaryPositions(beta_slow=0.0), "beta_slow must be above 0 and below beta_fast=32, got 0"),
        (lambda: RotaryPositions(attention_factor=-1.0), "attention_factor must be at least 0"),
        (lambda: RotaryPositions(short_factors=(0.0,)), "short_factors and long_factors must be positive"),
        (lambda: RotaryPositions(scaling="longrope", original_length=1), "must be above 1 for longrope, got 1"),
        (lambda: RotaryPositions(scaling="yarn", theta=1.0), "theta must be above 1 for yarn"),
        (lambda: model(scaling="longrope", short_factors=SHORT), "must be 8 numbers each, .* got 8 and 0"),
        (lambda: model(2, scaling="dynamic"), "dynamic needs more than 2 turned elements of a head, got 2"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def model(head_dim=16, **settings):
    block = BlockConfig(AttentionConfig(head_dim=head_dim))
    return ModelConfig(pattern=(block,), positions=RotaryPositions(**settings))


@pytest.fixture
def small_normal():
    return lambda *shape: jnp.asarray(np.random.default_rng(3).standard_normal(shape), jnp.float32)
