"""New files through trained networks: prepared as the training data were, and back onto their own grids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import exporting
from datasets.packing.replay import Replay, Sample
from datasets.sources import NotASource, Source, UnusableSource
from hpc.errors import UserError
from hpc.rundir import write_bytes
from jobs.inference.centres import Centres, answer_at
from jobs.inference.members import Manner, Member, answer_together

_AHEAD = 2
"""files that are read before they are asked for"""


@dataclass(frozen=True)
class Answer:
    """Of one file: class probabilities (K,), at several places (N, K), or on its sample's grid (K, *spatial)."""

    source: Source
    sample: Sample
    probabilities: np.ndarray


class Predictor:
    """Networks that answer together, and the files they are asked about. Raises UserError where they cannot."""

    def __init__(self, members: Sequence[Member], manner: Manner, centres: Centres | None = None) -> None:
        self.members, self.manner, facts = list(members), manner, members[0].facts
        self.centres = centres
        self.facts = facts
        self.maps = facts.task == "segmentation"
        try:
            self.replay = Replay.of(facts.packing, facts.channels, facts.spatial_axes)
        except ValueError as error:
            raise UserError(f"{members[0].run.name}: {error}") from None
        if centres is not None:
            self._check_centres()
        elif self.replay.patch is not None and not manner.windows:
            size = ",".join(map(str, self.replay.patch))
            raise UserError(
                f"{members[0].run.name} was trained on parts of {size} voxels, each with the class of its place "
                f"('hpc pack --patch'), and a whole file has no one place: name places by --centres TABLE.csv (columns "
                f"id, x, y, z in mm), or add --windows for the mean over all parts"
            )

    def _check_centres(self) -> None:
        name = self.members[0].run.name
        if self.maps or self.facts.spatial_axes != 3:
            raise UserError(f"--centres asks a classifier of volumes for the class at places, and {name} is none")
        if self.manner.windows or self.manner.window:
            raise UserError("--centres looks at patches of the training's size: leave out --windows and --window")
        for member in self.members:
            if self.replay.patch is None and member.experiment.data.patch is None:
                raise UserError(f"--centres is for networks of patches, and {member.run.name} saw whole volumes")

    def answers(self, found: Sequence[Source]) -> Iterator[Answer | tuple[Source, str]]:
        """Of each file its answer, or the reason why there is none, in their order."""
        waiting: list[tuple[Source, Sample]] = []
        for source, sample in self._read(found):
            if isinstance(sample, str):
                yield from self._together(waiting)
                waiting = []
                yield source, sample
                continue
            if waiting and (self._alone or sample.data.shape != waiting[0][1].data.shape):
                yield from self._together(waiting)
                waiting = []
            waiting.append((source, sample))
            if self._alone or len(waiting) >= self._batch:
                yield from self._together(waiting)
                waiting = []
        yield from self._together(waiting)

    @property
    def _alone(self) -> bool:
        """Whether files go through one by one, in windows."""
        return self.maps or self.manner.windows or self.centres is not None

    @property
    def _batch(self) -> int:
        return self.manner.batch or self.members[0].experiment.data.batch_size

    def _read(self, found: Sequence[Source]) -> Iterator[tuple[Source, Sample | str]]:
        """Samples, or reasons; the next files are read meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            pending: list[tuple[Source, Future[Sample]]] = []
            rest = iter(found)
            while True:
                while len(pending) < _AHEAD and (source := next(rest, None)) is not None:
                    pending.append((source, pool.submit(self.replay.read, source)))
                if not pending:
                    return
                source, future = pending.pop(0)
                try:
                    sample: Sample | str = future.result()
                except (UnusableSource, NotASource) as error:
                    sample = str(error)
                yield source, sample

    def _together(self, some: list[tuple[Source, Sample]]) -> Iterator[Answer | tuple[Source, str]]:
        """One forward pass; where it fails, each file by itself tells the reason."""
        try:
            told = self._ask([sample for _, sample in some]) if self.centres is None else self._at_places(some)
        except UserError as error:
            if len(some) == 1:
                yield some[0][0], str(error)
            else:
                for one in some:
                    yield from self._together([one])
            return
        for (source, sample), values in zip(some, told, strict=True):
            if np.isfinite(values if self.centres is None else values[~np.isnan(values).all(1)]).all():
                yield Answer(source, sample, values)
            else:
                yield source, "the network's answer is not finite"

    def _ask(self, samples: list[Sample]) -> list[np.ndarray]:
        if not samples:
            return []
        inputs = [torch.from_numpy(sample.normalised()) for sample in samples]
        if self._alone:
            return [answer_together(self.members, one, self.manner).numpy() for one in inputs]
        total: Tensor | None = None
        for member in self.members:
            views = torch.stack([member.view(one, self.manner) for one in inputs])
            said = member.predictor(self.manner)(views.to(member.device)).cpu()
            total = said if total is None else total + said
        assert total is not None
        return list((total / len(self.members)).numpy())

    def _at_places(self, some: list[tuple[Source, Sample]]) -> list[np.ndarray]:
        assert self.centres is not None
        told = []
        for source, sample in some:
            if (places := self.centres.of(source.id)) is None:
                raise UserError(f"{self.centres.table} has no place of {source.id!r}")
            volume = torch.from_numpy(sample.normalised())
            told.append(answer_at(self.members, volume, sample.affine, places, self.manner, self._batch))
            if np.isnan(told[-1]).all():
                raise UserError(f"of {len(places)} places none has its whole patch in it; are they in mm of its world?")
        return told

    # What is left of an answer.

    def outputs(self, folder: Path, source: Source, probabilities: bool) -> list[Path]:
        """The label map of a source, and with `probabilities` the file of those; none of a classification."""
        if not self.maps:
            return []
        label, values = exporting.suffixes_of(source, self.facts.spatial_axes == 2)
        return [folder / f"{source.id}{label}", folder / f"{source.id}_probabilities{values}"][: 1 + probabilities]

    def save_map(self, folder: Path, answer: Answer, probabilities: bool) -> dict[str, Any]:
        """Write the label map, and with `probabilities` those; what the tables say of it. Raises OSError."""
        place, source, affine = answer.sample.place, answer.source, answer.sample.source_affine
        labels, outside = place.labels(answer.probabilities)
        files = self.outputs(folder, source, probabilities)
        if probabilities:
            back = np.stack([place.undo(one, float(number == 0)) for number, one in enumerate(answer.probabilities)])
            write_bytes(files[1], exporting.probability_file(source, back, affine))
        write_bytes(files[0], exporting.label_file(source, labels, affine))
        counts = np.bincount(labels.reshape(-1), minlength=len(self.facts.class_names))
        return {
            "files": [str(one.relative_to(folder)) for one in files],
            "voxels": counts.tolist(),
            "voxel_mm3": self._voxel(source, affine),
            "outside": outside,
        }

    def _voxel(self, source: Source, affine: np.ndarray) -> float | None:
        """mm3 of a voxel; None of images and of .npy, which say nothing of space."""
        if self.facts.spatial_axes == 2 or source.kind == "numpy":
            return None
        return abs(float(np.linalg.det(affine[:3, :3])))
