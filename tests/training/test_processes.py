"""What processes tell each other."""

import pytest

from transformer.training.processes import largest_over_processes, merge, merged_over_processes


def test_alone_nothing_changes():
    assert [largest_over_processes(number) for number in (0, 15)] == [0, 15]
    state = {"step": 3}
    assert merged_over_processes(state) is state


def test_merge_is_a_deep_union():
    left = {"step": 3, "streams": {"0": {"a": 1}, "1": [2]}}
    right = {"step": 3, "streams": {"2": [4], "0": {"b": 2}}}
    assert merge(left, right) == {"step": 3, "streams": {"0": {"a": 1, "b": 2}, "1": [2], "2": [4]}}
    assert left == {"step": 3, "streams": {"0": {"a": 1}, "1": [2]}}


def test_processes_that_disagree_are_an_error():
    with pytest.raises(ValueError, match=r"must agree on 'step', got 3 and 4"):
        merge({"step": 3}, {"step": 4})
