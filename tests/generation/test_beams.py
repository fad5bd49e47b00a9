"""Beam search against every continuation there is, against greedy decoding, and against transformers on the same weights."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.generation import beams as module
from transformer.generation.beams import beam_search
from transformer.generation.generate import generate
from transformer.generation.sampling import GREEDY
from transformer.generation.translate import translate
from transformer.layers.scan_params import scan_params
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.types import UserError

VOCABULARY, LENGTH, END = 4, 3, 1
ROWS = [[2, 3, 1], [1], [3, 3, 2, 2, 0]]
MODELS = [Decoder, EncoderDecoder]


@functools.cache
def make(kind, vocab_size=VOCABULARY, scan_layers=False):
    config = ModelConfig(
        vocab_size=vocab_size,
        max_length=24,
        num_layers=2,
        embed_dim=16,
        pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
        init_std=0.5,
        scan_layers=scan_layers,
        tie_embeddings=False,
    )
    model = kind(config)
    inputs = [jnp.zeros((1, 2), jnp.int32)] * (1 + (kind is EncoderDecoder))
    return model, model.init(jax.random.key(4), *inputs)["params"]


def all_scores(kind, row, penalty):
    """Every continuation of a row by its score, the best first: those that end, and the longest ones that do not."""
    model, params = make(kind)
    ended = [[*body, END] for n in range(LENGTH) for body in itertools.product([0, 2, 3], repeat=n)]
    longest = [list(body) for body in itertools.product([0, 2, 3], repeat=LENGTH)]
    targets = [target for target in ended + longest if len(target) <= LENGTH]
    whole = np.array([[*target, *[0] * (LENGTH - len(target))] for target in targets])
    if kind is Decoder:
        inputs = jnp.asarray(np.concatenate([np.tile(row, (len(whole), 1)), whole[:, :-1]], axis=1))
        logits = model.apply({"params": params}, inputs)[:, len(row) - 1 :]
    else:
        inputs = jnp.asarray(np.concatenate([np.full((len(whole), 1), END), whole[:, :-1]], axis=1))
        logits = model.apply({"params": params}, jnp.asarray(np.tile(row, (len(whole), 1))), inputs)
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), whole[:, :, None], axis=2)[:, :, 0]
    scores = [(logp[n, : len(t)].sum() / len(t) ** penalty, t) for n, t in enumerate(targets)]
    return sorted(scores, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("kind", MODELS)
def test_with_as_many_beams_as_continuations_it_is_exhaustive(kind, penalty):
    options = {"max_new_tokens": LENGTH, "end_of_text": END, "length_penalty": penalty, "early_stopping": "never"}
    found = beam_search(*make(kind), ROWS, num_beams=45, num_return=43, **options)
    for number, row in enumerate(ROWS):
        expected = all_scores(kind, row, penalty)
        assert len(expected) == 40
        np.testing.assert_allclose(found.scores[number, :40], [score for score, _ in expected], atol=1e-4)
        assert np.isneginf(found.scores[number, 40:]).all() and not found.lengths[number, 40:].any()
        said = {
            tuple(tokens[: length + (tokens[-1] == END)].tolist())
            for tokens, length in zip(found.tokens[number, :40], found.lengths[number, :40], strict=True)
        }
        assert said == {tuple(target) for _, target in expected}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_one_beam_is_greedy(kind, early_stopping):
    model = make(kind, 30)
    rows = [np.random.default_rng(n).integers(0, 30, n + 1).tolist() for n in range(6)]
    found = beam_search(*model, rows, num_beams=1, max_new_tokens=9, early_stopping=early_stopping, end_of_text=(1, 5))
    if kind is Decoder:
        expected = generate(*model, rows, max_new_tokens=9, sampling=GREEDY, end_of_text=(1, 5))
        np.testing.assert_array_equal(found.tokens[:, 0], expected.tokens)
        np.testing.assert_array_equal(found.lengths[:, 0], expected.lengths)
    else:
        targets = translate(*model, rows, max_new_tokens=9, end_of_text=(1, 5))
        said = [tokens[0, : length[0]].tolist() for tokens, length in zip(found.tokens, found.lengths, strict=True)]
        assert said == [target.tolist() for target in targets]


@pytest.mark.parametrize("kind", MODELS)
def test_a_row_does_not_depend_on_its_batch(kind):
    rows = [np.random.default_rng(n).integers(0, 30, n + 1).tolist() for n in range(6)]
    run = functools.partial(beam_search, *make(kind, 30), num_beams=3, num_return=2, max_new_tokens=9, end_of_text=5)
    together, apart = run(rows), run(rows, batch_size=4)
    np.testing.assert_array_equal(together.tokens, apart.tokens)
    np.testing.assert_allclose(together.scores, apart.scores, atol=1e-5)
    assert len({tuple(row.ravel()) for row in together.tokens.tolist() for row in [np.array(row)]}) > 3
    programs = module._search._cache_size()
    run(rows[::-1])
    run([[3]] * 6, max_new_tokens=5)
    assert module._search._cache_size() == programs


@pytest.mark.parametrize("kind", MODELS)
def test_scanned_layers_are_the_same(kind):
    rows = [[3, 4, 5], [7]]
    run = functools.partial(beam_search, num_beams=4, num_return=4, max_new_tokens=6, end_of_text=5)
    model, params = make(kind, 30)
    scanned, _ = make(kind, 30, scan_layers=True)
    expected, found = run(model, params, rows), run(scanned, scan_params(params), rows)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_only_what_is_drawable_is_chosen():
    allowed = np.isin(np.arange(30), [3, 7, 9])
    found = beam_search(
        *make(Decoder, 30), [[1, 2], [3]], num_beams=5, num_return=5, max_new_tokens=6, drawable=allowed
    )
    assert set(found.tokens.ravel().tolist()) <= {3, 7, 9} and np.isfinite(found.scores).all()


@pytest.mark.parametrize("kind", MODELS)
def test_logits_that_are_no_numbers_are_an_error_that_says_where(kind):
    model, params = make(kind, 30)
    table = params["token_embedding"]["embedding"]
    broken = {**params, "token_embedding": {"embedding": table.at[16].set(jnp.nan)}}
    where = (
        "the target of source 0 are NaN or inf after 0" if kind is EncoderDecoder else "prompt 0 are NaN or inf after 3"
    )
    with pytest.raises(UserError, match=where):
        beam_search(model, broken, [[4, 16, 5], [3]], end_of_text=5, num_beams=2, max_new_tokens=3)


def test_bad_requests():
    run = functools.partial(beam_search, *make(Decoder), [[1]], max_new_tokens=3)
    with pytest.raises(UserError, match=r"num_return must be at most num_beams=2, got 3; search with more"):
        run(num_beams=2, num_return=3)
    with pytest.raises(UserError, match=r"BeamConfig.num_beams must be at least 1, got 0"):
        run(num_beams=0)
    with pytest.raises(ValueError, match=r"prompt and new tokens, 1 \+ 24"):
        run(max_new_tokens=24)
    with pytest.raises(UserError, match=r"start is for targets of an encoder-decoder, got 2"):
        run(start=2)
    with pytest.raises(UserError, match="Memory must hold a cache of 1,000,000,000 rows"):
        run(num_beams=10**9)
    assert beam_search(*make(Decoder), [], max_new_tokens=3, num_beams=2).tokens.shape == (0, 1, 3)
