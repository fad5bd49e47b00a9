"""Hidden tokens: as many as asked for, 80/10/10, and the same ones whoever reads the row."""

import numpy as np
import pytest

from transformer.config import DataConfig
from transformer.data.datasets import open_data
from transformer.data.rows import empty_batch
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.objectives.masked_lm import MaskedLM
from transformer.tokenizer import mask_id

TOKENIZER = ByteTokenizer()


def row(config, *, length=2000, place=(0, 0), seed=0):
    batch = empty_batch(1, length)
    batch.inputs[0] = 7
    batch.inputs[0, ::50] = TOKENIZER.end_of_text
    batch.segment_ids[0, : length - 100] = 1
    before = batch.inputs[0].copy()
    config.changes(TOKENIZER, batch.inputs.shape[1], seed)["noise"](batch, 0, place)
    return before, batch


@pytest.mark.parametrize("scheme", ["bert", "plain"])
def test_share_and_scheme(scheme):
    before, batch = row(MaskedLM(mask_scheme=scheme))
    eligible = (np.arange(2000) < 1900) & (before != TOKENIZER.end_of_text)
    chosen = batch.weights[0] > 0
    assert chosen.sum() == round(0.15 * eligible.sum())
    assert not (chosen & ~eligible).any()
    np.testing.assert_array_equal(batch.targets[0], before)
    np.testing.assert_array_equal(batch.inputs[0][~chosen], before[~chosen])
    inputs = batch.inputs[0][chosen]
    shares = np.mean(inputs == mask_id(TOKENIZER)), np.mean(inputs == 7)
    np.testing.assert_allclose(shares, (0.8, 0.1) if scheme == "bert" else (1, 0), atol=0.06)
    assert inputs.max() == 257 == mask_id(TOKENIZER)


def test_place_and_seed_decide():
    config = MaskedLM()
    _, first = row(config, place=(3, 4))
    np.testing.assert_array_equal(row(config, place=(3, 4))[1].inputs, first.inputs)
    for other in (row(config, place=(4, 3)), row(config, place=(3, 5)), row(config, place=(3, 4), seed=1)):
        assert not np.array_equal(other[1].weights, first.weights)


def test_a_short_row_has_a_target_and_an_empty_one_none():
    assert row(MaskedLM(), length=103)[1].weights.sum() == 1
    assert row(MaskedLM(), length=101)[1].weights.sum() == 0


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{"word " * (i % 40 + 5)}{i}"}}\n' for i in range(200)))
    config = DataConfig(
        source=(str(tmp_path / "text.jsonl"),), data_dir=str(tmp_path), sequence_length=64, batch_size=4
    )
    return open_data(config, MaskedLM())


def test_rows_are_masked_alike_by_any_number_of_processes_and_after_a_restart(data):
    iterator = data.train_batches(TOKENIZER)
    batches = [next(iterator) for _ in range(6)]
    halves = [data.train_batches(TOKENIZER, process_index=i, process_count=2) for i in (0, 1)]
    for batch in batches:
        np.testing.assert_array_equal(batch.inputs, np.concatenate([next(half).inputs for half in halves]))
    for batch in batches:
        eligible = (batch.targets != TOKENIZER.end_of_text).sum(axis=1)
        np.testing.assert_array_equal(batch.weights.sum(axis=1), [round(0.15 * count) for count in eligible])
    fresh = data.train_batches(TOKENIZER)
    for _ in range(3):
        next(fresh)
    state = fresh.get_state()
    again = data.train_batches(TOKENIZER)
    again.set_state(state)
    np.testing.assert_array_equal(next(again).inputs, batches[3].inputs)


def test_evaluation_hides_the_same_tokens_each_time(data):
    batches = data.evaluation_batches(TOKENIZER, "validation")
    first, second = list(batches), list(batches)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
    assert sum(batch.weights.sum() for batch in first) > 0
    halves = [list(data.evaluation_batches(TOKENIZER, "validation", process_index=i, process_count=2)) for i in (0, 1)]
    for batch, *parts in zip(first, *halves, strict=True):
        np.testing.assert_array_equal(batch.inputs, np.concatenate([part.inputs for part in parts]))


class TwoTokens(ByteTokenizer):
    vocab_size, end_of_text = 2, 1


def test_a_random_token_is_one_of_the_tokenizers():
    """With few of them it shows: the mask is at no more positions than its share of 80 %."""
    batch = empty_batch(1, 40_000)
    batch.segment_ids[0] = 1
    MaskedLM(mask_rate=0.5).changes(TwoTokens(), 40_000, 0)["noise"](batch, 0, (0,))
    chosen = batch.weights[0] > 0
    shares = [np.mean(batch.inputs[0][chosen] == token) for token in range(3)]
    np.testing.assert_allclose(shares, [0.15, 0.05, 0.8], atol=0.012)
