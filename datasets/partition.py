"""Splits and folds without leakage: stratified by class, a group (patient, donor, source volume) never in two of them.

Of several labels all shares are kept at once, by the squared distance to the wanted ones: on drawn labels as near as
iterative stratification (Sechidis et al., 2011) comes for single samples, and nearer for groups.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from datasets.order import philox_bits

SPLITS = ("train", "validation", "test")
UNSET = -1
MAX_FOLDS = 100
HELD_OUT = 255
"""The fold of a test sample, which is in none."""


def split_samples(
    labels: ArrayLike,
    groups: Sequence[str],
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    given: ArrayLike | None = None,
) -> NDArray[np.uint8]:
    """Assign each sample a split: (N,) 0 train, 1 validation, 2 test. Deterministic in all arguments.

    labels: (N,) class numbers or (N, K) multi-hot. groups: (N,) names. given: (N,) splits that are fixed already, -1
    where free; a group follows its fixed members. The rest is greedy: groups from the largest to the smallest (equal
    ones in an order drawn from the seed) go to the split where they reduce most the squared distance to the wanted
    share of each class and of all samples. Each split with a fraction above 0 gets at least one group.

    Raises ValueError for bad fractions, a group fixed in two splits, or fewer groups than splits to fill.
    """
    return _assign(labels, groups, _check_fractions(fractions), SPLITS, seed, given)


def fold_samples(
    labels: ArrayLike, groups: Sequence[str], num_folds: int, seed: int = 0, given: ArrayLike | None = None
) -> NDArray[np.uint8]:
    """Assign each sample one of 2 to 100 folds of equal share for cross-validation: (N,) from 0 on.

    Stratified and grouped as in `split_samples`. given: (N,) folds that are fixed already, -1 where free.

    Raises ValueError for a number of folds out of range, a group fixed in two folds, or fewer groups than folds.
    """
    if not 2 <= num_folds <= MAX_FOLDS:
        raise ValueError(f"{num_folds} folds cannot be made; ask for 2 to {MAX_FOLDS}")
    folds = _assign(labels, groups, np.full(num_folds, 1 / num_folds), fold_names(num_folds), seed, given)
    if empty := sorted(set(range(num_folds)) - set(folds.tolist())):
        raise ValueError(
            f"fold {empty[0]} of {num_folds} is empty: folds are counted from 0; give it samples, or fewer --folds"
        )
    return folds


def fold_names(num_folds: int = HELD_OUT) -> list[str]:
    """What messages call the folds, and HELD_OUT after them."""
    return [*(f"fold {number}" for number in range(num_folds)), "test"]


def _assign(
    labels: ArrayLike,
    groups: Sequence[str],
    wanted: NDArray[np.float64],
    parts: Sequence[str],
    seed: int,
    given: ArrayLike | None,
) -> NDArray[np.uint8]:
    fixed = np.full(len(groups), UNSET) if given is None else np.asarray(given, dtype=np.int64)
    known = fixed != UNSET
    check_groups([group for group, there in zip(groups, known, strict=True) if there], fixed[known], parts)
    names, member = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    counts = _count_by_group(np.asarray(labels), member, len(names))
    assigned = np.full(len(names), UNSET)
    np.maximum.at(assigned, member, fixed)
    if (assigned == UNSET).any():
        _fill(assigned, counts, wanted, parts, seed)
    return assigned[member].astype(np.uint8)


def check_groups(groups: Sequence[str], split: ArrayLike, parts: Sequence[str] = SPLITS) -> None:
    """Refuse (ValueError) a group that lies in two splits: its samples would leak from training into the scores."""
    home: dict[str, int] = {}
    for group, number in zip(groups, np.asarray(split).tolist(), strict=True):
        if home.setdefault(group, number) != number:
            pair = f"{parts[home[group]]} and {parts[number]}"
            raise ValueError(f"group {group!r} is in {pair}: put all its samples into one, or leave their cells empty")


def _check_fractions(fractions: Sequence[float]) -> NDArray[np.float64]:
    wanted = np.asarray(fractions, dtype=np.float64)
    if wanted.shape != (3,) or (wanted < 0).any() or not np.isclose(wanted.sum(), 1.0):
        shown = "/".join(f"{100 * value:g}" for value in wanted.ravel())
        raise ValueError(f"split {shown} is not three shares that add up to 100; write for example 70/15/15")
    return wanted


def _count_by_group(labels: NDArray[Any], member: NDArray[np.int64], num_groups: int) -> NDArray[np.float64]:
    """(groups, classes + 1): samples of each class in each group, and in the last column all of them."""
    if labels.ndim == 1:
        _, labels = np.unique(labels, return_inverse=True)
        labels = np.eye(labels.max() + 1)[labels]
    counts = np.zeros((num_groups, labels.shape[1] + 1))
    np.add.at(counts, member, np.column_stack([labels, np.ones(len(labels))]))
    return counts


def _fill(
    assigned: NDArray[np.int64], counts: NDArray[Any], wanted: NDArray[np.float64], parts: Sequence[str], seed: int
) -> None:
    free = np.flatnonzero(assigned == UNSET)
    draw = philox_bits((seed, 0), (0, 0, 0, 0), len(assigned))
    order = free[np.lexsort((draw[free], -counts[free, -1]))]
    totals = np.maximum(counts.sum(axis=0), 1.0)
    have = np.stack([counts[assigned == split].sum(axis=0) for split in range(len(wanted))])
    empty = [split for split in range(len(wanted)) if wanted[split] > 0 and not (assigned == split).any()]
    if len(order) < len(empty):
        raise ValueError(
            f"{len(order)} free group(s) cannot fill {' and '.join(parts[part] for part in empty)} without leaking: "
            f"add volumes, give fewer parts (--split 100/0/0, or fewer --folds), or a column with them"
        )
    for done, group in enumerate(order):
        # with as many groups left as empty splits, only those may be chosen
        choices = empty if len(order) - done == len(empty) else np.flatnonzero(wanted > 0)
        gap = (have[choices] - wanted[choices, None] * totals) / totals
        step = counts[group] / totals
        best = int(choices[int(np.argmin(((gap + step) ** 2 - gap**2).sum(axis=1)))])
        assigned[group] = best
        have[best] += counts[group]
        empty = [split for split in empty if split != best]
