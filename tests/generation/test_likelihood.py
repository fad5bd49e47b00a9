"""Log-probabilities of given texts agree with the model's logits, one text at a time, for any other texts of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import Config, DataConfig
from transformer.data.tokenizers.bytes import Bytes
from transformer.model_config import AttentionConfig, BlockConfig, ModelConfig
from transformer.objectives.classification import Classification
from transformer.objectives.continuation import split_ids
from transformer.objectives.embedding import Embedding
from transformer.objectives.masked_lm import MASK, MaskedLM
from transformer.objectives.next_token import NextToken
from transformer.objectives.prefix_lm import PrefixLM
from transformer.objectives.seq2seq import Seq2Seq
from transformer.parallel.mesh import make_mesh, replicated_sharding
from transformer.parts import Parts, resolve
from transformer.runs.saved import Loaded
from transformer.tokenizer import mask_id
from transformer.types import UserError

LENGTH = 24
TEXTS = [
    "to be",
    "or",
    "not to be, that is",
    "x" * 23,
    "the question: whether it is nobler in the mind to suffer the slings",
]


def loaded(objective, **model):
    block = BlockConfig(AttentionConfig(num_heads=2))
    config = Config(
        model=ModelConfig(num_layers=2, embed_dim=16, pattern=(block,), init_std=0.3, max_length=LENGTH, **model),
        data=DataConfig(tokenizer=Bytes(), sequence_length=LENGTH, batch_size=4),
        objective=objective,
    )
    tokenizer = Bytes().train(())
    config = resolve(config, tokenizer)
    parts = Parts(config, tokenizer, class_names=("a", "b"), own_batches=True)
    return Loaded(parts.model, parts.init_params(jax.random.key(0)), tokenizer, config, 0, ("a", "b"))


@pytest.fixture(scope="module", params=[NextToken, PrefixLM, MaskedLM, Seq2Seq])
def run(request):
    return loaded(request.param())


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))


def of_one(run, prompt, text):
    """The log-probabilities of a text that needs no window, by the definition: the whole row at once, without padding."""
    tokenizer, apply = run.tokenizer, jax.jit(run.model.apply, static_argnames=("method",))
    variables, end = {"params": run.params}, tokenizer.end_of_text
    read, said = (tokenizer.encode(part).tolist() for part in (prompt, text))
    if isinstance(run.config.objective, Seq2Seq):
        source = np.array([[*read, end]])
        target = [*said, end]
        logits = apply(variables, source, np.array([[end, *said]]))[0]
        return log_softmax(logits)[np.arange(len(target)), target]
    if isinstance(run.config.objective, MaskedLM):
        found = []
        for place in range(len(read), len(read) + len(said)):
            row = np.array([[end, *read, *said]])
            expected, row[0, 1 + place] = row[0, 1 + place], mask_id(tokenizer)
            found.append(log_softmax(apply(variables, row, method="logits")[0, 1 + place])[expected])
        return np.array(found)
    row = np.array([[end, *read, *said]])
    prefix = {"prefix_BT": np.arange(row.shape[1] - 1)[None] <= len(read)} if run.model.bidirectional_prefix else {}
    logits = apply(variables, row[:, :-1], **prefix)[0]
    return log_softmax(logits)[np.arange(len(read), row.shape[1] - 1), said]


def test_they_agree_with_the_logits(run):
    prompts, texts = ["a", "why", "so", "b"], [text[:18] for text in TEXTS[:4]]
    for prompt, text, found in zip(prompts, texts, run.score(texts, prompts=prompts), strict=True):
        np.testing.assert_allclose(found.log_probabilities, of_one(run, prompt, text), rtol=1e-4, atol=1e-5)
        assert found.num_bytes == len(text)
        assert len(found.tokens) == len(text) + isinstance(run.config.objective, Seq2Seq)


def test_the_texts_beside_one_change_nothing(run):
    texts = [text[:18] for text in TEXTS] * 3
    together = run.score(texts, prompts="p", batch_size=4)
    for text, found in zip(texts, together, strict=True):
        (alone,) = run.score([text], prompts="p", batch_size=1)
        np.testing.assert_array_equal(found.tokens, alone.tokens)
        np.testing.assert_allclose(found.log_probabilities, alone.log_probabilities, rtol=1e-4, atol=1e-5)


def test_devices_share_the_rows(run):
    texts, mesh = [text[:18] for text in TEXTS], make_mesh(4, jax.devices()[:4])
    spread = Loaded(
        run.model, jax.device_put(run.params, replicated_sharding(mesh)), run.tokenizer, run.config, 0, run.class_names
    )
    assert len(spread.place(np.zeros((8, 3), np.int32)).sharding.device_set) == 4
    assert isinstance(spread.place(np.zeros((6, 3), np.int32)), np.ndarray)
    for one, other in zip(run.score(texts, prompts="p"), spread.score(texts, prompts="p"), strict=True):
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 5, LENGTH])
def test_a_long_text_is_scored_in_windows(stride):
    run, text = loaded(NextToken()), TEXTS[4]
    (found,) = run.score([text], stride=stride)
    ids = np.array([run.tokenizer.end_of_text, *run.tokenizer.encode(text)])
    expected, scored = [], 0
    while scored < len(text):
        stop = min(max(LENGTH, scored + stride), len(text))
        start = max(0, stop - LENGTH)
        scores = log_softmax(run.model.apply({"params": run.params}, jnp.array(ids[None, start:stop]))[0])
        expected += [scores[place - start, ids[place + 1]] for place in range(scored, stop)]
        scored = stop
    np.testing.assert_allclose(found.log_probabilities, expected, rtol=1e-4, atol=1e-5)
    if stride < LENGTH:  # the prompt is read as far as it fits, and nothing of it is scored
        (behind,) = run.score([text[40:]], prompts=text[:40], stride=stride)
        assert len(behind.tokens) == len(text) - 40
        if stride == 1:
            np.testing.assert_allclose(behind.log_probabilities, expected[40:], rtol=1e-4, atol=1e-5)


def test_a_long_text_is_scored_in_windows_by_a_masked_model_too():
    run = loaded(MaskedLM())
    (found,) = run.score([TEXTS[4]], stride=6)
    assert len(found.log_probabilities) == len(TEXTS[4])
    assert np.isfinite(found.log_probabilities).all()


def test_sums_and_means():
    (found,) = loaded(NextToken()).score(["héé"])
    total = float(found.log_probabilities.sum(dtype=np.float64))
    assert found.num_bytes == 5 == len(found.tokens)
    np.testing.assert_allclose([found.log_probability, found.perplexity], [total, np.exp(-total / 5)], rtol=1e-6)
    np.testing.assert_allclose(found.bits_per_byte, -total / 5 / np.log(2), rtol=1e-6)


def test_what_cannot_be_scored_is_refused():
    run = loaded(NextToken())
    with pytest.raises(UserError, match="must not be empty, text 2 is"):
        run.score(["a", ""])
    with pytest.raises(UserError, match="a prompt for each of 2 texts, got 1"):
        run.score(["a", "b"], prompts=["x"])
    with pytest.raises(UserError, match="stride must be from 0 to the model's 24"):
        run.score(["a"], stride=25)
    with pytest.raises(
        UserError, match="must be a language model, a masked model or a translator, got a run of classification"
    ):
        loaded(Classification()).score(["a"])
    with pytest.raises(UserError, match="got a run of embedding; `transformer embed` computes its vectors"):
        loaded(Embedding()).score(["a"])
    translator = loaded(Seq2Seq())
    with pytest.raises(UserError, match="the prompt of text 1 is blank"):
        translator.score(["a"])
    with pytest.raises(UserError, match="must fit in the model's 24 tokens, text 1 has 41"):
        translator.score(["a" * 40], prompts="b")
    broken = Loaded(run.model, jax.tree.map(lambda x: x * np.nan, run.params), *list(run)[2:])
    with pytest.raises(UserError, match="must be a number, text 1 has NaN"):
        broken.score(["a"])


class Merging:
    """Begins each text with a space, as Llama's does, and has one token for `xy`."""

    end_of_text, vocab_size = 0, 301

    def encode(self, text):
        ids = [32, *text.encode()] if text else []
        for place in range(len(ids) - 1):
            if ids[place : place + 2] == [*b"xy"]:
                ids[place : place + 2] = [300]
        return np.array(ids)


