"""The fields that families of pretrained models need: formulas in NumPy, and the contracts of every model with all of them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer import memory
from transformer.config import Config
from transformer.layers.scan_params import scan_params
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.models.classifier import Classifier
from transformer.models.decoder import Decoder
from transformer.models.encoder import Encoder
from transformer.objectives.classification import Classification
from transformer.objectives.masked_lm import MaskedLM
from transformer.ops.norms.layer_norm import LayerNorm
from transformer.ops.norms.rms_norm import RMSNorm
from transformer.ops.poolings.first import FirstPooling
from transformer.ops.positions.learned import LearnedPositions
from transformer.parts import count_parameters
from transformer.types import UserError

pytestmark = pytest.mark.usefixtures("strict_dtypes")
BERT = BlockConfig(
    AttentionConfig(num_heads=4, use_bias=True),
    FeedForwardConfig(hidden_dim=24, use_bias=True),
    LayerNorm(placement="post", epsilon=1e-3, use_bias=True),
)
BERT_MODEL = {
    "vocab_size": 13,
    "max_length": 12,
    "num_layers": 2,
    "embed_dim": 16,
    "pattern": (BERT,),
    "positions": LearnedPositions(offset=2),
    "embedding_norm": True,
    "token_types": 2,
}
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, use_bias=True, out_bias=False, query_scale=0.7)
OLMO = dataclasses.replace(ATTENTION, qk_norm=True, qk_norm_scope="all")
BLOCKS = {
    "output": BlockConfig(OLMO, FeedForwardConfig(24), RMSNorm(placement="output", epsilon=1e-3)),
    "parallel": BlockConfig(ATTENTION, FeedForwardConfig(24), RMSNorm(unit_offset=True), parallel=True),
    "no norm": BlockConfig(
        dataclasses.replace(ATTENTION, qk_norm=True),
        FeedForwardConfig(24),
        RMSNorm(unit_offset=True),
        attention_norm=False,
    ),
    "experts": BlockConfig(ATTENTION, FeedForwardConfig(24, num_experts=4, normalize_experts=False)),
}
AROUND = {"embedding_norm": True, "output_bias": True, "logits_scale": 0.5}


def random(shapes, seed=0):
    """Parameters large enough that every part matters."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * generator.standard_normal(x.shape), x.dtype), shapes)


def tokens(rows, length, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 13, (rows, length)), jnp.int32)


# ---- BERT in NumPy ---------------------------------------------------------------------------------------------------


