"""Everything `hpc inspect` says of a volume file, as plain data: the tables' census and one pass over the voxels.

The keys are documented in docs/data.md, and stay.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.alarms import find_alarms
from datasets.census import balanced_weights, positive_weights, take_census
from datasets.layout import VolumeFile
from datasets.partition import SPLITS
from datasets.repeats import candidates, confirm, describe_equals, describe_near, near_pairs
from datasets.statistics import QUANTILES
from datasets.survey import LOOK_BYTES, Report, Survey, choose_samples

MOST_IDS = 10
"""ids that are listed of samples with a fault; all of damaged ones"""


def describe(
    volumes: VolumeFile, everything: bool = False, verify: bool = False, report: Report | None = None
) -> dict[str, Any]:
    """The facts, finite numbers and None only.

    everything: look at the voxels of all samples instead of a draw. verify: compare all checksums. Samples are read
    once for both. Raises OSError when a file cannot be opened; a sample that cannot be read is listed as damaged.
    """
    facts = take_census(volumes)
    looked = np.arange(len(volumes)) if everything else choose_samples(volumes)
    sets, doubtful = candidates(volumes, math.inf if everything or verify else LOOK_BYTES)
    survey = Survey(volumes, looked, doubtful)
    read = range(len(volumes)) if verify else sorted({*looked.tolist(), *doubtful})
    survey.run(read, report)
    equal = confirm(volumes, sets, survey.digests)
    facts |= {
        "looked_at": {"samples": len(looked), "bytes": survey.bytes_looked, "all": len(looked) == len(volumes)},
        "intensities": _intensities(survey),
        "voxels": _voxels(survey),
        "segmentation": _segmentation(survey) if volumes.task == "segmentation" else None,
        "duplicates": describe_equals(volumes, equal),
        "near_duplicates": describe_near(volumes, len(survey.prints), near_pairs(volumes, survey.prints, equal)),
        "checksums_compared": len(read),
        "damaged": [_fault(volumes, sample, reason) for sample, reason in sorted(survey.faults.items())],
    }
    facts |= {"weights": _weights(volumes, survey)}
    facts["warnings"] = [{"grave": grave, "text": text} for grave, text in find_alarms(facts)]
    plain: dict[str, Any] = _plain(facts)
    return plain


def _plain(value: Any) -> Any:
    """Without numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _intensities(survey: Survey) -> list[dict[str, Any]]:
    """Of each channel, over all voxels looked at."""
    seen = survey.intensities
    channels = []
    for number, (stored, normalised) in enumerate(zip(seen.stored, seen.normalised, strict=True)):
        low, high = seen.extremes(number)
        mean, deviation = seen.moments(number)
        channels.append(
            {
                "min": low,
                "max": high,
                "stored": _named(stored.quantiles()),
                "normalised": _named(normalised.quantiles()),
                "normalised_mean": mean,
                "normalised_std": deviation,
            }
        )
    return channels


def _named(quantiles: Sequence[float | None]) -> dict[str, float | None]:
    return {f"{100 * share:g}": value for share, value in zip(QUANTILES, quantiles, strict=True)}


def _voxels(survey: Survey) -> dict[str, Any]:
    seen = survey.intensities
    return {
        "nan": _having(survey, seen.nan.sum(axis=1)),
        "infinite": _having(survey, seen.infinite.sum(axis=1)),
        "constant": _having(survey, seen.constant().astype(np.int64)) | {"voxels": None},
        "foreground_share": seen.foreground_share(),
    }


def _having(survey: Survey, counts: NDArray[np.int64]) -> dict[str, Any]:
    """counts: of each sample looked at. Which samples have any."""
    which = survey.looked[counts > 0].tolist()
    return {
        "voxels": int(counts.sum()),
        "samples": len(which),
        "ids": [survey.volumes.ids[sample] for sample in which[:MOST_IDS]],
    }


def _segmentation(survey: Survey) -> dict[str, Any]:
    """Of each class the share of voxels and the samples that have it, per split of the samples looked at."""
    names, labels = survey.volumes.class_names, survey.labels
    totals = labels.voxels.sum(axis=1)
    classes = {
        name: {
            "share": {
                split: float(labels.voxels[code, number] / totals[code]) if totals[code] else None
                for code, split in enumerate(SPLITS)
            },
            "samples": {split: int(labels.samples[code, number]) for code, split in enumerate(SPLITS)},
        }
        for number, name in enumerate(names)
    }
    unnamed = np.flatnonzero(labels.voxels.sum(axis=0)[len(names) :]) + len(names)
    whole = int(totals.sum())
    return {
        "classes": classes,
        "foreground_share": 1 - int(labels.voxels[:, 0].sum()) / whole if whole else None,
        "background_only": labels.bare,
        "unnamed_values": unnamed.tolist(),
    }


def _weights(volumes: VolumeFile, survey: Survey) -> dict[str, Any]:
    """Suggested by the training split: `class_weights`, or of several labels `pos_weight`; None without one."""
    chosen = volumes.indices("train")
    if volumes.task == "multilabel":
        positive = volumes.targets[chosen].sum(axis=0, dtype=np.int64)
        return {"class_weights": None, "pos_weight": positive_weights(positive, len(chosen)) if len(chosen) else None}
    num = len(volumes.class_names)
    if volumes.task == "segmentation":
        counts = survey.labels.voxels[SPLITS.index("train"), :num]
    else:
        counts = np.bincount(volumes.targets[chosen], minlength=num)
    return {"class_weights": balanced_weights(counts.tolist()) if counts.any() else None, "pos_weight": None}


def _fault(volumes: VolumeFile, sample: int, reason: str) -> dict[str, Any]:
    shard, _ = volumes.locate(sample)
    return {"id": volumes.ids[sample], "sample": sample, "file": str(volumes.paths[shard]), "reason": reason}
