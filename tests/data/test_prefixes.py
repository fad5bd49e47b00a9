"""Prefixes: the prompt where there is one, else a random part, the same one whoever reads the row."""

import numpy as np
import pytest

from transformer.config import Config
from transformer.data.datasets import open_data
from transformer.data.rows import empty_batch
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.objective import OBJECTIVES
from transformer.objectives.prefix_lm import PrefixLM, random_prefixes
from transformer.types import UserError

BYTES = ByteTokenizer()
OBJECTIVE = PrefixLM()


def row(*lengths, prompts=(), place=(0, 0), seed=0, length=40):
    """The number of leading targets of each segment that do not count."""
    batch, column = empty_batch(1, length), 0
    for index, size in enumerate(lengths):
        batch.segment_ids[0, column : column + size] = index + 1
        batch.weights[0, column : column + size] = 1
        if index in prompts:
            batch.weights[0, column : column + 3] = 0
        column += size
    random_prefixes(seed)(batch, 0, place)
    counts = []
    for segment in range(1, len(lengths) + 1):
        weights = batch.weights[0][batch.segment_ids[0] == segment]
        counts.append(int(np.argmax(weights > 0)))
        assert weights[counts[-1] :].all()
    return counts


FROZEN = [12, 7, 0]


def test_draws_are_frozen():
    assert row(20, 10, 1, place=(3, 4), seed=5) == FROZEN
    assert row(20, 10, 1, place=(3, 4), seed=5, length=31) == FROZEN


def test_a_prompt_is_the_prefix_and_each_segment_draws_for_itself():
    assert row(20, 10, 1, place=(3, 4), seed=5, prompts=(0,)) == [3, *FROZEN[1:]]
    assert row(20, 10, 1, place=(3, 4), seed=5, prompts=(1,)) == [FROZEN[0], 3, 0]


def test_every_length_but_the_whole_is_drawn_alike():
    draws = np.array([row(10, place=(0, place))[0] for place in range(2000)])
    counts = np.bincount(draws, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 150


def test_place_and_seed_decide():
    draws = [[row(40, place=place, seed=seed)[0] for place in ((1, 2), (2, 1), (1, 3))] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 3


@pytest.fixture
def data(make_config, write_jsonl):
    records = [
        {"text": f"text {i} " * (3 + i % 5), **({"prompt": f"<prompt {i}>"} if i % 2 else {})} for i in range(80)
    ]
    return open_data(make_config(write_jsonl(records), sequence_length=64, validation_fraction=0.2), OBJECTIVE)


def test_rows_are_the_same_for_any_number_of_processes_and_after_a_restart(data):
    iterator = data.train_batches(BYTES)
    batches = [next(iterator) for _ in range(6)]
    halves = [data.train_batches(BYTES, process_index=i, process_count=2) for i in (0, 1)]
    for batch in batches:
        np.testing.assert_array_equal(batch.weights, np.concatenate([next(half).weights for half in halves]))
    fresh = data.train_batches(BYTES)
    for _ in range(3):
        next(fresh)
    again = data.train_batches(BYTES)
    again.set_state(fresh.get_state())
    np.testing.assert_array_equal(next(again).weights, batches[3].weights)
    # Whole documents with a prompt: all of it, with the end of text before it, is the prefix.
    prompted = 0
    for batch in batches:
        for inputs, targets, weights, segments in zip(*batch[:4], strict=True):
            for segment in range(1, segments.max() + 1):
                at = segments == segment
                if not weights[at].any():  # the row ends with the prompt
                    continue
                if inputs[at][0] == BYTES.end_of_text and ord("<") in targets[at] and ord(">") in targets[at]:
                    assert np.flatnonzero(weights[at])[0] == targets[at].tolist().index(ord(">")) + 1
                    prompted += 1
    assert prompted > 5


def test_evaluation_is_the_same_each_time(data):
    batches = data.evaluation_batches(BYTES, "validation")
    for first, second in zip(list(batches), list(batches), strict=True):
        np.testing.assert_array_equal(first.weights, second.weights)
        assert (first.weights[first.segment_ids > 0] == 0).any()


@pytest.mark.parametrize("kind", ["masked_lm", "prefix_lm", "span_corruption"])
def test_windows_that_move_on_are_refused(make_config, kind):
    with pytest.raises(
        UserError, match=rf"data.stride is for the objective next_token, got 4 for the {kind} objective; leave"
    ):
        Config(data=make_config("folder", stride=4), objective=OBJECTIVES.find(kind)())
