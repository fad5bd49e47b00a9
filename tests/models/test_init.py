"""The parameter tree: names, shapes, types and logical axes as golden files, and its initial values."""

import concurrent.futures
import dataclasses
import math
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from transformer.layers.linear import Linear
from transformer.layers.runtime import named_axes
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.encoder import Encoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.models.init import init_params
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.positions.learned import LearnedPositions
from transformer.ops.positions.transformer_xl import TransformerXLPositions

GOLDEN = pathlib.Path(__file__).parent / "golden"
SIZES = {"vocab_size": 11, "max_length": 6, "num_layers": 2, "embed_dim": 8}
GPT = BlockConfig(
    attention=AttentionConfig(use_bias=True),
    feed_forward=FeedForwardConfig(use_bias=True),
    norm=LayerNorm(use_bias=True),
)
LLAMA = BlockConfig(
    attention=AttentionConfig(num_kv_heads=2, qk_norm=True),
    feed_forward=FeedForwardConfig(hidden_dim=12, activation="silu", gated=True),
    norm=RMSNorm(placement="sandwich"),
)
LOCAL = dataclasses.replace(LLAMA, attention=AttentionConfig(num_heads=2, head_dim=6, window=3))
POST = BlockConfig(norm=LayerNorm(placement="post"))
MIXTURE = dataclasses.replace(
    LLAMA, feed_forward=FeedForwardConfig(hidden_dim=12, activation="silu", gated=True, num_experts=3)
)
MODELS = {
    "decoder": Decoder(ModelConfig(**SIZES, pattern=(GPT,), positions=LearnedPositions())),
    "decoder_untied_pattern": Decoder(
        ModelConfig(**{**SIZES, "num_layers": 4}, pattern=(LOCAL, LLAMA), tie_embeddings=False)
    ),
    "decoder_scanned": Decoder(ModelConfig(**{**SIZES, "num_layers": 4}, pattern=(LOCAL, LLAMA), scan_layers=True)),
    "decoder_experts": Decoder(
        ModelConfig(**SIZES, pattern=(POST, dataclasses.replace(POST, feed_forward=FeedForwardConfig(num_experts=3))))
    ),
    "decoder_experts_scanned": Decoder(ModelConfig(**SIZES, pattern=(MIXTURE,), scan_layers=True)),
    "decoder_transformer_xl": Decoder(
        ModelConfig(**SIZES, pattern=(LLAMA,), positions=TransformerXLPositions(), memory_length=3)
    ),
    "encoder": Encoder(ModelConfig(**SIZES, pattern=(POST,))),
    "encoder_decoder": EncoderDecoder(ModelConfig(**SIZES, param_dtype="bfloat16")),
}


def key(seed):
    """A key whose random bits compile fast."""
    return jax.random.key(seed, impl="unsafe_rbg")


def abstract(model):
    """Shapes of the parameters, and their axes, without computing any."""
    shapes = [(1, 2)] * (2 if isinstance(model, EncoderDecoder) else 1)
    axes = {}

    def params(key):
        values, axes["tree"] = init_params(model, key, *shapes)
        return values

    return jax.eval_shape(params, key(0)), axes["tree"]


@pytest.mark.parametrize("name", MODELS)
def test_tree_is_golden(name):
    """After a deliberate change: UPDATE_GOLDEN=1 pytest tests/models/test_init.py, and read the difference."""
    params, axes = abstract(MODELS[name])
    lines = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.dtype} {leaf.shape} {tuple(spec)}\n"
        for (path, leaf), spec in zip(
            jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(axes), strict=True
        )
    ]
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text("".join(lines))
    assert "".join(lines) == path.read_text()


def test_params_are_plain_arrays_and_axes_fit_them():
    params, axes = abstract(MODELS["decoder_scanned"])
    assert jax.tree.structure(params) == jax.tree.structure(axes)
    jax.tree.map(lambda leaf, spec: (leaf.ndim == len(spec)) or pytest.fail(str(spec)), params, axes)


@pytest.fixture(scope="module")
def initial():
    """Parameters of a model wide enough for statistics, and of others made from the same key."""
    config = ModelConfig(vocab_size=64, num_layers=8, embed_dim=64, scan_layers=True, tie_embeddings=False)
    return config, init_params(Decoder(config), key(0))[0]


