"""The loss of a part of each row at a time is the loss: sums, gradients, and what the program never holds."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.encoder import Encoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.models.init import init_params
from transformer.objective import OBJECTIVES
from transformer.ops.chunks import sum_over_chunks
from transformer.types import Batch, PairBatch

V, ROWS, T = 37, 2, 10
BLOCK = BlockConfig(AttentionConfig(num_heads=2))
MODEL = ModelConfig(vocab_size=V, num_layers=1, embed_dim=8, pattern=(BLOCK,), dropout=0.1, init_std=0.3)


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (ROWS, T + 1)).astype(np.int32)
    weights = (np.arange(T)[None] < np.array([[T], [6]])).astype(np.float32)
    positions = np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, (weights > 0).astype(np.int32), positions)


def pairs():
    plain = batch()
    return PairBatch(plain.targets, plain.segment_ids, *plain[:4])


def make(kind, tie, config, ends=False):
    """Objective, parameters and batch."""
    model_config = dataclasses.replace(MODEL, tie_embeddings=tie)
    if ends:
        own = {"masked_head": True} if kind == "masked_lm" else {}
        model_config = dataclasses.replace(model_config, output_bias=True, logits_scale=0.5, **own)
    match kind:
        case "next_token":
            model = Decoder(model_config)
            shapes, method = ((1, 1),), "__call__"
        case "prefix_lm":
            model = Decoder(model_config, bidirectional_prefix=True)
            shapes, method = ((1, 1),), "__call__"
        case "masked_lm":
            model = Encoder(model_config)
            shapes, method = ((1, 1),), "logits"
        case _:
            model = EncoderDecoder(model_config)
            shapes, method = ((1, 1), (1, 1)), "__call__"
    params, _ = init_params(model, jax.random.key(0), *shapes, method=method)
    objective = config.bind(model, SimpleNamespace(token_bytes=np.ones(V, np.int32)))
    return objective, params, pairs() if kind == "seq2seq" else batch()


def graded(kind, tie, chunks, ends=False):
    rates = {"mask_rate": 0.7} if kind == "masked_lm" else {}
    config = OBJECTIVES.find(kind)(loss_chunks=chunks, label_smoothing=0.1, z_loss=1e-2, **rates)
    objective, params, data = make(kind, tie, config, ends)

    @jax.jit
    def run(params, data):
        def loss(params):
            (loss_sum, _), (_, statistics) = objective.loss(params, (), data, jax.random.key(1), True)
            return loss_sum / 7, statistics

        return jax.value_and_grad(loss, has_aux=True)(params)

    return run(params, jax.tree.map(jnp.asarray, data))


@pytest.mark.parametrize(
    ("kind", "tie", "chunks"),
    [
        ("next_token", True, 2),
        ("next_token", False, 3),
        ("prefix_lm", True, 5),
        ("masked_lm", True, 2),
        ("seq2seq", True, 4),
    ],
)
@pytest.mark.parametrize("ends", [False, True], ids=["plain", "a head and a bias"])
def test_chunks_change_nothing(kind, tie, chunks, ends):
    (loss, statistics), gradients = graded(kind, tie, chunks, ends)
    (expected, expected_statistics), expected_gradients = graded(kind, tie, 1, ends)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert statistics.keys() == expected_statistics.keys()
    for name, value in expected_statistics.items():
        np.testing.assert_allclose(statistics[name], value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected_gradients)
    assert max(np.abs(g).max() for g in jax.tree.leaves(expected_gradients)) > 0.01


def compiled(chunks, vocabulary, width, rows, length):
    @jax.jit
    def run(table, hidden, targets):
        def sums(table, hidden, targets):
            logits = jnp.einsum("btd,vd->btv", hidden, table)
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked), jnp.sum(targets)

        def loss(table, hidden):
            if chunks == 1:
                return sums(table, hidden, targets)[0]
            return sum_over_chunks(sums, table, hidden, (targets,), chunks)[0]

        return jax.grad(loss, argnums=(0, 1))(table, hidden)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return run.lower(shape((vocabulary, width)), shape((rows, length, width)), targets).compile()


def test_no_array_has_the_logits_of_all_positions():
    text = compiled(8, 640, 16, 2, 64).as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert 2 * 64 * 640 not in sizes and max(sizes) < 2 * 64 * 640
    assert 2 * 8 * 640 in sizes


def test_memory_at_the_size_of_llama_3():
    """Vocabulary 128,256, width 2,048, 8 x 2,048 positions: compiled, not run."""
    plain = compiled(1, 128_256, 2048, 8, 2048).memory_analysis().temp_size_in_bytes
    parts = compiled(32, 128_256, 2048, 8, 2048).memory_analysis().temp_size_in_bytes
    assert parts * 8 <= plain, f"{parts / 1e9:.2f} GB against {plain / 1e9:.2f} GB"


def test_gradients_at_a_vocabulary_of_4096():
    rng = np.random.default_rng(2)
    table, hidden = (jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for shape in ((4096, 16), (2, 12, 16)))
    targets = jnp.asarray(rng.integers(0, 4096, (2, 12)))

    def sums(table, hidden, targets):
        logits = jnp.einsum("btd,vd->btv", hidden, table)
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)), jnp.sum(targets)

    plain = jax.jit(jax.grad(lambda *x: sums(*x, targets)[0], argnums=(0, 1)))(table, hidden)
    parts = jax.jit(jax.grad(lambda *x: sum_over_chunks(sums, *x, (targets,), 4)[0], argnums=(0, 1)))(table, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, plain)


@pytest.mark.parametrize(
    ("length", "chunks", "parts"),
    [(6, 2, [[0, 2, 4], [1, 3, 5]]), (6, 3, [[0, 3], [1, 4], [2, 5]]), (5, 2, [[0, 2, 4], [1, 3]]), (2, 8, [[0], [1]])],
)
def test_a_position_is_in_the_part_of_its_remainder(length, chunks, parts):
    """Not in one part with its neighbours: if T is sharded over devices, each device must have some positions of every part."""
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32), (1, length))

    def sums(params, hidden, places):
        members = jnp.sum(2.0 ** hidden[..., 0] * (hidden[..., 1] > 0))  # a set as a number
        return jnp.sum(places), members**2

    hidden = jnp.stack([places, jnp.ones_like(places)], axis=-1)
    total, squares = sum_over_chunks(sums, {}, hidden, (places,), chunks)
    assert float(total) == sum(range(length))
    assert float(squares) == sum(sum(2**place for place in part) ** 2 for part in parts)
