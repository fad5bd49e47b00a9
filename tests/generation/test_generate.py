"""Cached, batched and streamed decoding against the plain definition: the model on whole rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.generation import generate as module
from transformer.generation.generate import Generator, generate, stream
from transformer.generation.prepare import loop_model, prepare
from transformer.generation.prompts import unpad
from transformer.generation.sampling import SamplingConfig
from transformer.layers.scan_params import scan_params
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.model_kinds import POSITIONS
from transformer.models.decoder import Decoder
from transformer.ops.panels import Panels
from transformer.types import UserError

GREEDY = SamplingConfig(temperature=0)
DRAWN = SamplingConfig(temperature=0.9, top_k=9, top_p=0.9)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


def make_config(kind="learned", window=0, **changes):
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, use_bias=True, window=window)
    block = BlockConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=24))
    defaults = {
        "vocab_size": 13,
        "max_length": 32,
        "num_layers": 2,
        "embed_dim": 16,
        "pattern": (block,),
        "tie_embeddings": False,
    }
    return ModelConfig(**{**defaults, "positions": POSITIONS.find(kind)(), **changes})


@functools.cache
def make(config):
    """A model with random parameters, large enough for clear choices."""
    model = Decoder(dataclasses.replace(config, scan_layers=False))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    generator = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.8 * generator.standard_normal(leaf.shape), leaf.dtype), shapes)
    return Decoder(config), scan_params(params) if config.scan_layers else params


@functools.cache
def generator_of(config):
    return Generator(*make(config))


@functools.cache
def forward(config):
    model, _ = make(config)
    return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))


def assert_greedy(config, prompt, tokens):
    """Each token is the most likely one after all that stand before it, by the model without a cache."""
    _, params = make(config)
    row = np.concatenate([prompt, tokens])
    # Right padding changes nothing for a causal model, and keeps to one compilation.
    logits = np.asarray(forward(config)(params, jnp.asarray(np.pad(row, (0, 32 - len(row)))[None])))[0]
    for place in range(len(prompt), len(row)):
        best = logits[place - 1].max()
        assert logits[place - 1, row[place]] >= best - (0.1 if config.dtype == "bfloat16" else 1e-4)


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        pytest.param(make_config(), 1, id="learned"),
        pytest.param(make_config(), 3, id="learned-ragged"),
        pytest.param(make_config("rotary", window=4, tie_embeddings=True), 3, id="rotary-window-tied"),
        pytest.param(make_config("alibi", scan_layers=True), 3, id="alibi-scanned"),
        pytest.param(make_config(dtype="bfloat16", num_layers=1), 1, id="bfloat16"),
    ],
)
def test_greedy_is_the_most_likely_token_after_the_whole_row(config, rows):
    output = generator_of(config).generate(PROMPTS[:rows], max_new_tokens=20, sampling=GREEDY)
    assert output.tokens.shape == (rows, 20)
    assert output.lengths.tolist() == [20] * rows
    for prompt, tokens in zip(PROMPTS, output.tokens, strict=False):
        assert_greedy(config, prompt, tokens)
    assert len(set(output.tokens.ravel().tolist())) > 2


@pytest.mark.parametrize("kind", ["rotary", "t5"])
def test_a_prefix_lm_reads_prompts_in_both_directions(kind):
    model, params = make(make_config(kind))
    model = model.clone(bidirectional_prefix=True)
    output = Generator(model, params).generate(PROMPTS, max_new_tokens=12, sampling=GREEDY)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    rows = [np.concatenate([prompt, tokens]) for prompt, tokens in zip(PROMPTS, output.tokens, strict=True)]
    tokens = jnp.asarray([np.pad(row, (0, 20 - len(row))) for row in rows])
    apply = jax.jit(lambda tokens, **kwargs: model.apply({"params": params}, tokens, **kwargs))
    logits = np.asarray(apply(tokens, prefix_BT=jnp.arange(20)[None] < lengths[:, None]))
    for row, length in enumerate(lengths):
        for place in range(length, length + 12):
            assert logits[row, place - 1, rows[row][place]] >= logits[row, place - 1].max() - 1e-4
    causal = generator_of(make_config(kind)).generate(PROMPTS, max_new_tokens=12, sampling=GREEDY)
    assert causal.tokens.tolist() != output.tokens.tolist()


def test_many_rows_are_read_with_whole_kernels():
    output = generator_of(make_config()).generate(PROMPTS * 3, max_new_tokens=20, sampling=GREEDY)
    for prompt, tokens in zip(PROMPTS * 3, output.tokens, strict=True):
        assert_greedy(make_config(), prompt, tokens)


def test_a_row_does_not_depend_on_the_others():
    generator = generator_of(make_config())
    together = generator.generate(PROMPTS, max_new_tokens=20, sampling=DRAWN, seed=5)
    others = generator.generate([PROMPTS[0], [1], [12] * 9], max_new_tokens=20, sampling=DRAWN, seed=5)
    np.testing.assert_array_equal(together.tokens[0], others.tokens[0])
    alone = generator.generate(PROMPTS[:1], max_new_tokens=20, sampling=DRAWN, seed=5)
    np.testing.assert_array_equal(together.tokens[0], alone.tokens[0])


def test_draws_depend_on_seed_row_and_position():
    generator = generator_of(make_config())
    run = functools.partial(generator.generate, max_new_tokens=20, sampling=DRAWN)
    same = run([PROMPTS[0]] * 3, seed=5).tokens
    np.testing.assert_array_equal(same, run([PROMPTS[0]] * 3, seed=5).tokens)
    assert same[0].tolist() != same[1].tolist()
    assert same.tolist() != run([PROMPTS[0]] * 3, seed=6).tokens.tolist()
    # Neither the requested number of tokens nor the end of the prompt matters: the same tokens follow a token.
    np.testing.assert_array_equal(same[:1, :8], run(PROMPTS[:1], seed=5, max_new_tokens=8).tokens)
    longer = [*PROMPTS[0], *same[0, :8].tolist()]
    np.testing.assert_array_equal(same[:1, 8:], run([longer], seed=5, max_new_tokens=12).tokens)
    # Where all tokens are equally likely, positions alone tell the draws of a row apart.
    model, params = make(make_config())
    flat = Generator(model, jax.tree.map(jnp.zeros_like, params))
    assert len(set(flat.generate(PROMPTS[:1], max_new_tokens=20).tokens[0].tolist())) > 3


def test_end_of_text_ends_a_row():
    generator = generator_of(make_config())
    free = generator.generate(PROMPTS, max_new_tokens=20, sampling=DRAWN, seed=1).tokens
    end = int(free[0, 6])
    first = [row.tolist().index(end) if end in row else 20 for row in free]
    assert first[0] <= 6
    assert max(first) > min(first)
    output = generator.generate(PROMPTS, max_new_tokens=20, sampling=DRAWN, seed=1, end_of_text=end)
    assert output.lengths.tolist() == first
    for row, expected, length in zip(output.tokens, free, first, strict=True):
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert set(row[length:].tolist()) <= {end}


def test_a_prompt_may_hold_end_of_text():
    config = make_config()
    output = generator_of(config).generate([[0, 3, 1], [4, 0]], max_new_tokens=1, sampling=GREEDY, end_of_text=0)
    for tokens, prompt in zip(output.tokens, ([0, 3, 1], [4, 0]), strict=True):
        assert_greedy(config, prompt, tokens)


def test_several_tokens_may_end_a_row():
    generator = generator_of(make_config())
    run = functools.partial(generator.generate, PROMPTS, max_new_tokens=20, sampling=DRAWN, seed=1)
    free = run().tokens
    ends = int(free[0, 6]), int(free[2, 0])
    first = [next((n for n, token in enumerate(row) if token in ends), 20) for row in free.tolist()]
    output = run(end_of_text=ends)
    assert output.lengths.tolist() == first
    for row, expected, length in zip(output.tokens, free, first, strict=True):
        # The token that ended the row is there, and repeats.
        np.testing.assert_array_equal(row[: length + 1], expected[: length + 1])
        assert set(row[length:].tolist()) == ({int(expected[length])} if length < 20 else set())
    assert len({int(row[length]) for row, length in zip(free, first, strict=True) if length < 20}) == 2
    streamed = list(generator.stream(PROMPTS[0], max_new_tokens=20, sampling=DRAWN, seed=1, end_of_text=list(ends)))
    assert streamed == free[0, : first[0]].tolist()
    programs = module._decode._cache_size()
    run(end_of_text=(ends[1], 12))
    run(end_of_text=(-1, 0))
    assert module._decode._cache_size() == programs


def test_a_penalty_counts_prompt_and_continuation():
    """Greedy: each token is the best of penalized logits of full passes."""
    config, sampling = make_config(), SamplingConfig(temperature=0, repetition_penalty=2.5)
    output = generator_of(config).generate(PROMPTS, max_new_tokens=20, sampling=sampling)
    for prompt, tokens in zip(PROMPTS, output.tokens.tolist(), strict=True):
        row = [*prompt, *tokens]
        logits = forward(config)(make(config)[1], jnp.asarray(np.pad(row, (0, 32 - len(row)))[None]))
        for place in range(len(prompt), len(row)):
            scores = np.array(logits[0, place - 1])
            seen = list(set(row[:place]))
            scores[seen] = np.where(scores[seen] > 0, scores[seen] / 2.5, scores[seen] * 2.5)
            assert scores[row[place]] >= scores.max() - 1e-4
    assert (
        output.tokens.tolist()
        != generator_of(config).generate(PROMPTS, max_new_tokens=20, sampling=GREEDY).tokens.tolist()
    )


def test_a_batch_padded_on_the_left_is_its_rows():
    tokens, mask = np.full((3, 9), 11), np.zeros((3, 9), bool)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, True
    run = functools.partial(generator_of(make_config()).generate, max_new_tokens=20, sampling=DRAWN, seed=3)
    np.testing.assert_array_equal(run(unpad(tokens, mask)).tokens, run(PROMPTS).tokens)
    rows = unpad(tokens[:, ::-1], mask[:, ::-1].astype(np.int64))  # on the right
    assert [row.tolist() for row in rows] == [prompt[::-1] for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1]], r"one shape \[B, T\], got \(2, 2\) and \(1, 2\)"),
        ([[1, 1], [0, 0]], "Every row must have a token, row 1 has only padding"),
        ([[1, 1], [0, 2]], "A mask must be 1 for tokens"),
    ],
)
def test_masks_that_are_none_are_refused(mask, message):
    with pytest.raises(UserError, match=message):
        unpad([[1, 2], [3, 4]], mask)
    with pytest.raises(UserError, match="row 0 has padding between tokens"):
        unpad([[1, 2, 3]], [[1, 0, 1]])


def test_stops_when_every_row_has_ended(monkeypatch):
    steps = []
    decode = module._decode

    def recording(*args, **kwargs):
        state, overflow = decode(*args, **kwargs)
        steps.append(int(state.num_new))
        return state, overflow

    monkeypatch.setattr(module, "_decode", recording)
    generator = generator_of(make_config())
    tokens = generator.generate(PROMPTS[:1], max_new_tokens=20, sampling=GREEDY).tokens[0].tolist()
    end = max(tokens, key=tokens.index)  # the one that comes last
    assert tokens.index(end) > 1
    output = generator.generate(PROMPTS[:1], max_new_tokens=20, sampling=GREEDY, end_of_text=end)
    assert output.lengths.tolist() == [tokens.index(end)]
    assert steps == [20, tokens.index(end) + 1]


@pytest.mark.parametrize("count", [1, 2, 9, 20])
def test_stream_is_generate(count):
    generator = generator_of(make_config())
    expected = generator.generate(PROMPTS[:1], max_new_tokens=count, sampling=DRAWN, seed=7)
    streamed = list(generator.stream(PROMPTS[0], max_new_tokens=count, sampling=DRAWN, seed=7))
    assert streamed == expected.tokens[0].tolist()


def test_stream_comes_in_pieces_and_ends_at_end_of_text():
    config = make_config()
    tokens = list(stream(*make(config), PROMPTS[0], max_new_tokens=20, sampling=DRAWN, seed=7))
    end = max(tokens, key=tokens.index)  # the one that comes last
    assert tokens.index(end) > module._CHUNK
    until_end = stream(*make(config), PROMPTS[0], max_new_tokens=20, sampling=DRAWN, seed=7, end_of_text=end)
    assert next(until_end) == tokens[0]
    assert [tokens[0], *until_end] == tokens[: tokens.index(end)]


def test_compiles_once():
    generator = generator_of(make_config())
    run = functools.partial(generator.generate, max_new_tokens=20, sampling=DRAWN)
    run(PROMPTS)
    programs = module._prefill._cache_size(), module._decode._cache_size()
    run([[1], [2, 3], [4] * 12], seed=3)
    run(PROMPTS, end_of_text=0)
    run(PROMPTS, max_new_tokens=17)
    generate(*make(make_config()), PROMPTS, max_new_tokens=20, sampling=DRAWN)
    assert (module._prefill._cache_size(), module._decode._cache_size()) == programs


def test_without_max_length_there_is_always_room():
    unlimited = make_config("rotary", max_length=0)
    prompt = list(range(1, 12)) * 2
    output = generator_of(unlimited).generate([prompt], max_new_tokens=10, sampling=GREEDY)
    assert output.lengths.tolist() == [10]
    assert_greedy(unlimited, prompt, output.tokens[0])


def test_fills_the_model_to_its_last_position():
    config = make_config()
    output = generator_of(config).generate([[7] * 12], max_new_tokens=20, sampling=GREEDY)
    assert_greedy(config, [7] * 12, output.tokens[0])


def is_panels(leaf):
    return isinstance(leaf, Panels)


def test_prepared_parameters_are_another_tree_with_panels_for_every_kernel():
    model, params = make(make_config(tie_embeddings=True))
    prepared = prepare(model, params, 1)
    leaves, tree = jax.tree.flatten_with_path(prepared, is_leaf=is_panels)
    cut = {jax.tree_util.keystr(path) for path, leaf in leaves if is_panels(leaf)}
    kernels = [path for path, _ in jax.tree.leaves_with_path(params) if path[-1].key in ("kernel", "embedding")]
    unused = {"['decoder']['position_embedding']['embedding']"}
    assert cut == {jax.tree_util.keystr(path) for path in kernels} - unused
    assert not any(is_panels(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_panels))
    apply = jax.jit(lambda params: model.apply({"params": params}, jnp.array([[4, 7]])))
    expected = apply(params)
    np.testing.assert_allclose(apply(prepared), expected, atol=1e-4)
    for index, (_, panels) in enumerate(leaves):
        if is_panels(panels):
            changed = [leaf for _, leaf in leaves]
            changed[index] = dataclasses.replace(panels, panels=jnp.zeros_like(panels.panels))
            assert np.abs(apply(jax.tree.unflatten(tree, changed)) - expected).max() > 1e-3
    assert prepare(model, params, 64) is params


def test_on_a_gpu_kernels_have_the_type_that_they_are_multiplied_in(monkeypatch):
    monkeypatch.setattr("transformer.generation.prepare._platform", lambda params: "gpu")
    config = dataclasses.replace(make_config(tie_embeddings=True), dtype="bfloat16", scan_layers=True)
    model, params = loop_model(*make(config))
    assert not model.config.scan_layers
    prepared = prepare(model, params, 4)
    types = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree.leaves_with_path(prepared)}
    multiplied = {path for path, dtype in types.items() if dtype == jnp.bfloat16}
    unused = "['decoder']['position_embedding']['embedding']"
    assert multiplied == {path for path in types if path.endswith(("['kernel']", "['embedding']"))} - {unused}
    logits = [model.apply({"params": tree}, jnp.array([[4, 7]])) for tree in (params, prepared)]
    np.testing.assert_array_equal(*logits)
    whole = make(make_config())
    assert prepare(*whole, 4) is whole[1], "float32 is multiplied in float32"


def test_prepared_parameters_have_gradients_of_their_own():
    """There is one copy of each weight in them, which is used and differentiated."""
    model, params = make(make_config(tie_embeddings=True))

    def loss(params):
        return jnp.sum(model.apply({"params": params}, jnp.array([[4, 7]])) ** 2)

    expected, gradients = (jax.jit(jax.grad(loss))(tree) for tree in (params, prepare(model, params, 1)))
    whole = jax.tree.leaves(expected)
    panels = jax.tree.leaves(gradients, is_leaf=is_panels)
    for path, (gradient, cut) in enumerate(zip(whole, panels, strict=True)):
        total = np.sum(cut.panels if is_panels(cut) else cut)
        np.testing.assert_allclose(total, np.sum(gradient), rtol=1e-3, atol=1e-2, err_msg=str(path))


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, SamplingConfig()])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_logits_that_are_no_numbers_are_an_error_that_says_where(sampling, bad):
    """A token that the third step reads has no vector."""
    config = make_config(dtype="float32", num_layers=1)
    model, params = make(config)
    table = params["token_embedding"]["embedding"]
    good = generate(model, params, PROMPTS, max_new_tokens=8, sampling=sampling, seed=3)
    read = {*PROMPTS[0], *good.tokens[0, :2].tolist()}
    token = next(t for t in good.tokens[0, 2:7].tolist() if t not in read)
    count = good.tokens[0].tolist().index(token) + 1
    broken = {**params, "token_embedding": {"embedding": table.at[token].set(bad)}}
    message = rf"the logits of prompt 0 are NaN or inf after {len(PROMPTS[0]) + count} tokens"
    with pytest.raises(UserError, match=message):
        generate(model, broken, PROMPTS[:1], max_new_tokens=8, sampling=sampling, seed=3)
    streamed = []
    with pytest.raises(UserError, match=message):
        streamed.extend(stream(model, broken, PROMPTS[0], max_new_tokens=8, sampling=sampling, seed=3))
    assert streamed == good.tokens[0, :count].tolist()


def test_overflow_is_noticed(monkeypatch):
    decode = module._decode
    monkeypatch.setattr(module, "_decode", lambda *args, **kwargs: (decode(*args, **kwargs)[0], True))
    with pytest.raises(RuntimeError, match="cache must hold every token, but some were dropped"):
        generator_of(make_config()).generate(PROMPTS[:1], max_new_tokens=20, sampling=GREEDY)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 4, r"at least one prompt, got none"),
        ([[1], []], 4, r"one token or more, prompt 1 has shape \(0,\); start it with the end-of-text token"),
        ([[1, 2], [3, 13]], 4, r"below vocab_size=13, prompt 1 holds 3 to 13; encode it with the model's own"),
        (np.array([[2.5]]), 4, r"Tokens must be integers, prompt 0 holds float64"),
        (np.array([[2**32 + 1]]), 4, r"below vocab_size=13, prompt 0 holds 4294967297 to 4294967297"),
        ([[-1]], 4, r"Tokens must be at least 0 and below vocab_size=13, prompt 0 holds -1 to -1"),
        ([[1]], 0, r"max_new_tokens must be at least 1, got 0"),
        ([[1] * 30, [2]], 3, r"prompt and new tokens, 30 \+ 3, but its capacity is 32"),
    ],
)
def test_refuses(prompts, count, message):
    with pytest.raises(ValueError, match=message):
        generate(*make(make_config()), prompts, max_new_tokens=count)


@pytest.mark.parametrize("end", [-2, 13])
def test_an_end_of_text_that_is_no_token_is_refused(end):
    with pytest.raises(UserError, match=f"end_of_text must be a token below vocab_size=13, .* got {end}"):
        generate(*make(make_config()), PROMPTS, max_new_tokens=1, end_of_text=end)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, SamplingConfig(temperature=2.0)])
def test_only_what_is_drawable_is_drawn(sampling):
    generator = generator_of(make_config())
    allowed = np.zeros(13, bool)
    allowed[[3, 7]] = True
    found = generator.generate(PROMPTS * 4, max_new_tokens=8, sampling=sampling, drawable=allowed).tokens
    assert set(found.ravel().tolist()) == {3, 7}
    all_alike = generator.generate(PROMPTS, max_new_tokens=8, sampling=sampling, drawable=np.ones(13, bool)).tokens
    np.testing.assert_array_equal(all_alike, generator.generate(PROMPTS, max_new_tokens=8, sampling=sampling).tokens)
    with pytest.raises(UserError, match="truth value for each of vocab_size=13"):
        generator.generate(PROMPTS, max_new_tokens=1, drawable=np.ones(12, bool))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_of_decoding_does_not_copy_the_cache(rows):
    """XLA must write a token in place: otherwise it copies the cache of every layer in every step."""
    model = Decoder(ModelConfig(vocab_size=5, num_layers=2, embed_dim=8, max_length=37))
    tokens = jnp.zeros((rows, 1), jnp.int32)
    params = model.init(jax.random.key(0), tokens)

    def step(_, state):
        tokens, cache = state
        logits, cache = model.apply(params, tokens, cache=cache)
        return jnp.argmax(logits, axis=-1), cache

    def decode(tokens, cache):
        return jax.lax.fori_loop(0, 9, step, (tokens, cache))

    cache = model.init_cache(rows, 37)
    shape = ",".join(map(str, cache[0].attention.key_BGPK.shape))
    text = jax.jit(decode, donate_argnums=1).lower(tokens, cache).compile().as_text()
    copies = [line for line in text.splitlines() if " copy(" in line and f"= f32[{shape}]" in line]
    assert f"f32[{shape}]" in text
    assert copies == []
