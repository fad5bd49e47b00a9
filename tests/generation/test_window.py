"""Rows longer than the model reads: each token follows from the model applied to its window, and from nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.generation import generate as module
from transformer.generation.generate import Generator, generate, stream
from transformer.generation.sampling import SamplingConfig
from transformer.generation.window import num_dropped
from transformer.layers.scan_params import scan_params
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import POSITIONS
from transformer.models.decoder import Decoder
from transformer.types import UserError

GREEDY = SamplingConfig(temperature=0)
DRAWN = SamplingConfig(temperature=0.9, top_k=9)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6]]  # below, at and above 8 tokens
COUNT = 30


def make(kind="rotary", limit=8, **changes):
    block = BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=2), FeedForwardConfig(hidden_dim=24))
    config = ModelConfig(
        vocab_size=13,
        max_length=limit,
        num_layers=2,
        embed_dim=16,
        pattern=(block,),
        positions=POSITIONS.find(kind)(),
        **changes,
    )
    model = Decoder(dataclasses.replace(config, scan_layers=False))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    generator = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.8 * generator.standard_normal(leaf.shape), leaf.dtype), shapes)
    return Decoder(config), scan_params(params) if config.scan_layers else params


def window(row, limit, first):
    """The tokens that are read when all of a row are: once there are `limit`, half of them, then one more each time."""
    held = []
    for token in row:
        if len(held) == limit:
            held = held[:first] + held[limit - (limit // 2 - first) :]
        held.append(token)
    return held


def assert_follows(model, params, prompt, tokens, first=0):
    """Each token is the most likely one after its window, by a model without a cache; a prefix-LM reads it as a prompt."""
    limit, row = model.config.max_length, [*prompt, *tokens]
    read = [window(row[:place], limit, first) for place in range(len(prompt), len(row))]
    rows = jnp.asarray([held + [0] * (limit - len(held)) for held in read])
    logits = np.asarray(jax.jit(lambda rows: model.apply({"params": params}, rows))(rows))
    for index, held in enumerate(read):
        at_end = logits[index, len(held) - 1]
        assert at_end[tokens[index]] >= at_end.max() - 1e-4, f"token {index}, after {len(held)}"


@pytest.mark.parametrize("kind", [kind for kind in POSITIONS.names if kind != "inherit"])
def test_each_token_follows_from_its_window(kind):
    model, params = make(kind)
    output = Generator(model, params, keep_first=0).generate(PROMPTS, max_new_tokens=COUNT, sampling=GREEDY)
    assert output.tokens.shape == (3, COUNT)
    for prompt, tokens in zip(PROMPTS, output.tokens.tolist(), strict=True):
        assert_follows(model, params, prompt, tokens)
    assert len(set(output.tokens.ravel().tolist())) > 3


@pytest.mark.parametrize(("limit", "first"), [(8, 2), (9, 0), (9, 3), (2, 0), (3, 0)])
def test_first_tokens_stay_and_lengths_may_be_odd(limit, first):
    model, params = make(limit=limit)
    output = generate(model, params, PROMPTS, max_new_tokens=COUNT, sampling=GREEDY, keep_first=first)
    for prompt, tokens in zip(PROMPTS, output.tokens.tolist(), strict=True):
        assert_follows(model, params, prompt, tokens, first)


def test_rows_of_scanned_layers_roll_one_by_one():
    """On devices where a scan stays one."""
    model, params = make(scan_layers=True)
    looped = make()[1]
    generator = Generator(model, params, keep_first=0)
    generator._model, generator._params, generator._prepared = model, params, {3: params}
    output = generator.generate(PROMPTS, max_new_tokens=COUNT, sampling=GREEDY)
    for prompt, tokens in zip(PROMPTS, output.tokens.tolist(), strict=True):
        assert_follows(make()[0], looped, prompt, tokens)


def test_a_prefix_lm_reads_a_window_as_a_prompt():
    """A token behind the window's start was read with all of that start; so was the prompt."""
    model, params = make()
    model = model.clone(bidirectional_prefix=True)
    tokens = (
        generate(model, params, PROMPTS[:1], max_new_tokens=COUNT, sampling=GREEDY, keep_first=0).tokens[0].tolist()
    )
    row, begun = [*PROMPTS[0], *tokens], 3
    for place in range(3, len(row)):
        if place - 1 >= 8 and (place - 1 - 8) % 4 == 0:
            begun = 4  # of the tokens that are read, those read together
        held = window(row[:place], 8, 0)
        prefix = (np.arange(len(held)) < begun)[None]
        logits = np.asarray(model.apply({"params": params}, jnp.asarray([held]), prefix_BT=jnp.asarray(prefix)))[0, -1]
        assert logits[row[place]] >= logits.max() - 1e-4, place


