"""Splits: no group in two of them, shares kept per class, the table's own column wins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.partition import check_groups, split_samples

GROUPED = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=80)


def names(numbers):
    return [f"g{number}" for number in numbers]


@settings(max_examples=80, deadline=None)
@given(GROUPED, st.integers(0, 2**32))
def test_a_group_is_never_in_two_splits_and_the_answer_never_changes(samples, seed):
    labels, groups = [label for label, _ in samples], names(group for _, group in samples)
    if len(set(groups)) < 3:
        with pytest.raises(ValueError, match="without leaking"):
            split_samples(labels, groups, seed=seed)
        return
    split = split_samples(labels, groups, seed=seed)
    check_groups(groups, split)
    assert set(split.tolist()) == {0, 1, 2}
    assert np.array_equal(split, split_samples(labels, groups, seed=seed))


def test_each_class_gets_its_share():
    labels = [0] * 200 + [1] * 100 + [2] * 20
    split = split_samples(labels, names(range(320)))
    for number, count in enumerate((200, 100, 20)):
        shares = np.bincount(split[np.asarray(labels) == number], minlength=3)
        assert np.abs(shares - count * np.array([0.7, 0.15, 0.15])).max() <= 1


def test_groups_of_many_sizes_still_come_near_the_shares():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 12, 60))
    labels = (groups % 3) ^ (rng.random(len(groups)) < 0.1)
    split = split_samples(labels, names(groups), (0.6, 0.2, 0.2), seed=3)
    for number in np.unique(labels):
        shares = np.bincount(split[labels == number], minlength=3) / (labels == number).sum()
        if (labels == number).sum() > 30:
            assert np.abs(shares - [0.6, 0.2, 0.2]).max() < 0.08


def test_multi_hot_labels_are_stratified_too():
    rng = np.random.default_rng(1)
    labels = (rng.random((400, 5)) < [0.5, 0.3, 0.2, 0.1, 0.05]).astype(np.uint8)
    split = split_samples(labels, names(range(400)))
    share = labels[split == 0].sum(axis=0) / labels.sum(axis=0)
    assert np.abs(share - 0.7).max() < 0.06


def test_the_seed_matters():
    labels, groups = [0, 1] * 50, names(range(100))
    assert not np.array_equal(split_samples(labels, groups, seed=0), split_samples(labels, groups, seed=1))


def test_given_splits_win_and_pull_their_group_along():
    groups = ["a", "a", "b", "c", "d"]
    split = split_samples([0] * 5, groups, given=[2, -1, -1, -1, -1])
    assert split[0] == split[1] == 2
    assert set(split.tolist()) == {0, 1, 2}


def test_a_split_of_zero_percent_stays_empty():
    split = split_samples([0, 1] * 10, names(range(20)), (0.8, 0.2, 0.0))
    assert np.bincount(split, minlength=3).tolist() == [16, 4, 0]


def test_everything_in_one_split_needs_one_group_only():
    assert split_samples([0, 1], ["one", "one"], (1.0, 0.0, 0.0)).tolist() == [0, 0]


@pytest.mark.parametrize("fractions", [(0.7, 0.2, 0.2), (1.2, -0.1, -0.1), (0.5, 0.5)])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="add up to 100"):
        split_samples([0, 1, 2], names(range(3)), fractions)


def test_a_group_fixed_in_two_splits_is_refused_by_name():
    with pytest.raises(ValueError, match="'p7' is in train and test"):
        split_samples([0, 0, 0], ["p7", "p7", "x"], given=[0, 2, -1])
