"""A run of every kind shows its attention: the weights that its model uses, its candidates, and what it was before training."""

import dataclasses
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer import attention_page
from transformer.adapter_config import AdapterConfig
from transformer.analysis import attention
from transformer.analysis.attention_page import unpack
from transformer.config import Config, DataConfig, ParallelConfig, TrainingConfig
from transformer.data.tokenizers import PairTokenizer
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.data.tokenizers.characters import CharacterTokenizer
from transformer.layers.scan_params import scan_params
from transformer.model_config import AttentionConfig, BlockConfig, FeedForwardConfig, ModelConfig
from transformer.objective import OBJECTIVES, Objective
from transformer.objectives.seq2seq import translations
from transformer.parts import Parts, resolve
from transformer.runs.attention import initial_params
from transformer.runs.recipe import make_run
from transformer.runs.saved import Loaded
from transformer.types import UserError

BLOCK = BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=2), FeedForwardConfig(hidden_dim=24))
NO_ADAPTER = AdapterConfig()
TEXT = "a café <b>"  # a character of two bytes, and a tag


def made(kind, *, tokenizer=None, adapter=NO_ADAPTER, **model):
    """A run with random parameters, as `load` would give it."""
    tokenizer = tokenizer or ByteTokenizer()
    settings = {"num_layers": 3, "embed_dim": 16, "pattern": (BLOCK,), "init_std": 0.4, **model}
    config = Config(
        model=ModelConfig(**settings),
        data=DataConfig(sequence_length=32, batch_size=8),
        objective=OBJECTIVES.find(kind)(),
        adapter=adapter,
        training=TrainingConfig(init_from="base" if adapter.rank else ""),
    )
    names = ("bad", "good", "so-so") if kind == "classification" else ()
    config = resolve(config, tokenizer)
    parts = Parts(config, tokenizer, class_names=names, own_batches=True)
    return Loaded(parts.model, parts.init_params(jax.random.key(7)), tokenizer, config, 10, names)