def test_a_row_depends_on_neither_the_others_nor_the_end_of_its_prompt():
    model, params = make()
    generator = Generator(model, params, keep_first=0)
    together = generator.generate(PROMPTS, max_new_tokens=COUNT, sampling=DRAWN, seed=3).tokens
    alone = generator.generate(PROMPTS[1:2], max_new_tokens=COUNT, sampling=DRAWN, seed=3, row_numbers=[1]).tokens
    np.testing.assert_array_equal(together[1], alone[0])
    longer = [*PROMPTS[0], *together[0, :17].tolist()]
    np.testing.assert_array_equal(
        together[0, 17:], generator.generate([longer], max_new_tokens=13, sampling=DRAWN, seed=3).tokens[0]
    )
    streamed = stream(model, params, PROMPTS[0], max_new_tokens=COUNT, sampling=DRAWN, seed=3, keep_first=0)
    assert list(streamed) == together[0].tolist()


def test_a_row_that_has_ended_holds_up_no_other():
    model, params = make()
    generator = Generator(model, params, keep_first=0)
    free = generator.generate(PROMPTS, max_new_tokens=COUNT, sampling=DRAWN, seed=1).tokens
    ends = [[row.index(token) if token in row else COUNT for row in free.tolist()] for token in range(13)]
    end = max(range(13), key=lambda token: max(ends[token]) - min(ends[token]))
    output = generator.generate(PROMPTS, max_new_tokens=COUNT, sampling=DRAWN, seed=1, end_of_text=end)
    assert output.lengths.tolist() == ends[end] and max(ends[end]) > 8 > min(ends[end])
    for row, expected, length in zip(output.tokens, free, ends[end], strict=True):
        np.testing.assert_array_equal(row[:length], expected[:length])


def test_within_the_length_nothing_changes_and_no_more_is_compiled():
    model, params = make(limit=32)
    plain, rolling = Generator(model, params), Generator(model, params, keep_first=0)
    expected = plain.generate(PROMPTS, max_new_tokens=19, sampling=DRAWN)
    programs = module._prefill._cache_size(), module._decode._cache_size(), module.roll_cache._cache_size()
    np.testing.assert_array_equal(rolling.generate(PROMPTS, max_new_tokens=19, sampling=DRAWN).tokens, expected.tokens)
    assert (module._prefill._cache_size(), module._decode._cache_size(), module.roll_cache._cache_size()) == programs


def test_windows_are_cut_at_positions_of_the_row():
    assert num_dropped(np.arange(15), 4).tolist() == [0, 0, 0, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]
    assert num_dropped(np.array([5, 10**6]), 0).tolist() == [0, 0]


@pytest.mark.parametrize(("limit", "first"), [(8, 4), (8, -1), (1, 0)])
def test_a_window_must_have_room(limit, first):
    model, params = make(limit=limit)
    with pytest.raises(UserError, match=f"keep_first must be at least 0 and below half of the model's {limit} tokens"):
        generate(model, params, PROMPTS, max_new_tokens=COUNT, keep_first=first)
