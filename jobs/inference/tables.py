"""Tables of what was predicted, a line for each sample, as CSV that spreadsheets and pandas read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

import numpy as np

from jobs.inference.scoring import Scored

BETWEEN = "|"
"""between several classes in one cell, as `hpc pack --separator '|'` reads them"""


def as_csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return buffer.getvalue().encode()


def number(value: float) -> str:
    """So many digits that a float32 comes back exactly; empty where there is none."""
    return "" if np.isnan(value) else f"{value:.9g}"


def named(task: str, names: Sequence[str], probabilities: Sequence[float]) -> str:
    """What is called: the likeliest class, or all labels whose probability is above a half."""
    if task == "multilabel":
        return BETWEEN.join(name for name, value in zip(names, probabilities, strict=True) if value > 0.5)
    return names[int(np.argmax(probabilities))]


def probability_head(names: Sequence[str]) -> list[str]:
    return ["id", "predicted", *(f"p_{name}" for name in names)]


def scored_table(found: Scored) -> bytes:
    """id, group, target, predicted, loss and probabilities; of a segmentation id, group, loss, mean and each Dice."""
    names, stored = found.volumes.class_names, found.stored
    who = list(zip(found.ids, found.groups, strict=True))
    if found.counting is not None:
        head = ["id", "group", "loss", "dice", *(f"dice_{name}" for name in names)]
        dice = dice_of_samples(stored.rows)
        counted = dice[:, list(found.counting[1])]
        known = ~np.isnan(counted)
        means = np.where(known, counted, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
        lines = zip(who, stored.losses, means, dice, strict=True)
        return as_csv(head, ([*pair, *map(number, (loss, mean, *own))] for pair, loss, mean, own in lines))
    assert stored.targets is not None
    truths = stored.targets
    if found.volumes.task == "classification":
        truths = truths[:, None] == np.arange(len(names))
    head = ["id", "group", "target", "predicted", "loss", *probability_head(names)[2:]]
    table = zip(who, truths, stored.rows, stored.losses, strict=True)
    return as_csv(
        head,
        (
            [
                *pair,
                BETWEEN.join(name for name, there in zip(names, truth, strict=True) if there),
                named(found.volumes.task, names, row),
                number(loss),
                *map(number, row),
            ]
            for pair, truth, row, loss in table
        ),
    )


def dice_of_samples(rows: np.ndarray) -> np.ndarray:
    """(N, 3 K) voxels right, predicted and true -> (N, K), NaN where a class is neither there nor predicted."""
    hits, called, truth = np.split(rows, 3, axis=1)
    both = called + truth
    dice: np.ndarray = np.divide(2 * hits, both, out=np.full(both.shape, np.nan), where=both > 0)
    return dice


def scored_arrays(found: Scored) -> bytes:
    """The same for programs, as .npz: ids, groups, targets, scores (N, R), losses, class_names."""
    stored, buffer = found.stored, io.BytesIO()
    arrays = {"ids": np.array(found.ids), "groups": np.array(found.groups), "scores": stored.rows}
    arrays |= {"losses": stored.losses, "class_names": np.array(found.volumes.class_names)}
    if stored.targets is not None:
        arrays["targets"] = stored.targets
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
