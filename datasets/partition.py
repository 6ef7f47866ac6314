"""Splits and folds without leakage: stratified by class, a group (patient, donor, source volume) never in two of them.

Of several labels the shares of each and of pairs of them are kept at once, by the squared distance to the wanted ones:
as near as by iterative stratification (Sechidis et al., 2011), and nearer for groups and for pairs (whose shares are
Szymanski and Kajdanowicz', 2017). Label maps are stratified by the classes that they have.
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
_PAIRS_WEIGHT, _MAX_PAIRS, _MAX_NUMBERS = 1 / 3, 300, 40_000_000
"""All pairs of classes together weigh this part of what all classes do; the most frequent ones are looked at, fewer
where groups are so many that the table of both would grow beyond this."""
_PASSES, _ROUNDING = 5, 1e-12
_FEW = 20_000_000
"""Numbers that are looked at where each group is compared with all others: less than a second."""


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
    share of each class, of pairs of classes and of all samples; then they move, or change places, while that brings it
    down. Each split with a fraction above 0 gets at least one group.

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
    assigned = np.full(len(names), UNSET)
    np.maximum.at(assigned, member, fixed)
    if (assigned == UNSET).any():
        sizes = np.bincount(member)
        draw = philox_bits((seed, 0), (0, 0, 0, 0), len(assigned))
        free = np.flatnonzero(assigned == UNSET)
        order = free[np.lexsort((draw[free], -sizes[free]))]
        shares, weights = _share_by_group(np.asarray(labels), member, len(names))
        gaps = np.stack([shares[assigned == part].sum(axis=0) for part in range(len(wanted))]) - wanted[:, None]
        _fill(assigned, order, shares, weights, gaps, wanted, parts)
        _improve(assigned, order, shares, weights, gaps, wanted)
        if len(order) ** 2 * len(weights) <= _FEW:
            _exchange(assigned, order, shares, weights, gaps)
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


def _share_by_group(
    labels: NDArray[Any], member: NDArray[np.int64], num_groups: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(groups, columns) the part that each group has of all samples, of each class and of pairs, and their weights."""
    if labels.ndim == 1:
        names, labels = np.unique(labels, return_inverse=True)
        columns = [labels == number for number in range(len(names))]
        pairs: list[NDArray[Any]] = []
    else:
        columns = list(labels.T)
        pairs = [labels[:, one] * labels[:, other] for one, other in _common_pairs(labels, num_groups)]
    weights = [1.0] * (len(columns) + 1) + [_PAIRS_WEIGHT * len(columns) / max(len(pairs), 1)] * len(pairs)
    counts = [np.bincount(member, column, num_groups) for column in (*columns, np.ones(len(member)), *pairs)]
    return np.stack([count / max(count.sum(), 1.0) for count in counts], axis=1), np.array(weights)


def _common_pairs(labels: NDArray[Any], num_groups: int) -> list[tuple[int, int]]:
    """The classes that occur together most often, up to a number of pairs."""
    together = np.triu(labels.T.astype(np.float64) @ labels, 1)
    most = np.argsort(-together, axis=None, kind="stable")[: min(_MAX_PAIRS, _MAX_NUMBERS // num_groups)]
    found = [divmod(place, labels.shape[1]) for place in most.tolist()]
    return [pair for pair in found if together[pair]]


def _fill(
    assigned: NDArray[np.int64],
    order: NDArray[np.int64],
    shares: NDArray[np.float64],
    weights: NDArray[np.float64],
    gaps: NDArray[np.float64],
    wanted: NDArray[np.float64],
    parts: Sequence[str],
) -> None:
    """Assign the groups in order. gaps: (parts, columns) what each part has too much; brought up to date."""
    empty = [part for part in range(len(wanted)) if wanted[part] > 0 and not (assigned == part).any()]
    if len(order) < len(empty):
        raise ValueError(
            f"{len(order)} free group(s) cannot fill {' and '.join(parts[part] for part in empty)} without leaking: "
            f"add volumes, give fewer parts (--split 100/0/0, or fewer --folds), or a column with them"
        )
    open_parts = np.flatnonzero(wanted > 0)
    for done, group in enumerate(order):
        # with as many groups left as empty splits, only those may be chosen
        choices = empty if len(order) - done == len(empty) else open_parts
        share = shares[group]
        best = int(choices[int(np.argmin((2 * gaps[choices] + share) @ (weights * share)))])
        assigned[group] = best
        gaps[best] += share
        empty = [part for part in empty if part != best]


def _improve(
    assigned: NDArray[np.int64],
    order: NDArray[np.int64],
    shares: NDArray[np.float64],
    weights: NDArray[np.float64],
    gaps: NDArray[np.float64],
    wanted: NDArray[np.float64],
) -> None:
    """Move groups one at a time while the distance goes down; no part loses its last one."""
    sizes = np.bincount(assigned, minlength=len(wanted))
    for _ in range(_PASSES):
        before = assigned[order]
        for group in order:
            old, share = int(assigned[group]), shares[group]
            if sizes[old] == 1:
                continue
            gaps[old] -= share
            cost = np.where(wanted > 0, (2 * gaps + share) @ (weights * share), np.inf)
            new = int(np.argmin(cost))
            new = new if cost[new] < cost[old] - _ROUNDING else old
            gaps[new] += share
            sizes[old] -= 1
            sizes[new] += 1
            assigned[group] = new
        if np.array_equal(before, assigned[order]):
            return


def _exchange(
    assigned: NDArray[np.int64],
    order: NDArray[np.int64],
    shares: NDArray[np.float64],
    weights: NDArray[np.float64],
    gaps: NDArray[np.float64],
) -> None:
    """Let two groups of different parts change places while the distance goes down."""
    for _ in range(_PASSES):
        changed = False
        for group in order:
            old, parts = int(assigned[group]), assigned[order]
            more = shares[order] - shares[group]  # what this part gets, and the other loses
            cost = (2 * more * (gaps[old] - gaps[parts] + more)) @ weights
            cost[parts == old] = 0
            best = int(np.argmin(cost))
            if cost[best] < -_ROUNDING:
                gaps[old] += more[best]
                gaps[parts[best]] -= more[best]
                assigned[group], assigned[order[best]] = parts[best], old
                changed = True
        if not changed:
            return
