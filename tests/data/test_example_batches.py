"""Batches of examples: each example once an epoch, whoever reads; little padding; a state that restores exactly."""

import dataclasses
import json

import numpy as np
import pytest

from transformer.config import DataConfig
from transformer.data.example_batches import ExampleEvaluationBatches
from transformer.data.example_data import ExampleData
from transformer.data.forms.examples import buckets
from transformer.data.forms.labelled import LabelledText, LabelledTexts
from transformer.data.forms.pairs import Pairs, TextPair
from transformer.data.source import ExampleSource
from transformer.data.tokenizers import load_tokenizer
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.data.tokenizers.words import Words
from transformer.types import UserError

CONFIG = DataConfig(sequence_length=32, batch_size=4, shuffle_seed=3)
TOKENIZER = ByteTokenizer()
LENGTHS = np.random.RandomState(0).randint(1, 31, 600)
EXAMPLES = [
    LabelledText(f"{i:04d}{'x' * length}"[:length] if length < 4 else f"{i:04d}{'x' * (length - 4)}", i)
    for i, length in enumerate(LENGTHS)
]


def data(config=CONFIG, examples=EXAMPLES):
    source = ExampleSource("toy", "fingerprint", {"train": 0, "test": 0}, "", lambda split: examples, ("a", "b"))
    return ExampleData(config, LabelledTexts(), source)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_an_epoch_holds_each_example_once_and_the_next_another_order():
    iterator = data().train_batches(TOKENIZER)
    first, second = take(iterator, 150), take(iterator, 150)
    for epoch in (first, second):
        assert sorted(label for batch in epoch for label in batch.labels) == list(range(600))
    assert [b.labels.tolist() for b in first] != [b.labels.tolist() for b in second]


def test_a_row_is_end_of_text_and_the_text_and_padding():
    for batch in take(data().train_batches(TOKENIZER), 20):
        for tokens, segments, label, weight in zip(*batch[:2], batch.labels, batch.weights, strict=True):
            text = EXAMPLES[label].text.encode()
            assert tokens[: len(text) + 1].tolist() == [256, *text]
            assert segments.tolist() == [1] * (len(text) + 1) + [0] * (len(tokens) - len(text) - 1)
            assert not tokens[len(text) + 1 :].any()
            assert weight == 1


def test_examples_of_a_batch_are_of_similar_length_and_batches_come_in_no_order_of_length():
    batches = take(data().train_batches(TOKENIZER), 64)
    assert {batch.inputs.shape[1] for batch in batches} == {8, 16, 32}
    spread = [np.ptp(batch.segment_ids.sum(axis=1)) for batch in batches]
    assert np.mean(spread) < 2
    longest = [batch.segment_ids.sum(axis=1).max() for batch in batches]
    assert longest != sorted(longest)


def test_rows_do_not_depend_on_how_many_processes_read():
    whole = take(data().train_batches(TOKENIZER), 5)
    halves = [take(data().train_batches(TOKENIZER, process_index=i, process_count=2), 5) for i in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for field, *own in zip(batch, *parts, strict=True):
            np.testing.assert_array_equal(field, np.concatenate(own))


@pytest.mark.parametrize("at", [0, 1, 63, 64, 150, 163])
def test_state_restores_exactly(at):
    iterator = data().train_batches(TOKENIZER)
    take(iterator, at)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 70)
    fresh = data().train_batches(TOKENIZER)
    take(fresh, 7)
    fresh.set_state(state)
    assert_same(take(fresh, 70), expected)


def test_the_seed_decides_the_order():
    other = dataclasses.replace(CONFIG, shuffle_seed=4)
    first, second = (take(data(config).train_batches(TOKENIZER), 1)[0].labels.tolist() for config in (CONFIG, other))
    assert first != second


def test_another_corpus_is_refused():
    with pytest.raises(UserError, match="must continue with the examples it began with"):
        data().train_batches(TOKENIZER).set_state({"step": 3, "corpus": "another"})


def test_too_few_examples_are_refused():
    with pytest.raises(UserError, match=r"toy has 3 examples and data\.batch_size is 4"):
        data(examples=EXAMPLES[:3]).train_batches(TOKENIZER)


