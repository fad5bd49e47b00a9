"""Lighter matrices: what they weigh, and how near their model stays to the original, for every objective's model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from transformer.adapter_config import AdapterConfig
from transformer.generation.generate import Generator, generate
from transformer.generation.sampling import GREEDY
from transformer.layers.runtime import Runtime
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.models.classifier import Classifier
from transformer.models.decoder import Decoder
from transformer.models.embedder import Embedder
from transformer.models.encoder import Encoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.models.init import init_params
from transformer.models.light import light_params
from transformer.ops.panels import Panels
from transformer.ops.quantized import Quantized, quantize, quantized_rows

TOKENS = np.random.default_rng(0).integers(1, 29, (2, 12))


def config(**changes):
    block = BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=2, use_bias=True), FeedForwardConfig(hidden_dim=48))
    return ModelConfig(
        **{"vocab_size": 29, "max_length": 40, "num_layers": 2, "embed_dim": 32, "pattern": (block,), **changes}
    )


MIXTURE = (BlockConfig(AttentionConfig(num_heads=4), FeedForwardConfig(hidden_dim=48, gated=True, num_experts=4)),)
MODELS = {
    "decoder": Decoder(config(tie_embeddings=False)),
    "tied": Decoder(config(tie_embeddings=True)),
    "scanned": Decoder(config(scan_layers=True, num_layers=3)),
    "experts": Decoder(config(pattern=MIXTURE)),
    "adapters": Decoder(config(), Runtime(adapter=AdapterConfig(rank=2))),
    "masked": Encoder(config(masked_head=True, token_types=2)),
    "classifier": Classifier(config(), num_classes=3),
    "embedder": Embedder(config()),
    "translator": EncoderDecoder(config()),
}


@functools.cache
def make(name):
    """A model, random parameters whose columns differ in size, and a call."""
    model = MODELS[name]
    shapes = [(1, 1), (1, 1)] if name == "translator" else [(1, 1)]
    params, _ = init_params(model, jax.random.key(0), *shapes)
    sizes = np.random.default_rng(1)

    def grown(x):
        return jnp.asarray(np.asarray(x) * np.exp(sizes.normal(size=x.shape[-1:])).astype(x.dtype))

    inputs = [TOKENS] * len(shapes)

    apply = jax.jit(model.apply)

    def call(params):
        return jnp.asarray(apply({"params": params}, *inputs))

    def trace():
        return init_params(model, None, *shapes)

    return model, jax.tree.map(grown, params), call, trace


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_lighter_weights_compute_nearly_the_same(name, weights):
    _, params, call, trace = make(name)
    light = light_params(params, trace, weights)
    whole, found = call(params), call(light)
    error = float(jnp.linalg.norm(whole - found) / jnp.linalg.norm(whole))
    assert 0 < error < 0.04
    flat = flatten_dict(light)
    kind = {path[-2] for path, leaf in flat.items() if isinstance(leaf, Quantized) or leaf.dtype == jnp.bfloat16}
    assert {"query", "key", "value", "out", "up", "down"} <= kind
    assert "router" not in kind
    matrices = [path for path in flat if path[-1] in ("kernel", "embedding") and path[-2] in kind]
    before = sum(flatten_dict(params)[path].nbytes for path in matrices)
    after = sum(leaf.nbytes for path in matrices for leaf in jax.tree.leaves(flat[path]))
    assert after < before * (0.4 if weights == "int8" else 0.51)
    if weights == "int8":
        assert all(flat[path].values.dtype == jnp.int8 for path in matrices)


def test_each_output_has_a_scale_and_rows_of_a_table_too():
    """A scale along the wrong axis loses small columns; each of these is found again within half of its step."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 3)) * np.array([1e-3, 1, 1e3]), jnp.float32)
    light = quantize(kernel, (-3,))
    assert light.scales.shape == (1, 2, 3)
    np.testing.assert_array_less(
        abs(light.whole(jnp.float32) - kernel), jnp.broadcast_to(light.scales * 0.501, kernel.shape)
    )
    table = jnp.array([[1e-3, 2e-3], [1e3, 5e2], [0, 0]])
    rows = quantized_rows(quantize(table, (-1,)), jnp.array([0, 1, 2, 3]))
    np.testing.assert_allclose(rows[:3], table, rtol=0.01)
    assert np.isnan(rows[3]).all()


def test_what_is_not_finite_stays_so():
    kernel = jnp.array([[1.0, jnp.nan], [2.0, 3.0]])
    assert np.isnan(quantize(kernel, (0,)).whole(jnp.float32)[:, 1]).all()


@pytest.mark.parametrize("name", ["decoder", "tied", "scanned", "experts"])
@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_generation_goes_by_the_light_model(name, weights):
    """Cached decoding, of one row and of several, gives the tokens of the light model on whole rows, and holds no copy."""
    model, params, _, trace = make(name)
    light = light_params(params, trace, weights)
    prompts = [[3, 1, 4], [1, 5]]
    expected, logits_of = [], jax.jit(model.apply)
    for prompt in prompts:
        row = list(prompt)
        for _ in range(6):
            padded = jnp.array([row + [0] * (10 - len(row))])
            row.append(int(logits_of({"params": light}, padded)[0, len(row) - 1].argmax()))
        expected.append(row[len(prompt) :])
    generator = Generator(model, light)
    assert generator.generate(prompts, max_new_tokens=6, sampling=GREEDY).tokens.tolist() == expected
    assert generate(model, light, prompts[:1], max_new_tokens=6, sampling=GREEDY).tokens.tolist() == expected[:1]
    flat = flatten_dict(generator._target.prepared(2))
    assert {path[-2] for path, leaf in flat.items() if isinstance(leaf, Panels)} <= {"router"}


def test_a_loop_holds_no_converted_kernels():
    """XLA must convert a kernel where it is multiplied: before the loop, it would hold all of them in float32."""
    model = Decoder(config(embed_dim=128, num_layers=4, tie_embeddings=False))
    params, _ = init_params(model, jax.random.key(0))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def steps(params, tokens):
        def step(_, tokens):
            return model.apply({"params": params}, tokens).argmax(-1)

        return jax.lax.fori_loop(0, 9, step, tokens)

    light = light_params(params, lambda: init_params(model, None), "int8")
    compiled = jax.jit(steps).lower(light, jnp.zeros((1, 1), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2