def test_initial_scales(initial):
    config, params = initial
    blocks = params["decoder"]["blocks"]["block_0"]
    residual = 0.02 / math.sqrt(2 * config.num_layers)
    for kernel, std in [
        (blocks["attention"]["query"]["kernel"], 0.02),
        (blocks["attention"]["value"]["kernel"], 0.02),
        (blocks["attention"]["out"]["kernel"], residual),
        (blocks["feed_forward"]["up"]["kernel"], 0.02),
        (blocks["feed_forward"]["down"]["kernel"], residual),
        (params["token_embedding"]["embedding"], 0.02),
        (params["output"]["kernel"], 0.02),
    ]:
        np.testing.assert_allclose(np.std(kernel), std, rtol=0.05)
    # Layers of a scan differ.
    assert len(np.unique(np.asarray(blocks["attention"]["query"]["kernel"])[:, 0, 0, 0])) == config.num_layers
    np.testing.assert_array_equal(blocks["pre_attention_norm"]["scale"], 1)


def test_initial_scales_by_fan_in(initial):
    config = dataclasses.replace(initial[0], init_std=0.0)
    params, _ = init_params(Decoder(config), key(0))
    blocks = params["decoder"]["blocks"]["block_0"]
    for kernel, fan_in in [
        (blocks["attention"]["query"]["kernel"], 64),
        (blocks["attention"]["out"]["kernel"], 64 * 16),
        (blocks["feed_forward"]["down"]["kernel"], 256 * 16),
        (params["token_embedding"]["embedding"], 64),
    ]:
        np.testing.assert_allclose(np.std(kernel), fan_in**-0.5, rtol=0.05)


def test_key_decides_and_shapes_do_not(initial):
    config, params = initial
    again, _ = init_params(Decoder(config), key(0), (2, 5))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    other, _ = init_params(Decoder(config), key(1))
    assert not np.array_equal(other["token_embedding"]["embedding"], params["token_embedding"]["embedding"])


def is_box(node):
    return isinstance(node, nn.meta.AxisMetadata)


@pytest.mark.parametrize("name", ["decoder_untied_pattern", "decoder_scanned", "decoder_experts_scanned"])
def test_init_gives_plain_arrays_before_and_after_names_were_wanted(name):
    """What linen remembers of a trace must not hold the names, or lack them."""
    model, tokens = MODELS[name], jax.ShapeDtypeStruct((1, 2), np.int32)
    init = jax.jit(model.init)
    before = jax.eval_shape(init, key(0), tokens)
    first, names = init_params(model, None, (1, 2))
    after = jax.eval_shape(init, key(0), tokens)
    second, names_again = init_params(model, None, (1, 2))
    trees = before["params"], first, after["params"], second
    assert not any(is_box(leaf) for tree in trees for leaf in jax.tree.leaves(tree, is_leaf=is_box))
    assert before["params"] == first == after["params"] == second
    assert names == names_again
    assert jax.tree.leaves(names)


def test_names_first_then_plain():
    model, tokens = Decoder(ModelConfig(**SIZES, scan_layers=True)), jax.ShapeDtypeStruct((1, 2), np.int32)
    _, names = init_params(model, None)
    assert names["decoder"]["blocks"]["block_0"]["attention"]["query"]["kernel"][0] == "layers"
    params = jax.eval_shape(model.init, key(0), tokens)["params"]
    assert params["decoder"]["blocks"]["block_0"]["attention"]["query"]["kernel"].shape == (2, 8, 4, 2)


def test_names_do_not_leak_from_a_failed_init():
    with pytest.raises(ValueError, match="needs the size of its vocabulary"):
        init_params(Decoder(ModelConfig()), None)
    layer = Linear((3,), ("embed", "hidden"))
    assert layer.init(key(0), jnp.ones((1, 2)))["params"]["kernel"].shape == (2, 3)


def test_names_stay_in_the_thread_that_wants_them():
    layer, inputs = Linear((3,), ("embed", "hidden")), jnp.ones((1, 2))
    with named_axes(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert is_box(layer.init(key(0), inputs)["params"]["kernel"])
        assert not is_box(pool.submit(layer.init, key(0), inputs).result()["params"]["kernel"])
    assert not is_box(layer.init(key(0), inputs)["params"]["kernel"])


def test_init_under_jit_equals_init_params():
    """The same arrays to the bit, for every way of requesting them."""
    model, tokens = MODELS["decoder_scanned"], jnp.zeros((1, 1), jnp.int32)
    params, _ = init_params(model, key(0))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(model.init)(key(0), tokens)["params"], params)


def test_initial_parameters_go_to_a_file(tmp_path):
    params = Decoder(ModelConfig(**SIZES)).init(key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    flat = traverse_util.flatten_dict(params, sep="/")
    np.savez(tmp_path / "params.npz", **flat)
    with np.load(tmp_path / "params.npz") as stored:  # without pickle: numbers only
        assert {name: stored[name].shape for name in stored} == {name: leaf.shape for name, leaf in flat.items()}
