"""Splits: no group in two of them, shares kept per class, the table's own column wins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.partition import check_groups, fold_samples, split_samples

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


def iterative_stratification(labels, member, wanted, draw):
    """Sechidis, Tsoumakas, Vlahavas: On the stratification of multi-label data, ECML 2011, algorithm 1, over groups.

    Of the rarest label that is left, the group with most of it goes where most of it is lacking.
    """
    counts, sizes = (np.zeros((member.max() + 1, labels.shape[1])), np.bincount(member))
    np.add.at(counts, member, labels)
    need, whole = wanted[:, None] * counts.sum(axis=0), wanted * len(labels)
    out, left = np.full(len(counts), -1), np.ones(len(counts), bool)
    while left.any():
        remaining = counts[left].sum(axis=0)
        rarest = int(np.argmin(np.where(remaining > 0, remaining, np.inf))) if remaining.any() else None
        most = sizes if rarest is None else counts[:, rarest]
        chosen = np.flatnonzero(left & (most > 0))
        for group in chosen[np.lexsort((draw[chosen], -most[chosen]))]:
            first = np.zeros(len(wanted)) if rarest is None else need[:, rarest]
            part = int(np.lexsort((-whole, -first))[0])
            out[group], left[group] = part, False
            need[part] -= counts[group]
            whole[part] -= sizes[group]
    return out[member]


def deviations(labels, parts, wanted):
    """Mean deviation from the wanted shares, of labels, of pairs of them, and of the parts' sizes."""
    pairs = np.stack([labels[:, a] * labels[:, b] for a in range(labels.shape[1]) for b in range(a)], axis=1)
    found = []
    for columns in (labels, pairs[:, pairs.any(axis=0)], np.ones((len(labels), 1))):
        got = np.stack([columns[parts == part].sum(axis=0) for part in range(len(wanted))]) / columns.sum(axis=0)
        found.append(np.abs(got / wanted[:, None] - 1).mean())
    return found


@pytest.mark.parametrize("num_groups", [400, 90])
@pytest.mark.parametrize("wanted", [(0.7, 0.15, 0.15), (0.2,) * 5], ids=["splits", "folds"])
def test_several_labels_keep_their_shares_better_than_by_iterative_stratification(wanted, num_groups):
    shares, ours, theirs = np.array(wanted), [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        member = np.arange(400) if num_groups == 400 else np.unique(rng.integers(0, 90, 400), return_inverse=True)[1]
        common = rng.random(400)[member, None] * 0.6 + rng.random((400, 6)) * 0.6  # of groups, too
        labels = (common < [0.6, 0.5, 0.4, 0.3, 0.2, 0.15]).astype(np.uint8)
        groups = names(member)
        found = (
            split_samples(labels, groups, wanted, seed)
            if len(wanted) == 3
            else fold_samples(labels, groups, len(wanted), seed)
        )
        ours.append(deviations(labels, found, shares))
        theirs.append(deviations(labels, iterative_stratification(labels, member, shares, rng.random(400)), shares))
    mine, other = np.mean(ours, axis=0), np.mean(theirs, axis=0)
    assert (mine < [1.02 * other[0], 0.9 * other[1], other[2] + 0.002]).all() and mine[0] < 0.15


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


def test_a_part_keeps_its_last_group_and_its_given_ones():
    labels = np.eye(3, dtype=np.uint8)[np.arange(30) % 3]
    given = [2, 2, 1] + [-1] * 27
    groups = ["a", "b", "c"] + ["rest"] * 27
    assert split_samples(labels, groups, given=given).tolist() == [2, 2, 1] + [0] * 27
