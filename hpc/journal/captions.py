"""What each figure of a run shows, in the order of the report; jobs/figures draws them under these names."""

from __future__ import annotations

CAPTIONS = {
    "curves": "Metrics of both splits by epoch; the star marks the best epoch, dots what the commonest class gives",
    "batch_loss": "Loss of each training step, and its running mean",
    "confusion_matrix": "Confusion matrix: counts; colour by their square root",
    "confusion_matrix_normalised": "Confusion matrix: shares of the true class; colour by their square root",
    "label_matrices": "What was there and what was found, label by label; colour: share of the row",
    "per_class": "Classes, the most difficult first",
    "dice_by_sample": "Dice of each sample by class, the lowest median first",
    "roc": "ROC of each class against the rest, and their mean",
    "precision_recall": "Precision and recall of each class against the rest, and their mean",
    "calibration": "Reliability: how often what was said with a confidence came true",
    "predictions": "Predictions, samples evenly spaced over the classes",
    "worst_samples": "The samples of the largest loss",
}
_SPLITS = ("train", "validation", "test")


def caption(name: str) -> str:
    """Of a figure's name, which may end in a split and how it was asked: `roc_test`, `roc_test+flips-0`."""
    known, split = _parts(name)
    if known not in CAPTIONS:
        return name
    return CAPTIONS[known] + (f" ({split})" if split else "")


def place(name: str) -> tuple[int, int, str]:
    """Sorts names: this run's own figures, those of splits, of splits asked otherwise, then others by name."""
    known, split = _parts(name)
    if known not in CAPTIONS:
        return (len(_SPLITS) + 2, 0, name)
    rank = 1 + _SPLITS.index(split.partition("+")[0]) if split else 0
    return (rank if "+" not in split else len(_SPLITS) + 1, [*CAPTIONS].index(known), name)


def _parts(name: str) -> tuple[str, str]:
    known, _, split = name.rpartition("_")
    return (known, split) if split.partition("+")[0] in _SPLITS else (name, "")
