"""What can be drawn, how often, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from transformer.generation.sampling import (
    NO_TOKEN,
    SamplingConfig,
    filter_logits,
    penalize,
    sample_tokens,
)
from transformer.types import UserError

pytestmark = pytest.mark.usefixtures("strict_dtypes")

VOCABULARY = 12
# Halves, so that ties are common and sums exact enough.
LOGITS = hnp.arrays(np.float32, (2, VOCABULARY), elements=st.integers(-12, 12).map(lambda n: n / 2))
few = settings(max_examples=60, deadline=None)


def kept(logits, **config):
    return np.isfinite(filter_logits(jnp.asarray(logits, jnp.float32), SamplingConfig(**config)))


def by_likelihood(row):
    """Numbers of the tokens from the most to the least likely, equals in ascending order."""
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


@few
@given(LOGITS, st.sampled_from([1, 2, 5, VOCABULARY, 99]))
def test_top_k_keeps_the_k_largest(logits, k):
    for row, mask in zip(logits, kept(logits, top_k=k), strict=True):
        assert set(np.flatnonzero(mask)) == set(by_likelihood(row)[:k])


@few
@given(LOGITS, st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.999]))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    for row, mask in zip(logits, kept(logits, top_p=p), strict=True):
        probabilities = np.exp(row.astype(np.float64) - row.max())
        probabilities /= probabilities.sum()
        order = by_likelihood(row)
        count = mask.sum()
        assert set(np.flatnonzero(mask)) == set(order[:count])
        assert probabilities[order[:count]].sum() >= p - 1e-5
        assert probabilities[order[: count - 1]].sum() < p + 1e-5


@few
@given(LOGITS, st.sampled_from([0.5, 1.0, 3.0]))
def test_what_is_kept_keeps_its_odds(logits, temperature):
    filtered = filter_logits(jnp.asarray(logits), SamplingConfig(temperature=temperature, top_k=5, top_p=0.9))
    mask = np.isfinite(filtered)
    np.testing.assert_allclose(filtered[mask], logits[mask] / np.float32(temperature), rtol=1e-6)


def test_equals_are_kept_in_the_order_of_their_numbers():
    equal = np.zeros((1, 4))
    np.testing.assert_array_equal(kept(equal, top_k=2), [[True, True, False, False]])
    np.testing.assert_array_equal(kept(equal, top_p=0.5), [[True, True, False, False]])
    assert sample_tokens(jnp.zeros((1, 4)), None, SamplingConfig(temperature=0)).tolist() == [0]


def test_temperature_then_top_k_then_top_p():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    # 0.5 alone reaches 0.45; a temperature of 4 first makes the distribution 0.33, 0.29, 0.24, 0.18.
    assert kept(logits, top_p=0.45).sum() == 1
    assert kept(logits, temperature=4.0, top_p=0.45).sum() == 2
    # 0.5 does not reach 0.6 of everything, but of the two that top_k keeps it is 0.625.
    assert kept(logits, top_p=0.6).sum() == 2
    assert kept(logits, top_k=2, top_p=0.6).sum() == 1


def test_top_k_alone_keeps_the_improbable():
    logits = np.array([[0.0, -30.0, -31.0, -32.0]])
    np.testing.assert_array_equal(kept(logits, top_k=3), [[True, True, True, False]])
    assert kept(logits, top_p=1.0).all()


@few
@given(LOGITS, st.integers(0, 5))
def test_low_temperature_approaches_greedy(logits, seed):
    logits = logits + np.linspace(0, 0.1, VOCABULARY, dtype=np.float32)  # no ties
    keys = jax.random.split(jax.random.key(seed), 2)
    expected = logits.argmax(axis=-1).tolist()
    for config in (SamplingConfig(temperature=0), SamplingConfig(top_k=1), SamplingConfig(temperature=1e-4)):
        assert sample_tokens(jnp.asarray(logits), keys, config).tolist() == expected


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.8},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.9},
        {"min_p": 0.3},
    ],
)
def test_draws_follow_the_distribution(config):
    config = SamplingConfig(**config)
    logits = jnp.log(jnp.array([[0.4, 0.25, 0.15, 0.1, 0.06, 0.04]]))
    probabilities = np.asarray(jax.nn.softmax(filter_logits(logits, config))[0], np.float64)
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.jit(lambda keys: sample_tokens(jnp.broadcast_to(logits, (count, 6)), keys, config))(keys)
    counts = np.bincount(drawn, minlength=6)
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = count * probabilities[possible]
    # 20.5 is the 0.999 quantile of chi-square with five degrees of freedom; the draws are the same in every run.
    assert ((counts[possible] - expected) ** 2 / expected).sum() < 20.5


def test_a_row_draws_by_its_own_key():
    logits = jnp.zeros((3, VOCABULARY))
    keys = jax.random.split(jax.random.key(0), 3)
    together = sample_tokens(logits, keys, SamplingConfig())
    for row in range(3):
        alone = sample_tokens(logits[:1], keys[row : row + 1], SamplingConfig())
        assert alone[0] == together[row]
    assert len(set(together.tolist())) > 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": -1.0}, r"SamplingConfig.temperature must be at least 0, got -1.0"),
        ({"top_k": -1}, r"SamplingConfig.top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, r"SamplingConfig.top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, r"SamplingConfig.top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_refuses(config, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**config)


# ---- min-p, repetition penalty ----------------------------------------------------------------------------------------


@few
@given(LOGITS, st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.0]))
def test_min_p_keeps_what_is_likely_enough(logits, min_p):
    ratios = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    clear = np.abs(ratios - min_p) > 1e-5  # rounding decides about the others
    mask = kept(logits, min_p=min_p)
    np.testing.assert_array_equal(mask[clear], (ratios >= min_p)[clear])
    assert mask[ratios == 1].all()


def test_min_p_after_temperature_and_top_p():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    assert kept(logits, min_p=0.4).sum() == 2
    assert kept(logits, min_p=0.4, temperature=2.0).sum() == 3  # ratios become roots
    assert kept(logits, min_p=0.4, top_p=0.4).sum() == 1
    assert kept(logits, min_p=0.05, top_k=3).sum() == 3


@few
@given(LOGITS, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), st.sampled_from([0.5, 1.3, 5.0]))
def test_the_penalty_is_for_the_tokens_of_the_row_once(logits, row, penalty):
    tokens = np.array([[*row, 3, 3], [NO_TOKEN, *row, 5]])
    found = np.asarray(penalize(jnp.asarray(logits), jnp.asarray(tokens), jnp.array([len(row), 1]), penalty))
    expected = logits.copy()
    for token in set(row):
        expected[0, token] = logits[0, token] / penalty if logits[0, token] > 0 else logits[0, token] * penalty
    np.testing.assert_allclose(found, expected, rtol=1e-6)


SETTINGS = [
    pytest.param({}, id="plain"),
    pytest.param({"min_p": 0.1}, id="min_p"),
    pytest.param({"repetition_penalty": 1.4}, id="penalty"),
    pytest.param({"temperature": 0.7, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3}, id="all"),
]


@pytest.mark.parametrize("config", SETTINGS)
def test_the_whole_distribution_agrees_with_transformers(config):
    """Their processors in the order of their `generate`."""
    torch, library = pytest.importorskip("torch"), pytest.importorskip("transformers")
    generator = np.random.default_rng(0)
    logits, tokens = generator.normal(0, 3, (5, 30)).astype(np.float32), generator.integers(0, 30, (5, 9))
    settings = SamplingConfig(**config)
    ours = penalize(jnp.asarray(logits), jnp.asarray(tokens), jnp.full(5, 9), settings.repetition_penalty)
    ours = filter_logits(ours, settings)
    processors = [
        library.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
        library.TemperatureLogitsWarper(settings.temperature),
        *([library.TopKLogitsWarper(settings.top_k)] if settings.top_k else []),
        library.TopPLogitsWarper(settings.top_p),
        library.MinPLogitsWarper(settings.min_p),
    ]
    theirs = torch.tensor(logits)
    for processor in processors:
        theirs = processor(torch.tensor(tokens), theirs)
    np.testing.assert_allclose(jax.nn.softmax(ours), torch.softmax(theirs, -1).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"min_p": -0.1}, r"SamplingConfig.min_p must be at least 0 and at most 1, got -0.1"),
        ({"min_p": 1.1}, r"SamplingConfig.min_p must be at least 0 and at most 1, got 1.1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be above 0, where 1 is none, got 0.0"),
    ],
)
def test_refuses_further(config, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**config)
