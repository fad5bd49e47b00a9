"""Speculative decoding against the model alone: the same tokens where it is greedy, the same distribution where it draws."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.generation.generate import Generator
from transformer.generation.sampling import SamplingConfig, filter_logits
from transformer.generation.speculative import SpeculativeGenerator, accept
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import POSITIONS
from transformer.models.decoder import Decoder
from transformer.types import UserError

GREEDY = SamplingConfig(temperature=0)
DRAWN = SamplingConfig(temperature=0.9, top_k=9)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6]]


def make(kind="rotary", limit=32, vocab=13, layers=2, seed=2, scale=0.8):
    block = BlockConfig(AttentionConfig(num_heads=2), FeedForwardConfig(hidden_dim=24))
    sizes = {"vocab_size": vocab, "max_length": limit, "num_layers": layers, "embed_dim": 16}
    model = Decoder(ModelConfig(pattern=(block,), positions=POSITIONS.find(kind)(), **sizes))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    generator = np.random.default_rng(seed)
    return model, jax.tree.map(lambda x: jnp.asarray(scale * generator.standard_normal(x.shape), x.dtype), shapes)


def near(params, amount, seed=5):
    """Parameters of a draft that often agrees."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + amount * jnp.asarray(generator.standard_normal(x.shape), x.dtype), params)


# ---- Greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "draft_tokens", "penalty"), [("rotary", 4, 1.0), ("learned", 1, 1.7), ("learned", 3, 1.0)]
)
def test_greedy_is_the_model_alone(kind, draft_tokens, penalty):
    sampling = SamplingConfig(temperature=0, repetition_penalty=penalty)
    model, params = make(kind)
    expected = Generator(model, params).generate(PROMPTS, max_new_tokens=19, sampling=sampling)
    pair = SpeculativeGenerator(model, params, model, near(params, 0.1), draft_tokens=draft_tokens)
    found = pair.generate(PROMPTS, max_new_tokens=19, sampling=sampling)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert 0.1 * pair.offered < pair.accepted < pair.offered
    other = SpeculativeGenerator(model, params, *make(kind, layers=1, seed=9), draft_tokens=draft_tokens)
    np.testing.assert_array_equal(other.generate(PROMPTS, max_new_tokens=19, sampling=sampling).tokens, expected.tokens)


@pytest.mark.parametrize(("limit", "first", "kind"), [(9, 2, "learned"), (3, 0, "rotary")])
def test_in_a_rolling_window(limit, first, kind):
    """No round reaches beyond a window: each token follows from the one that the model alone reads."""
    model, params = make(kind, limit)
    expected = Generator(model, params, keep_first=first).generate(PROMPTS, max_new_tokens=30, sampling=GREEDY)
    pair = SpeculativeGenerator(model, params, model, near(params, 0.1), keep_first=first)
    np.testing.assert_array_equal(pair.generate(PROMPTS, max_new_tokens=30, sampling=GREEDY).tokens, expected.tokens)


def test_ends_where_the_model_alone_does():
    model, params = make()
    expected = Generator(model, params).generate(PROMPTS, max_new_tokens=19, sampling=GREEDY)
    end = int(expected.tokens[1, 7])
    expected = Generator(model, params).generate(PROMPTS, max_new_tokens=19, sampling=GREEDY, end_of_text=end)
    pair = SpeculativeGenerator(model, params, model, near(params, 0.1))
    found = pair.generate(PROMPTS, max_new_tokens=19, sampling=GREEDY, end_of_text=end)
    assert found.lengths.tolist() == expected.lengths.tolist() and min(found.lengths) < 19
    for row, other, length in zip(found.tokens, expected.tokens, found.lengths, strict=True):
        np.testing.assert_array_equal(row[:length], other[:length])
        assert set(row[length:].tolist()) <= {end}


def test_a_row_depends_on_no_other_and_streams_as_it_is():
    model, params = make()
    pair = SpeculativeGenerator(model, params, model, near(params, 0.1))
    together = pair.generate(PROMPTS, max_new_tokens=19, sampling=DRAWN, seed=3).tokens
    alone = pair.generate(PROMPTS[1:2], max_new_tokens=19, sampling=DRAWN, seed=3, row_numbers=[1]).tokens
    np.testing.assert_array_equal(together[1], alone[0])
    streamed = pair.stream(PROMPTS[0], max_new_tokens=19, sampling=DRAWN, seed=3)
    assert list(streamed) == together[0].tolist()


# ---- The distribution -------------------------------------------------------------------------------------------------