def layer_norm(p, x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-3) * p["scale"] + p["bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def bert_hidden(params, ids, types):
    """Devlin et al. 2019: post-norm blocks on normalised sums of three embeddings."""
    encoder = params["encoder"]
    x = params["token_embedding"]["embedding"][ids] + params["token_type_embedding"]["embedding"][types]
    x = x + encoder["position_embedding"]["embedding"][2 : 2 + ids.shape[1]]
    x = layer_norm(encoder["embedding_norm"], x)
    for block in encoder["blocks"].values():
        a = block["attention"]
        query, key, value = (
            np.einsum("btd,dhk->bhtk", x, a[r]["kernel"]) + a[r]["bias"][:, None] for r in ("query", "key", "value")
        )
        weights = np.exp(np.einsum("bhtk,bhsk->bhts", query, key) / math.sqrt(query.shape[-1]))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended = np.einsum("bhts,bhsk,hkd->btd", weights, value, a["out"]["kernel"]) + a["out"]["bias"]
        x = layer_norm(block["post_attention_norm"], x + attended)
        f = block["feed_forward"]
        network = gelu(x @ f["up"]["kernel"] + f["up"]["bias"]) @ f["down"]["kernel"] + f["down"]["bias"]
        x = layer_norm(block["post_feed_forward_norm"], x + network)
    return x


def bert_logits(params, ids, types, tied):
    x = gelu(bert_hidden(params, ids, types) @ params["head_dense"]["kernel"] + params["head_dense"].get("bias", 0))
    x = 0.5 * layer_norm(params["head_norm"], x)
    kernel = params["token_embedding"]["embedding"].T if tied else params["output"]["kernel"]
    return x @ kernel + params["output"]["bias"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_bias", [True, False])
def test_a_masked_language_model_is_its_formula(small_jit, tied, head_bias):
    config = ModelConfig(
        **BERT_MODEL,
        masked_head=True,
        head_bias=head_bias,
        output_bias=True,
        logits_scale=0.5,
        tie_embeddings=tied,
    )
    model, ids = Encoder(config), tokens(2, 5)
    types = jnp.array([[0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
    params = random(jax.eval_shape(functools.partial(model.init, method="logits"), jax.random.key(0), ids)["params"])
    assert {"head_dense", "head_norm", "output", "token_type_embedding"} <= set(params)
    assert set(params["head_dense"]) == {"kernel", *["bias"] * head_bias}
    assert set(params["output"]) == {"bias", *["kernel"] * (not tied)}
    double = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    apply = small_jit(lambda types: model.apply({"params": params}, ids, token_types_BT=types, method="logits"))
    np.testing.assert_allclose(apply(types), bert_logits(double, ids, types, tied), atol=1e-4)
    zeros = bert_logits(double, ids, np.zeros_like(types), tied)
    np.testing.assert_allclose(apply(None), zeros, atol=1e-4)
    assert np.abs(apply(types) - zeros).max() > 0.01
    # First positions, then the head: as with all of them.
    some = model.apply({"params": params}, ids, indices_BN=jnp.array([[3], [1]]), method="logits")
    np.testing.assert_allclose(some[:, 0], zeros[[0, 1], [3, 1]], atol=1e-4)


def test_a_pooler_is_a_layer_before_the_classes(small_jit):
    config = ModelConfig(**BERT_MODEL, pooler=True, pooling=FirstPooling())
    model, ids, types = Classifier(config, num_classes=3), tokens(2, 5), jnp.array([[0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
    params = random(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    double = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    first = bert_hidden(double, ids, types)[:, 0]
    pooled = np.tanh(first @ double["pooler"]["kernel"] + double["pooler"]["bias"])
    expected = pooled @ double["classifier"]["kernel"] + double["classifier"]["bias"]
    apply = small_jit(lambda types: model.apply({"params": params}, ids, token_types_BT=types))
    np.testing.assert_allclose(apply(types), expected, atol=1e-4)


def test_token_types_need_a_table():
    config = ModelConfig(**{**BERT_MODEL, "token_types": 0})
    with pytest.raises(UserError, match=r"Token types need a table, got ModelConfig.token_types=0"):
        Encoder(config).init(jax.random.key(0), tokens(1, 2), token_types_BT=jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(UserError, match="must be at least 0 and below"):
        Encoder(ModelConfig(**BERT_MODEL)).init(
            jax.random.key(0), tokens(1, 2), token_types_BT=jnp.full((1, 2), 2, jnp.int32)
        )


# ---- Contracts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_scanned_is_looped_cached_is_full_and_packed_is_separate(tiny, name):
    config = tiny.config("rotary", pattern=(BLOCKS[name],), **AROUND)
    params, ids = tiny.params(config), tiny.tokens((2, 6))
    full = np.asarray(tiny.forward(config)(params, ids))
    scanned = tiny.forward(dataclasses.replace(config, scan_layers=True, remat="full"))(scan_params(params), ids)
    np.testing.assert_allclose(scanned, full, atol=1e-4)
    cache, parts = Decoder(config).init_cache(2, 8), []
    for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        logits, cache = tiny.forward(config)(params, part, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, atol=1e-4)
    packed = tiny.forward(config)(
        params,
        ids.reshape(1, 12),
        positions_BT=jnp.tile(jnp.arange(6), 2)[None],
        segment_ids_BT=jnp.repeat(jnp.array([1, 2]), 6)[None],
    )
    np.testing.assert_allclose(packed.reshape(full.shape), full, atol=1e-4)
    # A config of other values is another model.
    for changed in (
        {"logits_scale": 1.0},
        {
            "pattern": (
                dataclasses.replace(
                    BLOCKS[name], attention=dataclasses.replace(config.pattern[0].attention, query_scale=0)
                ),
            )
        },
    ):
        other = tiny.forward(dataclasses.replace(config, **changed))(params, ids)
        assert np.abs(other - full).max() > 1e-3, changed


def test_an_encoders_packed_texts_are_separate_ones(tiny):
    config = tiny.config("learned", architecture="encoder", masked_head=True, token_types=2, pattern=(BERT,), **AROUND)
    params, ids = tiny.params(config), tiny.tokens((2, 4))
    types = jnp.array([[0, 1, 1, 0], [1, 1, 0, 0]])
    apply = tiny.forward(config, "logits")
    packed = apply(
        params,
        ids.reshape(1, 8),
        positions_BT=jnp.tile(jnp.arange(4), 2)[None],
        segment_ids_BT=jnp.repeat(jnp.array([1, 2]), 4)[None],
        token_types_BT=types.reshape(1, 8),
    )
    np.testing.assert_allclose(packed.reshape(2, 4, -1), apply(params, ids, token_types_BT=types), atol=1e-4)


def test_the_other_half_of_a_pair_has_the_ends_too(tiny):
    config = tiny.config("t5", architecture="encoder_decoder", num_layers=1, **AROUND)
    params, ids = tiny.params(config), tiny.tokens((2, 4))
    assert all("embedding_norm" in params[stack] for stack in ("encoder", "decoder"))
    plain = dataclasses.replace(config, output_bias=False, logits_scale=1.0)
    without = tiny.forward(plain)({name: part for name, part in params.items() if name != "output"}, ids, ids)
    np.testing.assert_allclose(
        tiny.forward(config)(params, ids, ids), 0.5 * without + params["output"]["bias"][None, None], atol=1e-4
    )


# ---- Arithmetic and settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masked_lm", "classification"])
def test_parameters_by_arithmetic(kind):
    own = {"masked_head": True} if kind == "masked_lm" else {"pooler": True}
    config = ModelConfig(**{**BERT_MODEL, "token_types": 50, "embed_dim": 128}, **own)
    model = Encoder(config) if kind == "masked_lm" else Classifier(config, num_classes=2)
    init = functools.partial(model.init, method="logits") if kind == "masked_lm" else model.init
    exact = count_parameters(jax.eval_shape(init, jax.random.key(0), tokens(1, 2))["params"])
    assert 0.97 * exact < memory.num_parameters(config) <= exact


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Config(model=ModelConfig(masked_head=True)),
            "model.masked_head is for the objective masked_lm, got True",
        ),
        (
            lambda: Config(model=ModelConfig(pooler=True)),
            "model.pooler is for the objectives classification and embedding, got True",
        ),
        (
            lambda: Config(model=ModelConfig(token_types=2)),
            "model.token_types is for the objectives masked_lm and classification and embedding, got 2",
        ),
        (
            lambda: Config(model=ModelConfig(head_bias=False), objective=MaskedLM()),
            r"model.head_bias is for models with a head of their own \(masked_head\), got False",
        ),
        (
            lambda: attention(out_bias=False),
            r"attention.out_bias is for projections with biases \(use_bias\), got False",
        ),
        (
            lambda: attention(qk_norm_scope="all"),
            r"attention.qk_norm_scope is for normalised queries and keys \(qk_norm\)",
        ),
        (
            lambda: Config(
                model=ModelConfig(pattern=(BlockConfig(feed_forward=FeedForwardConfig(normalize_experts=False)),))
            ),
            "feed_forward.normalize_experts is for models with experts",
        ),
        (lambda: ModelConfig(logits_scale=0.0), "logits_scale must not be 0"),
        (lambda: AttentionConfig(query_scale=-1.0), "query_scale must be at least 0"),
        (lambda: LearnedPositions(offset=-1), "offset must be at least 0"),
    ],
)
def test_a_field_that_means_nothing_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def attention(**settings):
    return Config(model=ModelConfig(pattern=(BlockConfig(AttentionConfig(**settings)),)))


def test_each_objective_takes_its_own():
    Config(model=ModelConfig(masked_head=True, head_bias=False, token_types=2), objective=MaskedLM())
    Config(model=ModelConfig(pooler=True, token_types=2), objective=Classification())


@pytest.fixture
def small_jit(tiny):
    return tiny.jit
