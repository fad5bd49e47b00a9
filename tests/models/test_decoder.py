"""What every decoder keeps to: causality, packing, caching, positions as data, the ends of the model."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.cache import cache_lengths, cache_overflow
from transformer.layers.embedding import Embed
from transformer.layers.runtime import Runtime
from transformer.layers.scan_params import scan_params
from transformer.model_config import BlockConfig
from transformer.model_kinds import NORMS
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.ops.patterns.fixed import FixedPattern
from transformer.ops.patterns.strided import StridedPattern

pytestmark = pytest.mark.usefixtures("strict_dtypes")
KINDS = ["none", "learned", "sinusoidal", "rotary", "alibi", "t5", "transformer_xl"]


def cheap_key(seed):
    """A key whose random bits compile fast."""
    return jax.random.key(seed, impl="unsafe_rbg")


def jacobian(tiny, config, length):
    """[T, T]: the largest |d logits_t / d embedding_s|, in one compiled call."""
    model, params, tokens = tiny.build(config), tiny.params(config), tiny.tokens((1, length))

    def logits(offset):
        def add(call, args, kwargs, context):
            out = call(*args, **kwargs)
            return out + offset if isinstance(context.module, Embed) and context.method_name == "__call__" else out

        with nn.intercept_methods(add):
            out = model.apply({"params": params}, tokens)
        return (out[0] * np.random.default_rng(1).standard_normal(out.shape[1:]).astype(np.float32)).sum(axis=-1)

    gradient = tiny.jit(jax.jacrev(logits))(jnp.zeros((1, length, config.embed_dim)))
    return np.abs(gradient[:, 0]).max(axis=-1)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("none", "xla"),
        ("learned", "xla"),
        ("rotary", "xla"),
        ("alibi", "xla"),
        ("t5", "xla"),
        ("t5", "blockwise"),
        ("transformer_xl", "blockwise"),
        ("rotary", "blockwise"),
    ],
)
def test_causality_by_gradient(tiny, kind, backend):
    effect = jacobian(tiny, tiny.config(kind, attention={"implementation": backend}), 6)
    past = np.tri(6, dtype=bool)
    assert (effect[past] > 1e-4).all()
    assert (effect[~past] == 0).all()


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_window_bounds_the_gradient(tiny, backend):
    config = tiny.config("rotary", attention={"window": 2, "implementation": backend})
    effect = jacobian(tiny, config, 6)
    distance = np.arange(6)[:, None] - np.arange(6)[None]
    # Two layers see one token back each.
    seen = (distance >= 0) & (distance <= 2)
    assert (effect[seen] > 1e-4).all()
    assert (effect[~seen] == 0).all()


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_separate(tiny, kind, backend):
    # Rotary, the default, at two layers; the others need but one.
    layers = 2 if kind == "rotary" else 1
    config = tiny.config(kind, attention={"implementation": backend}, num_layers=layers)
    separate_config = tiny.config(kind, attention={"implementation": "xla"}, num_layers=layers)
    documents = tiny.tokens((2, 5))
    weights = np.random.default_rng(2).standard_normal((2, 5, 13)).astype(np.float32)
    gradient, logits = tiny.graded(separate_config)(tiny.params(config), weights, documents)

    def pack(rows, fill=0):
        return np.concatenate([rows[0], rows[1], np.full((2, *rows.shape[2:]), fill, rows.dtype)])[None]

    packed_gradient, packed_logits = tiny.graded(config)(
        tiny.params(config),
        pack(weights),
        pack(documents, fill=7),
        positions_BT=pack(np.tile(np.arange(5, dtype=np.int32), (2, 1))),
        segment_ids_BT=pack(np.array([[1] * 5, [2] * 5], np.int32)),
    )
    np.testing.assert_allclose(packed_logits[0, :10].reshape(logits.shape), logits, atol=2e-5)
    tiny.assert_trees_close(packed_gradient, gradient)


def read_in_chunks(tiny, config, params, tokens, chunks, capacity=8):
    cache, out, start = tiny.build(config).init_cache(len(tokens), capacity), [], 0
    for size in chunks:
        logits, cache = tiny.forward(config)(params, tokens[:, start : start + size], cache=cache)
        out.append(np.asarray(logits))
        start += size
    return np.concatenate(out, axis=1), cache


@pytest.mark.parametrize("chunks", [(8,), (1,) * 8, (3, 5), (5, 1, 1, 1), (1, 3, 3, 1)], ids=str)
def test_cached_is_full_for_any_chunks(tiny, chunks):
    config, tokens = tiny.config("rotary"), tiny.tokens((3, 8))
    full = tiny.forward(config)(tiny.params(config), tokens)
    cached, cache = read_in_chunks(tiny, config, tiny.params(config), tokens, chunks)
    np.testing.assert_allclose(cached, full, atol=2e-5)
    assert cache_lengths(cache).tolist() == [8, 8, 8]
    assert not cache_overflow(cache)


@pytest.mark.parametrize(
    ("kind", "window"),
    [("none", 3), ("learned", 0), ("sinusoidal", 0), ("rotary", 3), ("alibi", 3), ("t5", 3), ("transformer_xl", 3)],
)
def test_cached_is_full_for_every_kind(tiny, kind, window):
    config, tokens = tiny.config(kind, attention={"window": window}, num_layers=1), tiny.tokens((3, 8))
    full = tiny.forward(config)(tiny.params(config), tokens)
    cached, _ = read_in_chunks(tiny, config, tiny.params(config), tokens, (5, 1, 1, 1))
    np.testing.assert_allclose(cached, full, atol=2e-5)


@pytest.mark.parametrize("pattern", [StridedPattern(1, 3), FixedPattern(2, 2)], ids=lambda pattern: pattern.kind)
def test_patterns_cached_and_packed(tiny, pattern):
    config = tiny.config("rotary", attention={"pattern": pattern}, num_layers=1)
    tokens = tiny.tokens((3, 8))
    full = tiny.forward(config)(tiny.params(config), tokens)
    dense = tiny.forward(tiny.config("rotary", num_layers=1))(tiny.params(config), tokens)
    assert np.abs(full - dense).max() > 1e-3
    cached, _ = read_in_chunks(tiny, config, tiny.params(config), tokens, (5, 1, 1, 1))
    np.testing.assert_allclose(cached, full, atol=2e-5)
    # The second document begins in the middle of a block of the row.
    segments = jnp.tile(jnp.array([[1] * 3 + [2] * 5], jnp.int32), (3, 1))
    positions = jnp.tile(jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]], jnp.int32), (3, 1))
    packed = tiny.forward(config)(tiny.params(config), tokens, segment_ids_BT=segments, positions_BT=positions)
    alone = tiny.forward(config)(tiny.params(config), tokens[:, 3:])
    np.testing.assert_allclose(packed[:, 3:], alone, atol=2e-5)


def test_cached_is_full_when_scanned(tiny):
    loop, tokens = tiny.config("rotary"), tiny.tokens((3, 8))
    scanned = dataclasses.replace(loop, scan_layers=True)
    full = tiny.forward(loop)(tiny.params(loop), tokens)
    cached, cache = read_in_chunks(tiny, scanned, scan_params(tiny.params(loop)), tokens, (5, 1, 1, 1))
    np.testing.assert_allclose(cached, full, atol=2e-5)
    assert cache_lengths(cache).tolist() == [8, 8, 8]
    assert not cache_overflow(cache)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
@pytest.mark.parametrize("kind", ["learned", "rotary", "alibi", "t5", "transformer_xl"])
def test_cached_rows_of_different_lengths(tiny, kind, backend):
    layers = 2 if kind == "rotary" else 1
    config = tiny.config(kind, attention={"implementation": backend}, num_layers=layers)
    tokens = tiny.tokens((3, 8))
    full = np.asarray(tiny.forward(tiny.config(kind, num_layers=layers))(tiny.params(config), tokens))
    lengths = np.array([5, 2, 0])
    valid = (np.arange(5)[None] < lengths[:, None]).astype(np.int32)
    cache = tiny.build(config).init_cache(3, 8)
    prompt = np.where(valid == 1, tokens[:, :5], 9)
    logits, cache = tiny.forward(config)(tiny.params(config), prompt, segment_ids_BT=valid, cache=cache)
    assert cache_lengths(cache).tolist() == lengths.tolist()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], full[row, :length], atol=2e-5)
    for step in range(3):
        places = lengths + step
        token = tokens[np.arange(3), places][:, None]
        logits, cache = tiny.forward(config)(tiny.params(config), token, cache=cache)
        np.testing.assert_allclose(logits[:, 0], full[np.arange(3), places], atol=2e-5)
    assert not cache_overflow(cache)


def test_padding_beyond_the_capacity_is_no_overflow(tiny):
    config = tiny.config("learned")
    tokens, valid = tiny.tokens((2, 5)), np.array([[1] * 4 + [0], [1, 1, 0, 0, 0]], np.int32)
    full = tiny.forward(config)(tiny.params(config), tokens)
    cache = tiny.build(config).init_cache(2, 4)
    logits, cache = tiny.forward(config)(tiny.params(config), tokens, segment_ids_BT=valid, cache=cache)
    assert not cache_overflow(cache)
    assert cache_lengths(cache).tolist() == [4, 2]
    np.testing.assert_allclose(logits[0, :4], full[0, :4], atol=2e-5)
    assert np.isfinite(logits).all()


def test_overflow_drops_and_flags(tiny):
    config, tokens = tiny.config("rotary"), tiny.tokens((3, 8))
    _, full = read_in_chunks(tiny, config, tiny.params(config), tokens, (5, 1, 1), capacity=7)
    assert not cache_overflow(full)
    _, over = read_in_chunks(tiny, config, tiny.params(config), tokens, (5, 1, 1, 1), capacity=7)
    assert cache_overflow(over)
    for before, after in zip(full, over, strict=True):
        np.testing.assert_array_equal(before.attention.key_BGPK, after.attention.key_BGPK)
        np.testing.assert_array_equal(before.attention.value_BGPK, after.attention.value_BGPK)
    assert cache_lengths(over).tolist() == [7, 7, 7]


def test_cached_step_compiles_once(tiny):
    config = tiny.config("rotary", num_layers=1)
    model = tiny.build(config)
    step = tiny.jit(lambda params, tokens, cache: model.apply({"params": params}, tokens, cache=cache))
    cache = model.init_cache(1, 8)
    for token in (1, 2, 3):
        _, cache = step(tiny.params(config), jnp.array([[token]]), cache)
    assert step._cache_size() == 1


def test_cache_refuses_positions_and_lengths_it_cannot_hold(tiny):
    config = tiny.config("learned")
    model, variables = tiny.build(config), {"params": tiny.params(config)}
    apply = functools.partial(jax.eval_shape, model.apply, variables)
    positions = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="With a cache, positions are its next slots; leave positions_BT out"):
        apply(tiny.tokens((1, 2)), positions_BT=positions, cache=model.init_cache(1, 8))
    with pytest.raises(ValueError, match="Learned positions reach max_length=12 tokens, got 13; raise max_length"):
        model.init_cache(1, 13)
    with pytest.raises(ValueError, match="Learned positions reach max_length=12 tokens, got 13; raise max_length"):
        apply(tiny.tokens((1, 13)))


def test_cache_dtype(tiny):
    config = tiny.config("rotary")
    cache = tiny.build(config).init_cache(2, 8, jnp.bfloat16)
    tokens = tiny.tokens((2, 5))
    logits, cache = tiny.forward(config)(tiny.params(config), tokens, cache=cache)
    assert cache[0].attention.key_BGPK.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, tiny.forward(config)(tiny.params(config), tokens), atol=0.1)


def test_positions_are_data(tiny):
    for kind in ("learned", "rotary", "alibi", "t5"):
        config, tokens = tiny.config(kind, num_layers=1), tiny.tokens((2, 5))
        plain = tiny.forward(config)(tiny.params(config), tokens)
        given = np.tile(np.arange(5, dtype=np.int32), (2, 1))
        same = tiny.forward(config)(tiny.params(config), tokens, positions_BT=given)
        np.testing.assert_allclose(same, plain, atol=1e-6)
        spread = tiny.forward(config)(tiny.params(config), tokens, positions_BT=2 * given)
        assert np.abs(spread - plain).max() > 1e-2, kind
        # Left padding: where a row starts does not matter.
        moved = np.concatenate([np.full((2, 2), 7, np.int32), tokens[:, :3]], axis=1)
        padded = tiny.forward(config)(
            tiny.params(config),
            moved,
            positions_BT=np.maximum(given - 2, 0),
            segment_ids_BT=np.tile(np.array([0, 0, 1, 1, 1], np.int32), (2, 1)),
        )
        np.testing.assert_allclose(padded[:, 2:], plain[:, :3], atol=2e-5)


def test_tied_and_untied_logits(tiny):
    tied, untied = tiny.config(), tiny.config(tie_embeddings=False)
    assert "output" not in tiny.params(tied)
    params = {**tiny.params(untied), "output": {"kernel": tiny.params(untied)["token_embedding"]["embedding"].T}}
    tokens = tiny.tokens((2, 5))
    expected = tiny.forward(tied)({k: v for k, v in params.items() if k != "output"}, tokens)
    np.testing.assert_allclose(tiny.forward(untied)(params, tokens), expected, atol=1e-6)


def test_logits_soft_cap_scale_and_scaled_embeddings(tiny):
    config, tokens = tiny.config(), tiny.tokens((2, 5))
    params = tiny.params(config)
    plain = np.asarray(tiny.forward(config)(params, tokens))
    capped = tiny.forward(dataclasses.replace(config, logits_soft_cap=2.0))(params, tokens)
    np.testing.assert_allclose(capped, 2 * np.tanh(plain / 2), atol=1e-5)
    untied = tiny.config(tie_embeddings=False)
    scaled = dataclasses.replace(untied, scale_embeddings=True)
    params = tiny.params(untied)
    larger = {**params, "token_embedding": {"embedding": 4 * params["token_embedding"]["embedding"]}}
    np.testing.assert_allclose(tiny.forward(scaled)(params, tokens), tiny.forward(untied)(larger, tokens), atol=1e-5)
    params = tiny.params(config)
    halved = tiny.forward(dataclasses.replace(config, logits_scale=0.5))(params, tokens)
    np.testing.assert_allclose(halved, 0.5 * plain, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_bfloat16_follows_float32(tiny, kind, placement):
    norm = NORMS.find(kind)(placement, **({"use_bias": True} if kind == "layer_norm" else {}))
    config = tiny.config("learned", num_layers=1, tie_embeddings=kind == "rms_norm", block={"norm": norm})
    half = dataclasses.replace(config, dtype="bfloat16")
    tokens = tiny.tokens((2, 5))
    expected = np.asarray(tiny.forward(config)(tiny.params(config), tokens))
    actual = tiny.forward(half)(tiny.params(config), tokens)
    assert actual.dtype == jnp.float32
    assert 0 < np.abs(actual - expected).max() < 0.15 * np.abs(expected).max()
    names = tiny.params(config)["decoder"]
    assert ("final_norm" in names) == (placement != "post")


def test_final_norm_is_a_choice(tiny):
    assert "final_norm" not in tiny.params(tiny.config(final_norm=False))["decoder"]


def test_dropout_needs_train_and_a_key(tiny):
    config = tiny.config(dropout=0.5, attention={"dropout": 0.5}, num_layers=1)
    model, tokens = tiny.build(config), tiny.tokens((2, 5))
    plain = tiny.forward(dataclasses.replace(config, dropout=0.0))(tiny.params(config), tokens)
    np.testing.assert_array_equal(tiny.forward(config)(tiny.params(config), tokens), plain)
    params = tiny.params(config)
    dropped = tiny.jit(lambda key: model.apply({"params": params}, tokens, train=True, rngs={"dropout": key}))
    one, again, other = (dropped(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(one - plain).max() > 1e-2


def test_initial_parameters_do_not_depend_on_train(tiny):
    model = Decoder(tiny.config(dropout=0.1, attention={"dropout": 0.1}, num_layers=1))
    tokens, keys = tiny.tokens((2, 5)), {name: cheap_key(seed) for seed, name in enumerate(("params", "dropout"))}
    trained = jax.jit(lambda: model.init(keys, tokens, train=True))()["params"]
    params, _ = init_params(model, cheap_key(0))
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, trained, params)


def test_pattern_repeats(tiny):
    local = tiny.config(attention={"window": 2}).pattern[0]
    config = tiny.config(num_layers=2, pattern=(local, tiny.config().pattern[0]))
    effect = jacobian(tiny, config, 6)
    assert effect[5, 0] > 1e-4
    config = tiny.config(num_layers=2, pattern=(local, local))
    assert jacobian(tiny, config, 6)[5, 0] == 0


def test_vocabulary_must_be_resolved(tiny):
    with pytest.raises(
        ValueError, match="needs the size of its vocabulary, got vocab_size=0; set it to the tokenizer's"
    ):
        Decoder(tiny.config(vocab_size=0)).init(jax.random.key(0), tiny.tokens((1, 2)))


def test_heads_must_divide(tiny):
    with pytest.raises(ValueError, match=r"num_heads must divide ModelConfig\.embed_dim=18, got 4"):
        tiny.config(embed_dim=18, pattern=(BlockConfig(),))


def test_injected_dot_general_does_every_projection(tiny):
    kernels = []

    def recording(lhs, rhs, dimension_numbers, *, precision=None, preferred_element_type=None):
        kernels.append(rhs.shape)
        return jax.lax.dot_general(
            lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
        )

    config = tiny.config()
    model, tokens = Decoder(config, runtime=Runtime(dot_general=recording)), tiny.tokens((2, 5))
    jax.eval_shape(lambda p: model.apply({"params": p}, tokens), tiny.params(config))
    # Query, key, value, out, up and down of two layers, and the logits.
    assert len(kernels) == 2 * 6 + 1
    assert kernels[-1] == (16, 13)
