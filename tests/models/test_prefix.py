"""Properties of a prefix LM: the prefix is bidirectional, later tokens are causal; packing and caching are exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.scan_params import scan_params

pytestmark = pytest.mark.usefixtures("strict_dtypes")

BACKENDS = ["xla", "blockwise"]


def prefix_config(tiny, kind="rotary", backend="xla", **changes):
    # What follows a prefix shows how it was read from the second layer on.
    layers = 2 if kind == "rotary" else 1
    return tiny.config(kind, attention={"implementation": backend}, architecture="prefix", num_layers=layers, **changes)


def first(counts, length):
    """The first tokens of each row."""
    return jnp.arange(length)[None] < jnp.asarray(counts)[:, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rotary", "t5"])
def test_who_is_changed_by_whom(tiny, kind, backend):
    config, tokens, prefix = prefix_config(tiny, kind, backend), tiny.tokens((1, 6)), first([3], 6)
    forward = tiny.forward(config)
    logits = forward(tiny.params(config), tokens, prefix_BT=prefix)
    rows = []
    for place in range(6):
        changed = forward(tiny.params(config), tokens.at[0, place].add(-1), prefix_BT=prefix)
        effect = np.abs(changed - logits)[0].max(axis=-1)
        assert ((effect == 0) | (effect > 1e-4)).all()
        rows.append("".join(str(int(moved)) for moved in effect > 0))
    # Row: the changed token; column: the logits that it moves.
    assert rows == ["111111", "111111", "111111", "000111", "000011", "000001"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["learned", "rotary", "alibi", "t5"])
def test_packed_is_separate(tiny, kind, backend):
    config, separate_config = prefix_config(tiny, kind, backend), prefix_config(tiny, kind)
    documents, prefix = tiny.tokens((2, 5)), np.asarray(first([2, 4], 5))
    weights = np.random.default_rng(2).standard_normal((2, 5, 13)).astype(np.float32)
    gradient, logits = tiny.graded(separate_config)(tiny.params(config), weights, documents, prefix_BT=prefix)

    def pack(rows, fill=0):
        return np.concatenate([rows[0], rows[1], np.full((2, *rows.shape[2:]), fill, rows.dtype)])[None]

    packed_gradient, packed_logits = tiny.graded(config)(
        tiny.params(config),
        pack(weights),
        pack(documents, fill=7),
        positions_BT=pack(np.tile(np.arange(5, dtype=np.int32), (2, 1))),
        segment_ids_BT=pack(np.array([[1] * 5, [2] * 5], np.int32)),
        prefix_BT=pack(prefix, fill=True),
    )
    np.testing.assert_allclose(packed_logits[0, :10].reshape(logits.shape), logits, atol=2e-5)
    tiny.assert_trees_close(packed_gradient, gradient)


@pytest.mark.parametrize(
    ("kind", "backend", "scan"),
    [("rotary", "xla", False), ("t5", "blockwise", False), ("learned", "xla", False), ("alibi", "xla", True)],
)
def test_cached_is_full_for_ragged_prefixes(tiny, kind, backend, scan):
    config, tokens, lengths = prefix_config(tiny, kind, backend), tiny.tokens((3, 8)), np.array([5, 2, 1])
    params = tiny.params(config)
    full = np.asarray(tiny.forward(config)(params, tokens, prefix_BT=first(lengths, 8)))
    causal = np.asarray(tiny.forward(config)(params, tokens))
    assert np.abs(full - causal)[0, :5].max() > 1e-3
    if scan:
        config, params = dataclasses.replace(config, scan_layers=True), scan_params(params)
    valid = first(lengths, 5)
    cache, prompt = tiny.build(config).init_cache(3, 8), jnp.where(valid, tokens[:, :5], 9)
    logits, cache = tiny.forward(config)(
        params, prompt, segment_ids_BT=valid.astype(jnp.int32), prefix_BT=valid, cache=cache
    )
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], full[row, :length], atol=2e-5)
    for step in range(3):
        places = lengths + step
        logits, cache = tiny.forward(config)(params, tokens[np.arange(3), places][:, None], cache=cache)
        np.testing.assert_allclose(logits[:, 0], full[np.arange(3), places], atol=2e-5)


def test_t5_tells_the_two_directions_apart(tiny):
    config, tokens = prefix_config(tiny, "t5"), tiny.tokens((1, 6))
    params = tiny.params(config)
    table = params["decoder"]["relative_bias"]["embedding"]
    noise = jnp.asarray(np.random.default_rng(0).standard_normal(table[len(table) // 2 :].shape), jnp.float32)
    ahead = table.at[len(table) // 2 :].add(noise)
    changed = {**params, "decoder": {**params["decoder"], "relative_bias": {"embedding": ahead}}}
    effect = [
        np.abs(tiny.forward(config)(changed, tokens, **kwargs) - tiny.forward(config)(params, tokens, **kwargs))
        for kwargs in ({}, {"prefix_BT": first([4], 6)})
    ]
    assert effect[0].max() == 0
    moved = effect[1][0].max(axis=-1) > 1e-4
    assert moved.tolist() == [True, True, True, False, False, False]


def test_without_a_prefix_the_model_is_causal(tiny):
    config, causal, tokens = prefix_config(tiny), tiny.config("rotary"), tiny.tokens((2, 6))
    plain = tiny.forward(causal)(tiny.params(config), tokens)
    np.testing.assert_allclose(tiny.forward(config)(tiny.params(config), tokens), plain, atol=1e-6)
    none = tiny.forward(config)(tiny.params(config), tokens, prefix_BT=first([0, 1], 6))
    np.testing.assert_allclose(none, plain, atol=1e-6)


def test_the_config_must_allow_it(tiny):
    model = tiny.build(tiny.config())
    with pytest.raises(ValueError, match=r"A prefix needs Decoder\(bidirectional_prefix=True\), .* got False"):
        jax.eval_shape(model.init, jax.random.key(0), tiny.tokens((1, 2)), prefix_BT=first([1], 2))
