"""Sums over a split are exact in float64, in order, and refuse an empty split."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.evaluation.scores import sum_statistics
from transformer.evaluation.translation import translation_scores
from transformer.types import UserError


def test_adds_in_float64():
    values = [2.0**24, 1.0, 1.0, 1.0]  # in float32 the ones would be lost
    sums = sum_statistics(
        lambda scale, carry, x: (carry, {"a": scale * x, "b": -x}), jnp.float32(1), map(jnp.float32, values)
    )
    assert sums == {"a": 2.0**24 + 3, "b": -(2.0**24) - 3}


def test_every_batch_is_scored_once_with_the_parameters():
    seen = []

    def step(params, carry, batch):
        seen.append((params, carry, batch))
        return carry + batch, {"weight": np.float32(len(seen))}

    assert sum_statistics(step, "params", iter("xyz"), "w") == {"weight": 6.0}
    assert seen == [("params", "w", "x"), ("params", "wx", "y"), ("params", "wxy", "z")]


def test_few_results_are_waiting_however_large_the_split_is():
    waiting, most = set(), []

    class Result(np.lib.mixins.NDArrayOperatorsMixin):
        def __init__(self, number):
            self.number = number
            waiting.add(number)

        def __array__(self, dtype=None, copy=None):
            waiting.discard(self.number)
            return np.float64(self.number)

    def step(params, carry, batch):
        most.append(len(waiting))
        return carry, {"weight": Result(batch)}

    assert sum_statistics(step, (), range(1, 101)) == {"weight": 5050.0}
    assert max(most) < 20


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="at least one batch, got none"):
        sum_statistics(lambda params, carry, batch: (carry, {}), (), [])


def test_nan_is_an_error_that_says_where():
    def step(params, carry, batch):
        return carry, {"loss": np.float32(batch), "confusion": np.zeros((2, 2))}

    with pytest.raises(UserError, match="the loss of batch 2 of the test split is NaN"):
        sum_statistics(step, (), [1.0, np.nan, 2.0], split="test")


def test_targets_that_all_have_weight_0_are_refused():
    with pytest.raises(UserError, match="need a target that counts"):
        sum_statistics(lambda params, carry, batch: (carry, {"loss": 0.0, "weight": 0.0}), (), [1, 2])


def test_no_translation_has_no_bleu():
    with pytest.raises(UserError, match="at least one translation, got none"):
        translation_scores([], [])


def test_translations_are_scored_as_their_signatures_say():
    """Punctuation is a word of its own (13a), and chrF counts characters alone: numbers of sacrebleu's command."""
    said, meant = ["the cat sat on the mat.", "a dog runs!"], ["the cat sat on a mat.", "the dog runs!"]
    scores = translation_scores(said, meant)
    assert "tok:13a" in scores["bleu_signature"] and "nw:0" in scores["chrf_signature"]
    assert (scores["bleu"], scores["chrf"]) == (46.5, 69.43)
    assert translation_scores(meant, meant)["bleu"] == 100