def test_the_rule_of_acceptance_gives_the_models_distribution():
    """Exactly: over all tokens of the draft and a fine grid of its draws."""
    draws = np.random.default_rng(0)
    p, q = draws.dirichlet(np.ones(4)), draws.dirichlet(np.ones(4))
    grid = (np.arange(20_000) + 0.5) / 20_000
    found = np.zeros(4)
    for token in range(4):
        rows = len(grid)
        p_BTV = jnp.broadcast_to(jnp.asarray(np.stack([p, p]), jnp.float32), (rows, 2, 4))
        q_BKV = jnp.broadcast_to(jnp.asarray(q, jnp.float32), (rows, 1, 4))
        tokens = jnp.full((rows, 1), token, jnp.int32)
        a_B, _, residual_BV = accept(p_BTV, q_BKV, tokens, jnp.asarray(grid, jnp.float32)[:, None], jnp.ones(rows, int))
        residual_BV /= residual_BV.sum(axis=1, keepdims=True)
        share = np.where(np.asarray(a_B)[:, None] == 1, np.eye(4)[token], residual_BV).mean(axis=0)
        found += q[token] * share
    np.testing.assert_allclose(found, p, atol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(), SamplingConfig(temperature=0.7, top_k=4, top_p=0.9), SamplingConfig(repetition_penalty=1.6)],
)
def test_tokens_have_the_distribution_of_the_model(sampling):
    """Of three tokens together, all 125 outcomes, enumerated; an unlike draft, so that most of them are rejected."""
    model, params = make(vocab=5, layers=1, scale=0.5)
    prompt, count, rows = [2, 4], 3, 4096
    outcomes = np.array(list(itertools.product(range(5), repeat=count)))
    rows_RT = np.concatenate([np.broadcast_to(prompt, (len(outcomes), 2)), outcomes], axis=1)
    logits_RTV = np.asarray(jax.jit(model.apply)({"params": params}, rows_RT))
    likely_R = np.ones(len(outcomes))
    for place in range(2, 2 + count):
        scores_RV = logits_RTV[:, place - 1]
        seen_RV = (rows_RT[:, :place, None] == np.arange(5)).any(axis=1)
        penalty = sampling.repetition_penalty
        penalized_RV = np.where(scores_RV > 0, scores_RV / penalty, scores_RV * penalty)
        scores_RV = np.where(seen_RV, penalized_RV, scores_RV).astype(np.float32)
        chances_RV = np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(scores_RV), sampling)))
        likely_R *= chances_RV[np.arange(len(outcomes)), rows_RT[:, place]]
    exact = np.zeros((5,) * count)
    exact[tuple(outcomes.T)] = likely_R
    assert exact.sum() == pytest.approx(1, abs=1e-4)
    pair = SpeculativeGenerator(model, params, *make(vocab=5, layers=1, seed=7, scale=0.5), draft_tokens=2)
    counts = np.zeros_like(exact)
    for seed in range(4):
        found = pair.generate([prompt] * rows, max_new_tokens=count, sampling=sampling, seed=seed).tokens
        np.add.at(counts, tuple(found.T), 1)
    assert 0.2 < pair.accepted / pair.offered < 0.9
    possible = exact > 0
    assert counts[~possible].sum() == 0
    expected = exact[possible] * rows * 4
    rare = expected < 5
    chi = (((counts[possible] - expected) ** 2 / expected)[~rare]).sum()
    chi += (
        (counts[possible][rare].sum() - expected[rare].sum()) ** 2 / max(expected[rare].sum(), 1e-9)
        if rare.any()
        else 0
    )
    freedom = (~rare).sum() + rare.any() - 1
    assert chi < freedom + 4 * np.sqrt(2 * freedom), (chi, freedom)


def test_a_draft_that_is_the_model_is_accepted():
    model, params = make()
    pair = SpeculativeGenerator(model, params, model, params)
    pair.generate(PROMPTS, max_new_tokens=16, sampling=DRAWN)
    assert pair.accepted >= 0.97 * pair.offered > 0


def test_a_draft_without_numbers_costs_time_only():
    model, params = make()
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    pair = SpeculativeGenerator(model, params, model, broken)
    expected = Generator(model, params).generate(PROMPTS, max_new_tokens=9, sampling=GREEDY)
    np.testing.assert_array_equal(pair.generate(PROMPTS, max_new_tokens=9, sampling=GREEDY).tokens, expected.tokens)
    assert pair.accepted == 0 < pair.offered
    with pytest.raises(UserError, match="the logits of prompt 0 are NaN or inf after 3 tokens"):
        SpeculativeGenerator(model, broken, model, params).generate(PROMPTS, max_new_tokens=9, sampling=DRAWN)


def test_a_draft_may_read_less_than_the_model_but_as_much_as_requested():
    model, params = make()
    draft = Decoder(dataclasses.replace(model.config, max_length=16))
    pair = SpeculativeGenerator(model, params, draft, near(params, 0.1))
    expected = Generator(model, params).generate(PROMPTS[:1], max_new_tokens=13, sampling=GREEDY)
    np.testing.assert_array_equal(
        pair.generate(PROMPTS[:1], max_new_tokens=13, sampling=GREEDY).tokens, expected.tokens
    )
    with pytest.raises(UserError, match="as many tokens as the model, here 17, it reads 16"):
        pair.generate(PROMPTS[:1], max_new_tokens=14)


def test_refuses():
    model, params = make()
    with pytest.raises(UserError, match="the model's vocabulary of 13 tokens, it has 12"):
        SpeculativeGenerator(model, params, *make(vocab=12))
    with pytest.raises(UserError, match="draft_tokens must be at least 1, got 0"):
        SpeculativeGenerator(model, params, model, params, draft_tokens=0)
