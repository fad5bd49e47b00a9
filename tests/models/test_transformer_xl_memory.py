"""Transformer-XL memory: rows in order equal one pass, no gradient flows back, documents stay apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.layers.scan_params import loop_params, scan_params

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def read_rows(tiny, config, params, tokens, length, *, segments=None, positions=None):
    """Logits of consecutive rows of `length`, each behind what the rows before left; and what the last left."""
    memory, out = tiny.build(config).init_memory(len(tokens)), []
    whole = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    for start in range(0, tokens.shape[1], length):
        row = np.s_[:, start : start + length]
        logits, memory = tiny.forward(config)(
            params,
            tokens[row],
            positions_BT=jnp.asarray((whole if positions is None else positions)[row]),
            segment_ids_BT=None if segments is None else jnp.asarray(segments[row]),
            memory_BLPD=memory,
        )
        out.append(np.asarray(logits))
    return np.concatenate(out, axis=1), memory


def normal_like(array):
    return jnp.asarray(np.random.default_rng(3).standard_normal(array.shape), array.dtype)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("kind", "backend"),
    [("transformer_xl", "xla"), ("transformer_xl", "blockwise"), ("rotary", "xla"), ("alibi", "xla"), ("t5", "xla")],
)
def test_rows_with_a_memory_of_all_are_one_pass(tiny, kind, backend, scan):
    config = tiny.config(kind, attention={"implementation": backend}, memory_length=8)
    tokens, params = tiny.tokens((2, 12)), tiny.params(config)
    expected = tiny.forward(tiny.config(kind))(params, tokens)
    if scan:
        config, params = dataclasses.replace(config, scan_layers=True), scan_params(params)
    logits, memory = read_rows(tiny, config, params, tokens, 4)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert memory.shape == (2, 2, 8, 16)
    alone = tiny.forward(tiny.config(kind))(tiny.params(config), tokens[:, 4:8])
    assert np.abs(alone - logits[:, 4:8]).max() > 1e-2


@pytest.mark.parametrize("remembered", [1, 3])
def test_a_row_sees_as_much_as_is_remembered(tiny, remembered):
    """With one layer: what a pass sees that begins with what is remembered."""
    config = tiny.config("transformer_xl", num_layers=1, memory_length=remembered)
    tokens, params = tiny.tokens((2, 8)), tiny.params(config)
    logits, _ = read_rows(tiny, config, params, tokens, 4)
    expected = tiny.forward(tiny.config("transformer_xl", num_layers=1))(params, tokens[:, 4 - remembered :])
    np.testing.assert_allclose(logits[:, 4:], expected[:, remembered:], atol=1e-5)


def test_the_memory_holds_the_inputs_of_each_layer(tiny):
    config = tiny.config("transformer_xl", memory_length=3)
    tokens, params = tiny.tokens((2, 4)), tiny.params(config)
    _, memory = read_rows(tiny, config, params, tokens, 4)
    np.testing.assert_array_equal(memory[:, 0], params["token_embedding"]["embedding"][tokens[:, 1:]])


@pytest.mark.parametrize("changes", [{}, {"remat": "full"}, {"remat": "full", "scan_layers": True}], ids=str)
def test_no_gradient_flows_into_the_memory(tiny, changes):
    config = tiny.config("transformer_xl", memory_length=4, **changes)
    model, tokens = tiny.build(config), tiny.tokens((2, 8))
    params = tiny.params(config)
    params = scan_params(params) if config.scan_layers else params

    def row(params, start, memory):
        positions = jnp.arange(start, start + 4, dtype=jnp.int32)[None]
        return model.apply({"params": params}, tokens[:, start : start + 4], positions_BT=positions, memory_BLPD=memory)

    def second(params, memory):
        return (row(params, 4, memory)[0] ** 2).sum()

    def through(params):
        return second(params, row(params, 0, model.init_memory(2))[1])

    fixed = row(params, 0, model.init_memory(2))[1]
    expected = tiny.jit(jax.grad(second))(params, fixed)
    tiny.assert_trees_close(tiny.jit(jax.grad(through))(params), expected)
    # The memory itself has an influence, and parameters a gradient through what reads it.
    assert np.abs(jax.grad(functools.partial(second, params))(fixed)).max() > 1e-2
    if changes:
        plain = tiny.config("transformer_xl", memory_length=4)
        other = jax.grad(
            lambda p: (
                tiny.build(plain).apply(
                    {"params": p},
                    tokens[:, 4:],
                    positions_BT=jnp.arange(4, 8, dtype=jnp.int32)[None],
                    memory_BLPD=fixed,
                )[0]
                ** 2
            ).sum()
        )
        expected = loop_params(expected) if config.scan_layers else expected
        tiny.assert_trees_close(expected, tiny.jit(other)(tiny.params(plain)))


@pytest.mark.parametrize(("kind", "backend"), [("transformer_xl", "xla"), ("rotary", "blockwise")])
def test_packed_is_separate(tiny, kind, backend):
    """Documents of 6, 5 and 4 tokens in rows of 4 and of 5 whose ends are no ends of documents, then padding."""
    config = tiny.config(kind, attention={"implementation": backend}, memory_length=9)
    params, lengths = tiny.params(config), (6, 5, 4)
    documents = [tiny.tokens((1, length), seed) for seed, length in enumerate(lengths)]
    expected = [tiny.forward(tiny.config(kind))(params, document) for document in documents]
    for length, padding in ((4, 1), (5, 0)):
        tokens = jnp.concatenate([*documents, jnp.full((1, padding), 7, jnp.int32)], axis=1)
        positions = np.concatenate([*map(np.arange, lengths), np.zeros(padding)])[None].astype(np.int32)
        numbers = np.repeat([1, 2, 3, 0], [*lengths, padding])[None].astype(np.int32)
        # As in batches: numbers of a row begin with 1, whatever the document was in the row before.
        first = np.repeat(numbers[:, ::length], length, axis=1)[:, : tokens.shape[1]]
        segments = np.where(numbers > 0, numbers - first + 1, 0)
        logits, _ = read_rows(tiny, config, params, tokens, length, segments=segments, positions=positions)
        for document, start in zip(expected, (0, 6, 11), strict=True):
            np.testing.assert_allclose(logits[:, start : start + document.shape[1]], document, atol=1e-5)


def test_a_row_that_begins_a_document_sees_nothing_before(tiny):
    config = tiny.config("transformer_xl", memory_length=4)
    tokens, params = tiny.tokens((3, 4)), tiny.params(config)
    full = normal_like(tiny.build(config).init_memory(3))
    # One row begins a document, one is its second token, one its fifth.
    positions = jnp.asarray(np.array([[0], [1], [4]]) + np.arange(4), jnp.int32)
    forward = tiny.forward(config)
    logits, _ = forward(params, tokens, positions_BT=positions, memory_BLPD=full)
    other, _ = forward(params, tokens, positions_BT=positions, memory_BLPD=full.at[:, :, :3].multiply(-1.0))
    np.testing.assert_allclose(logits[0], forward(params, tokens)[0], atol=1e-5)
    np.testing.assert_array_equal(logits[:2], other[:2])
    assert np.abs(logits[1] - forward(params, tokens)[1]).max() > 1e-2
    assert np.abs(logits[2] - other[2]).max() > 1e-2


def test_positions_far_into_a_document_lose_no_precision(tiny):
    config = tiny.config("transformer_xl", memory_length=4)
    tokens, params = tiny.tokens((1, 4)), tiny.params(config)
    memory = normal_like(tiny.build(config).init_memory(1))
    near, far = (
        tiny.forward(config)(
            params, tokens, positions_BT=jnp.arange(4, dtype=jnp.int32)[None] + start, memory_BLPD=memory
        )[0]
        for start in (4, 10**9)
    )
    np.testing.assert_array_equal(near, far)


def test_refusals(tiny):
    config = tiny.config("transformer_xl", memory_length=4)
    model, tokens = tiny.build(config), tiny.tokens((1, 4))
    variables, memory = {"params": tiny.params(config)}, model.init_memory(1)
    with pytest.raises(ValueError, match=r"needs positions_BT \(the first counts .* got no positions_BT"):
        model.apply(variables, tokens, memory_BLPD=memory)
