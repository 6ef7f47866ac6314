"""What a run remembers of its data file (data.json): enough to predict on new files when the data file is gone."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from typing import Any

from datasets import open_volumes
from datasets.layout import VolumeFile
from datasets.packing.recipe import Recipe
from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.rundir import RunDir, read_json, write_json

_LOG = logging.getLogger(__name__)
_OF_VOXELS = tuple(field.name for field in fields(Recipe) if field.name not in ("seed", "per_class", "dtype"))
"""packing options that decide what a network sees; numbers are normalised, whatever dtype they were stored in"""


@dataclass(frozen=True)
class DataFacts:
    """Of the samples that a run was trained on."""

    file: str
    fingerprint: str
    task: str
    class_names: tuple[str, ...]
    channels: int
    spatial_axes: int
    shape: tuple[int, ...] | None
    """(C, *spatial) of each sample; None: different ones"""
    packing: dict[str, Any]

    @classmethod
    def of(cls, volumes: VolumeFile) -> DataFacts:
        return cls(
            file=volumes.name,
            fingerprint=volumes.fingerprint,
            task=volumes.task,
            class_names=tuple(volumes.class_names),
            channels=volumes.channels,
            spatial_axes=volumes.spatial_axes,
            shape=None if volumes.ragged else tuple(volumes.shape),
            packing=dict(volumes.packing),
        )

    def unlike(self, other: DataFacts) -> str | None:
        """What keeps networks of both data from being one ensemble, or one from being scored on the other: a sentence.

        Where one file was not made by `hpc pack`, nothing is known of its voxels.
        """
        for name, mine, theirs in (
            ("task", self.task, other.task),
            ("classes", ", ".join(self.class_names), ", ".join(other.class_names)),
            ("channels", self.channels, other.channels),
            ("axes", self.spatial_axes, other.spatial_axes),
        ):
            if mine != theirs:
                return f"{name} {theirs}, not {mine}"
        for name in _OF_VOXELS:
            if name in self.packing and name in other.packing and self.packing[name] != other.packing[name]:
                return f"--{name.replace('_', '-')} {_spell(other.packing[name])}, not {_spell(self.packing[name])}"
        return None


def _spell(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def remember(run: RunDir, volumes: VolumeFile) -> None:
    """Write data.json, unless it says the same already. A full disk takes it, never the training."""
    facts = asdict(DataFacts.of(volumes))
    try:
        if not run.data.exists() or read_json(run.data) != _plain(facts):
            write_json(run.data, facts)
    except (OSError, UserError) as error:
        _LOG.warning("%s is not written: %s; the run needs its data file for predictions", run.data, error)


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def recall(run: RunDir, experiment: Experiment) -> DataFacts:
    """From data.json; of a run that has none from the data file. Raises UserError where that is gone, too."""
    told = read_json(run.data)
    if not told:
        try:
            return DataFacts.of(open_volumes(experiment.data.file))
        except (OSError, ValueError) as error:
            raise UserError(f"{run.name} has no {run.data.name}, and its data file cannot be read: {error}") from None
    try:
        lists = {name: tuple(told[name]) for name in ("class_names", "shape") if told[name] is not None}
        return DataFacts(**{**told, **lists})
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.data}: damaged ({error}); restore it from a copy, or remove it") from None
