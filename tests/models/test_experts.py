"""Models with experts: what holds for all models holds for them, because no token depends on where others go."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.generation.generate import generate
from transformer.generation.sampling import SamplingConfig
from transformer.layers.scan_params import scan_params
from transformer.model_config import FeedForwardConfig

pytestmark = pytest.mark.usefixtures("strict_dtypes")
GREEDY = SamplingConfig(temperature=0)


def config(tiny, **changes):
    network = FeedForwardConfig(24, "silu", gated=True, num_experts=4)
    return tiny.config("rotary", block={"feed_forward": network}, **changes)


@pytest.mark.parametrize("scan", [False, True])
def test_cached_is_full_with_prompts_of_different_lengths(tiny, scan):
    loop, tokens = config(tiny), tiny.tokens((3, 8))
    params, form = tiny.params(loop), dataclasses.replace(loop, scan_layers=scan)
    full = np.asarray(tiny.forward(loop)(params, tokens))
    params = scan_params(params) if scan else params
    lengths = np.array([5, 2, 0])
    valid = (np.arange(5)[None] < lengths[:, None]).astype(np.int32)
    cache = tiny.build(form).init_cache(3, 8)
    prompt = np.where(valid == 1, tokens[:, :5], 9)
    logits, cache = tiny.forward(form)(params, prompt, segment_ids_BT=valid, cache=cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], full[row, :length], atol=2e-5)
    for step in range(3):
        places = lengths + step
        logits, cache = tiny.forward(form)(params, tokens[np.arange(3), places][:, None], cache=cache)
        np.testing.assert_allclose(logits[:, 0], full[np.arange(3), places], atol=2e-5)


def test_packed_is_separate(tiny):
    form, documents = config(tiny), tiny.tokens((2, 5))
    weights = np.random.default_rng(2).standard_normal((2, 5, 13)).astype(np.float32)
    gradient, logits = tiny.graded(form)(tiny.params(form), weights, documents)

    def pack(rows, fill=0):
        return np.concatenate([rows[0], rows[1], np.full((2, *rows.shape[2:]), fill, rows.dtype)])[None]

    packed_gradient, packed_logits = tiny.graded(form)(
        tiny.params(form),
        pack(weights),
        pack(documents, fill=7),
        positions_BT=pack(np.tile(np.arange(5, dtype=np.int32), (2, 1))),
        segment_ids_BT=pack(np.array([[1] * 5, [2] * 5], np.int32)),
    )
    np.testing.assert_allclose(packed_logits[0, :10].reshape(logits.shape), logits, atol=2e-5)
    assert np.abs(gradient["decoder"]["blocks"]["block_0"]["feed_forward"]["router"]["kernel"]).max() > 1e-2
    tiny.assert_trees_close(packed_gradient, gradient)


@pytest.mark.parametrize("scan", [False, True])
def test_generates_what_full_passes_say(tiny, scan):
    loop = config(tiny)
    params, form = tiny.params(loop), dataclasses.replace(loop, scan_layers=scan)
    tokens = [[3, 1, 4]]
    for _ in range(4):
        logits = tiny.forward(loop)(params, jnp.asarray([tokens[0] + [0] * (8 - len(tokens[0]))], jnp.int32))
        tokens[0] = [*tokens[0], int(np.argmax(logits[0, len(tokens[0]) - 1]))]
    output = generate(
        tiny.build(form), scan_params(params) if scan else params, [[3, 1, 4]], max_new_tokens=4, sampling=GREEDY
    )
    assert output.tokens.tolist() == [tokens[0][3:]]