@pytest.mark.parametrize(
    ("prompt", "text", "before", "behind"),
    [
        ("a", "b", [0, 32, *b"a"], [*b"b"]),
        ("x", "y", [0, 32, *b"x"], [32, *b"y"]),
        ("", "b", [0], [32, *b"b"]),
    ],
)
def test_a_prompt_and_its_text_are_tokenized_together_unless_they_would_share_a_token(prompt, text, before, behind):
    assert [ids.tolist() for ids in split_ids(Merging(), prompt, text)] == [before, behind]


def test_hidden_words_are_the_most_likely_ones():
    run = loaded(MaskedLM())
    text = f"a{MASK}b{MASK}"
    (found, alone) = run.predict([text, f"{MASK}"], top_k=3)
    tokens = run.config.objective.encode(text, run.tokenizer, run.config.data)
    hidden = mask_id(run.tokenizer)
    assert tokens.tolist() == [run.tokenizer.end_of_text, ord("a"), hidden, ord("b"), hidden]
    scores = log_softmax(run.model.apply({"params": run.params}, jnp.array(tokens[None]), method="logits")[0])
    for place, words, probabilities in zip((2, 4), found["words"], found["probabilities"], strict=True):
        order = [token for token in np.argsort(-scores[place]) if token < 256][:3]
        assert words == [run.tokenizer.decode([token]).strip() for token in order]
        np.testing.assert_allclose(probabilities, np.exp(scores[place][order]), rtol=1e-4)
    assert len(alone["words"]) == 1
    with pytest.raises(UserError, match=r"says what is hidden by \[MASK\], text 1 has none: 'abc'"):
        run.predict(["abc"])
    with pytest.raises(UserError, match="must fit in the model's 24 tokens, text 1 has 42"):
        run.predict([f"{MASK}" + "a" * 40])
    with pytest.raises(UserError, match="top_k must be from 1 to the 256 tokens, got 0"):
        run.predict([MASK], top_k=0)


def test_what_is_drawn_depends_on_the_seed_and_the_text_alone():
    run = loaded(NextToken())
    texts = ["a", "bc", "def", "g"]

    def drawn(texts=texts, **options):
        return run.predict(texts, max_new_tokens=8, temperature=1.0, **options)

    first = drawn(num_samples=3, seed=1)
    assert [list(row) for row in first] == [["continuation", "continuation_2", "continuation_3"]] * 4
    assert len({text for row in first for text in row.values()}) > 6
    assert drawn(num_samples=3, seed=1, batch_size=1) == first
    assert drawn(texts[:2], num_samples=3, seed=1) == first[:2]
    assert drawn(num_samples=3, seed=2) != first
    assert drawn(top_k=1) == run.predict(texts, max_new_tokens=8)
    with pytest.raises(UserError, match="are for sampling, got temperature=0"):
        run.predict(texts, num_samples=2)
    with pytest.raises(UserError, match="Beam search samples nothing"):
        run.predict(texts, beams=2, temperature=1.0)
