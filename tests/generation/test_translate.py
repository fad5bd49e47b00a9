"""Greedy translation equals picking the best token of full passes, whatever the batch, and ends where the text does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.generation.sampling import SamplingConfig
from transformer.generation.translate import translate
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.model_kinds import POSITIONS
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.types import UserError

END, LENGTH = 0, 9


@pytest.fixture(scope="module", params=["learned", "rotary", "own vocabulary"])
def model(request):
    own = request.param == "own vocabulary"
    config = ModelConfig(
        vocab_size=11,
        max_length=23,
        num_layers=2,
        embed_dim=16,
        pattern=(BlockConfig(AttentionConfig(num_heads=2)),),
        positions=POSITIONS.find("rotary" if own else request.param)(),
        init_std=0.6,
    )
    model = EncoderDecoder(config, source_vocab_size=17 if own else 0)
    return model, model.init(jax.random.key(3), *[jnp.zeros((1, 2), jnp.int32)] * 2)["params"]


@pytest.fixture(scope="module")
def sources():
    generator = np.random.default_rng(0)
    return [generator.integers(1, 11, length) for length in (3, 1, 23, 7, 7, 2, 12)]


def by_full_passes(model, params, source, first=END, penalty=1.0):
    padded = np.zeros((2, 1, 23), np.int32)
    padded[0, 0, : len(source)], padded[1, 0, : len(source)] = source, 1
    target = [first]
    while len(target) <= LENGTH:
        # What comes later has no influence: the decoder is causal.
        inputs = np.zeros((1, LENGTH + 1), np.int32)
        inputs[0, : len(target)] = target
        scores = np.array(full_pass(model, params, padded[0], padded[1], inputs)[0, len(target) - 1])
        seen = list(set(target))
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        best = int(scores.argmax())
        if best == END:
            break
        target.append(best)
    return target[1:]


@functools.partial(jax.jit, static_argnames="model")
def full_pass(model, params, source, segments, inputs):
    return model.apply({"params": params}, source, inputs, source_segment_ids_BS=segments)


def test_equals_full_passes_in_any_batch(model, sources):
    expected = [by_full_passes(*model, source) for source in sources]
    assert len({tuple(target) for target in expected}) > 3, "the sources must matter"
    for batch_size in (1, 8):
        targets = translate(*model, sources, end_of_text=END, max_new_tokens=LENGTH, batch_size=batch_size)
        assert [target.tolist() for target in targets] == expected


def test_another_token_may_start_a_target(model, sources):
    first = functools.partial(by_full_passes, *model, first=4)
    expected = [first(source) for source in sources]
    assert expected != [by_full_passes(*model, source) for source in sources]
    targets = translate(*model, sources, end_of_text=END, start=4, max_new_tokens=LENGTH)
    assert [target.tolist() for target in targets] == expected


def test_a_penalty_is_for_the_tokens_of_the_target(model, sources):
    sampling = SamplingConfig(temperature=0, repetition_penalty=3.0)
    expected = [by_full_passes(*model, source, penalty=3.0) for source in sources]
    assert expected != [by_full_passes(*model, source) for source in sources]
    targets = translate(*model, sources, end_of_text=END, max_new_tokens=LENGTH, sampling=sampling)
    assert [target.tolist() for target in targets] == expected


def test_a_drawn_target_does_not_depend_on_its_batch(model, sources):
    run = functools.partial(translate, *model, end_of_text=END, max_new_tokens=LENGTH, sampling=SamplingConfig())
    drawn = [[target.tolist() for target in run(sources, seed=5, batch_size=size)] for size in (1, 8)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != [target.tolist() for target in run(sources, seed=6)]


def test_a_target_is_the_same_however_long_it_may_be(model, sources):
    whole = translate(*model, sources, end_of_text=END, max_new_tokens=LENGTH)
    cut = translate(*model, sources, end_of_text=END, max_new_tokens=2)
    assert [target.tolist() for target in cut] == [target[:2].tolist() for target in whole]


@pytest.mark.parametrize("model", ["own vocabulary"], indirect=True)
def test_logits_that_are_no_numbers_are_an_error_that_says_where(model):
    """Only one source has them; batches are in the order of lengths, and the message names the source's own index."""
    model, params = model
    table = params["source_embedding"]["embedding"]
    broken = {**params, "source_embedding": {"embedding": table.at[16].set(jnp.nan)}}
    with pytest.raises(UserError, match="the logits of the target of source 0 are NaN or inf after 0 tokens"):
        translate(model, broken, [[4, 16, 5], [3], [1, 2]], end_of_text=END, max_new_tokens=3)


def test_bad_requests(model):
    with pytest.raises(ValueError, match=r"sequence of one token or more, source 1 has shape \(0,\)"):
        translate(*model, [[1], []], end_of_text=END, max_new_tokens=3)
    with pytest.raises(ValueError, match="at most max_length=23, got 24"):
        translate(*model, [[1]], end_of_text=END, max_new_tokens=24)
    with pytest.raises(UserError, match=r"below vocab_size=11, end_of_text holds 11 to 11"):
        translate(*model, [[1]], end_of_text=11, max_new_tokens=3)
    assert translate(*model, [], end_of_text=END, max_new_tokens=3) == []


def test_a_target_may_start_and_end_with_other_tokens(model, sources):
    plain = translate(*model, sources, end_of_text=END, max_new_tokens=LENGTH)
    same = translate(*model, sources, end_of_text=[END], start=END, max_new_tokens=LENGTH, drawable=np.ones(11, bool))
    for one, other in zip(plain, same, strict=True):
        np.testing.assert_array_equal(one, other)
    others = translate(*model, sources, end_of_text=END, start=7, max_new_tokens=LENGTH)
    assert [t.tolist() for t in others] != [t.tolist() for t in plain]
    longest = max(plain, key=len)
    assert len(longest) > 1
    ends = [END, int(longest[-1])]
    for whole, found in zip(plain, translate(*model, sources, end_of_text=ends, max_new_tokens=LENGTH), strict=True):
        cut = np.flatnonzero(np.isin(whole, ends))
        np.testing.assert_array_equal(found, whole[: cut[0]] if len(cut) else whole)
    allowed = np.isin(np.arange(11), [2, 5])
    drawn = translate(*model, sources, end_of_text=END, max_new_tokens=LENGTH, drawable=allowed)
    assert set(np.concatenate(drawn).tolist()) <= {2, 5} and all(len(t) == LENGTH for t in drawn)


def test_the_decoders_layers_are_what_a_cache_holds():
    """1,000 layers of 128 bytes a token, beside an encoder of one."""
    block = BlockConfig(AttentionConfig(num_heads=2))
    config = ModelConfig(vocab_size=11, num_layers=1, decoder_layers=1000, embed_dim=16, pattern=(block,))
    with pytest.raises(UserError, match=r"a cache of 2 rows of 2,000,000,000 tokens, which takes at least 5\.1e\+14"):
        translate(EncoderDecoder(config), {}, [[1]], end_of_text=END, max_new_tokens=2 * 10**9, batch_size=2)