@pytest.mark.parametrize("count", [1, 4, 7, 300])
def test_evaluation_covers_a_split_once(count):
    batches = list(data(examples=EXAMPLES[:count]).evaluation_batches(TOKENIZER, "test"))
    weights = np.concatenate([batch.weights for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    assert sorted(labels[weights > 0]) == list(range(count))
    assert len(weights) == -(-count // 4) * 4
    filler = np.concatenate([batch.segment_ids.any(axis=1) for batch in batches])
    np.testing.assert_array_equal(filler, weights > 0)


def test_processes_share_an_evaluation():
    encoded = [LabelledTexts().encode(example, TOKENIZER, CONFIG) for example in EXAMPLES[:9]]
    arguments = (CONFIG, LabelledTexts(), lambda: encoded)
    whole = list(ExampleEvaluationBatches(*arguments, range(4)))
    halves = [list(ExampleEvaluationBatches(*arguments, rows)) for rows in (range(2), range(2, 4))]
    for batch, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(batch.inputs, np.concatenate([part.inputs for part in parts]))


@pytest.mark.parametrize(("truncate", "kept"), [("head", "abcdefg"), ("tail", "defghij"), ("head_tail", "abcdhij")])
def test_long_texts_are_cut(truncate, kept):
    config = DataConfig(sequence_length=8, truncate=truncate)
    tokens, label = LabelledTexts().encode(LabelledText("abcdefghij", 5), TOKENIZER, config)
    assert TOKENIZER.decode(tokens[1:]) == kept
    assert (tokens[0], label) == (256, 5)
    assert TOKENIZER.decode(LabelledTexts().encode(LabelledText("abcdefg", 0), TOKENIZER, config)[0]) == "abcdefg"


def test_what_is_cut_is_counted():
    pairs = [TextPair("a" * 7, "b" * 8), TextPair("a" * 8, "b" * 9), TextPair("", "b")]
    texts = [LabelledText(pair.source, 0) for pair in pairs]
    config = DataConfig(sequence_length=8)
    for form, examples, cut in ((Pairs(), pairs, {"sources": 1, "targets": 2}), (LabelledTexts(), texts, {"texts": 1})):
        assert form.count_cut([form.tokens(example, TOKENIZER) for example in examples], TOKENIZER, config) == cut
    for example, fits in zip(texts, (True, False, True), strict=True):  # as the rows themselves have it
        tokens, _ = LabelledTexts().encode(example, TOKENIZER, config)
        assert (tokens[1:].tolist() == TOKENIZER.encode(example.text).tolist()) == fits


def test_an_empty_text_is_its_end():
    form = LabelledTexts()
    batch = form.collate([form.encode(LabelledText("", 1), TOKENIZER, CONFIG)], 2, 8)
    assert batch.inputs[0].tolist() == [256] + [0] * 7
    assert batch.segment_ids.sum() == 1


def test_pairs_are_shifted_and_ended():
    form, config = Pairs(), DataConfig(sequence_length=6)
    pairs = [TextPair("ab", "xyz"), TextPair("", ""), TextPair("abcdefgh", "uvwxyzuvw")]
    encoded = [form.encode(pair, TOKENIZER, config) for pair in pairs]
    assert [form.length(example) for example in encoded] == [4, 1, 6]
    batch = form.collate(encoded, 4, 6)
    a, x, u = ord("a"), ord("x"), ord("u")
    assert batch.source[0].tolist() == [a, a + 1, 256, 0, 0, 0]
    assert batch.inputs[0].tolist() == [256, x, x + 1, x + 2, 0, 0]
    assert batch.targets[0].tolist() == [x, x + 1, x + 2, 256, 0, 0]
    assert batch.weights.tolist()[:2] == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.source[2].tolist() == [a, a + 1, a + 2, a + 3, a + 4, 256]
    assert batch.targets[2].tolist() == [u, u + 1, u + 2, u + 3, u + 4, 256]
    np.testing.assert_array_equal(batch.segment_ids, batch.weights)
    assert not any(field[3].any() for field in batch)


def test_sources_may_have_a_vocabulary_of_their_own(tmp_path):
    examples = [TextPair("one two one", "eins zwei"), TextPair("two", "zwei drei vier")] * 4
    source = ExampleSource("toy", "f", {"train": 0}, "", lambda split: examples, ())
    config = DataConfig(sequence_length=8, batch_size=2, tokenizer=Words(), share_vocabulary=False)
    pairs = ExampleData(config, Pairs(), source)
    tokenizer = pairs.make_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.source.vocab_size) == (6, 4)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path, Words())
    batches = [next(pairs.train_batches(each)) for each in (tokenizer, loaded)]
    assert_same([batches[0]], [batches[1]])
    assert batches[0].source.max() < 4 <= batches[0].targets.max()
    shared = ExampleData(dataclasses.replace(config, share_vocabulary=True), Pairs(), source).make_tokenizer()
    assert shared.vocab_size == 2 + 6


def test_buckets():
    assert buckets(CONFIG) == (8, 16, 32)
    assert buckets(DataConfig(sequence_length=3)) == (1, 2, 3)
    assert buckets(DataConfig(sequence_length=32, buckets=(5, 32))) == (5, 32)
    for wrong in ((5,), (32, 5), (0, 32), (5, 5, 32), (5, 33)):
        with pytest.raises(UserError, match="must rise to sequence_length=32"):
            DataConfig(sequence_length=32, buckets=wrong)