def data_of(page):
    """What the page's script reads."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


@pytest.mark.parametrize("kind", OBJECTIVES.names)
def test_every_kind_has_a_page_with_its_weights(kind):
    run = made(kind)
    seen, data = run.attention(TEXT), data_of(attention_page(run, TEXT))
    expected = {"seq2seq": 3, "span_corruption": 3}.get(kind, 1)
    assert len(seen.maps) == len(data["maps"]) == expected
    for found, shown in zip(seen.maps, data["maps"], strict=True):
        shape = (4, len(seen.reading.ids[found.queries]), len(seen.reading.ids[found.keys]))
        assert (shown["queries"], shown["keys"]) == (found.queries, found.keys) and len(found.weights) == 3
        for weights, layer in zip(found.weights, shown["layers"], strict=True):
            assert weights.shape == shape and weights.dtype == np.float32
            np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
            assert np.abs(unpack(layer["weights"], shape) - weights).max() < 1 / 255
            # Of other parameters, which attend to something else.
            assert np.abs(unpack(layer["initial"], shape) - weights).max() > 0.01
            np.testing.assert_allclose(layer["after"]["first"], weights[:, 1:, 0].mean(axis=-1), atol=1e-4)
    assert data["initial"] == "before training"


def test_both_stacks_and_their_texts():
    run = made("seq2seq", tokenizer=PairTokenizer(CharacterTokenizer("ab"), CharacterTokenizer("xyz")))
    data = data_of(attention_page(run, "ab", target="xy"))
    assert data["texts"]["encoder"][:2] == ["a", "b"] and data["texts"]["decoder"][1:] == ["x", "y"]
    assert [found["name"] for found in data["maps"]] == ["encoder to itself", "decoder to itself", "decoder to encoder"]
    assert data["maps"][2]["layers"][0]["after"]["distance"] is None


def test_a_translator_attends_from_its_own_translation():
    run = made("seq2seq")
    reading = run.reading("abc")
    (said,) = translations(run, [reading.ids["encoder"]], 1, 31)
    assert run.tokenizer.decode(reading.ids["decoder"]) == said
    assert run.reading("abc", target="xy").ids["decoder"].tolist() == [256, 120, 121]


def test_candidates_are_the_models():
    run = made("next_token")
    found = data_of(attention_page(run, "abc", top_k=5))["candidates"]
    logits = run.model.apply({"params": run.params}, jnp.array([[256, 97, 98, 99]]))
    likely = np.asarray(jax.nn.softmax(logits[0]))
    assert [len(row) for row in found] == [5] * 4
    for row, probabilities in zip(found, likely, strict=True):
        np.testing.assert_allclose([p for _, p, _ in row], np.sort(probabilities)[::-1][:5], atol=2e-5)
    everything = data_of(attention_page(run, "abc", top_k=257))["candidates"]
    assert [[token for token, _, own in row if own] for row in everything] == [["a"], ["b"], ["c"], []]


def test_candidates_of_a_masked_model_are_of_hidden_tokens():
    run = made("masked_lm")
    text = "abcdefghijklmnopqrst"  # more rows than are read at once
    ids, mask = run.reading(text).ids["encoder"], run.tokenizer.vocab_size
    seen = run.attention(text)
    for place in (0, 3, 17, 20):
        row = np.where(np.arange(len(ids)) == place, mask, ids)[None]
        expected = run.model.apply({"params": run.params}, jnp.array(row), method="logits")
        np.testing.assert_allclose(seen.logits[place], expected[0, place], atol=1e-5)
    everything = data_of(attention_page(run, text, top_k=258))["candidates"]
    assert [[token for token, _, own in row if own] for row in everything][1:] == [[letter] for letter in text]


def test_a_prefix_is_read_in_both_directions_and_not_predicted():
    run = made("prefix_lm")
    seen = run.attention("abc", target="de")
    weights = seen.maps[0].weights[0]
    assert (weights[:, :4, :4] > 0).all() and not weights[:, :4, 4:].any() and not weights[:, 4, 5].any()
    assert [len(row) for row in data_of(attention_page(run, "abc", target="de"))["candidates"]] == [0, 0, 0, 8, 8, 8]


def test_classes_of_a_text():
    run = made("classification")
    (row,) = data_of(attention_page(run, "abc"))["candidates"]
    (expected,) = run.predict(["abc"], top_k=3)
    assert [name for name, *_ in row] == [expected[c] for c in ("class", "class_2", "class_3")]
    np.testing.assert_allclose(row[0][1], expected["probability"], atol=2e-5)


FORMS = {
    "scan": {"scan_layers": True},
    "remat": {"remat": "full"},
    "scan, first and last": {"scan_layers": True, "first": (BLOCK,), "num_layers": 4, "pattern": (BLOCK, BLOCK)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_stack_has_the_weights_of_the_loop(form):
    looped = {name: x for name, x in FORMS[form].items() if name not in ("scan_layers", "remat")}
    plain, run = made("next_token", **looped), made("next_token", **FORMS[form])
    params = plain.params
    if run.config.model.scan_layers:
        params = scan_params(params, len(run.config.model.pattern), len(run.config.model.first))
    found, expected = dataclasses.replace(run, params=params).attention(TEXT), plain.attention(TEXT)
    assert len(found.maps[0].weights) == run.config.model.num_layers
    for ours, theirs in zip(found.maps[0].weights, expected.maps[0].weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_layers_may_have_other_numbers_of_heads():
    few = BlockConfig(AttentionConfig(num_heads=2, window=3))
    data = data_of(attention_page(made("next_token", pattern=(BLOCK, few)), TEXT, initial=False))
    assert [layer["heads"] for layer in data["maps"][0]["layers"]] == [4, 2, 4]
    assert data["initial"] == "" and data["maps"][0]["layers"][0]["before"] is None


def test_a_run_with_adapters():
    run = made("next_token", adapter=AdapterConfig(rank=2))
    changed = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.3 if "lora_b" in jax.tree_util.keystr(path) else x, run.params
    )
    assert data_of(attention_page(run, "abc"))["initial"] == "initialised at random"
    before, after = (
        dataclasses.replace(run, params=p).attention(TEXT).maps[0].weights[0] for p in (run.params, changed)
    )
    assert np.abs(before - after).max() > 0.01


def test_initial_parameters_agree_with_training(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)
    config = Config(
        model=ModelConfig(num_layers=1, embed_dim=8, pattern=(BLOCK,)),
        data=DataConfig(source=(str(tmp_path / "text.txt"),), data_dir=str(tmp_path), sequence_length=16, batch_size=8),
        parallel=ParallelConfig(data=1),
        training=TrainingConfig(seed=3),
    )
    made_run = make_run(config)
    run = Loaded(made_run.steps.parts.model, None, made_run.tokenizer, made_run.config, 1)
    jax.tree.map(np.testing.assert_array_equal, initial_params(run), made_run.init_state().params)


@pytest.mark.parametrize(
    ("kind", "text", "options", "message"),
    [
        ("next_token", " \n", {}, "must not be blank"),
        ("next_token", "a" * 32, {}, "at most the 32 tokens that the model reads, got 33 .* shorten it"),
        ("masked_lm", "a" * 32, {}, "at most the 32 tokens"),
        ("classification", "a" * 32, {}, "at most the 32 tokens"),
        ("embedding", "a" * 32, {}, "at most the 32 tokens"),
        ("seq2seq", "a" * 32, {}, "at most the 32 tokens"),
        ("seq2seq", "a", {"target": "b" * 32}, "A target to look at must have at most the 32 tokens"),
        (
            "prefix_lm",
            "a" * 20,
            {"target": "b" * 12},
            "A text with what follows it to look at must have at most the 32 tokens",
        ),
        (
            "next_token",
            "a",
            {"target": "b"},
            "A target is for translators and prefix language models, got one for a run of next_token",
        ),
        ("next_token", "a", {"top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
def test_refusals(kind, text, options, message):
    with pytest.raises(UserError, match=message):
        attention_page(made(kind), text, **options)


def test_too_many_weights(monkeypatch):
    monkeypatch.setattr(attention, "MOST_WEIGHTS", 1000)
    with pytest.raises(
        UserError,
        match=r"at most 1,000 weights over all layers and heads, got 1,452 for 11 tokens; .* about 9",
    ):
        made("next_token").attention("0123456789")


def test_weights_that_are_no_numbers():
    run = made("next_token")
    run.params["token_embedding"]["embedding"] = jnp.full_like(run.params["token_embedding"]["embedding"], jnp.nan)
    with pytest.raises(UserError, match="must be finite, layer 1 of the decoder has NaN"):
        run.attention("abc")


def test_a_user_defined_model_and_an_objective_that_reads_nothing():
    run = made("next_token")
    with pytest.raises(UserError, match="this run has a user-defined Dense"):
        dataclasses.replace(run, model=nn.Dense(3), own_model=True).attention("abc")

    class Own(Objective):
        kind = "own"

    with pytest.raises(UserError, match=r"must be of an objective that defines reading\(\), got a run of own"):
        Own().reading(run, "abc")
