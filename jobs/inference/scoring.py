"""Networks on the labelled samples of a volume file: the metrics of a split, alone, as an ensemble or out of fold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import Loader, open_volumes
from datasets.layout import VolumeFile
from datasets.partition import SPLITS
from hpc.errors import UserError
from hpc.experiment import Experiment
from jobs.check import open_data
from jobs.inference.facts import DataFacts
from jobs.inference.members import Manner, Member, answer_together
from jobs.tasks import make_task
from jobs.tasks.contract import Scores, Stored, Task
from jobs.tasks.counts import Counts, Kept

ALL = "all"
"""in place of a split: every sample of the file"""
_SURE = 1e-7
"""of a label: a probability is taken for no nearer to 0 or 1, where a logit has no end"""


@dataclass(frozen=True)
class Scored:
    """An evaluation, in the order of sample numbers."""

    scores: Scores
    stored: Stored
    volumes: VolumeFile
    notes: tuple[str, ...]
    """what a reader must know of how it was done"""
    ask: Callable[[int], Tensor]
    """sample number -> probabilities (K,) or (K, *spatial), by those who scored it"""

    @property
    def ids(self) -> list[str]:
        return [str(self.volumes.ids[sample]) for sample in self.stored.samples.tolist()]

    @property
    def groups(self) -> list[str]:
        return [str(self.volumes.groups[sample]) for sample in self.stored.samples.tolist()]

    @property
    def counting(self) -> tuple[Sequence[bool], Sequence[bool]] | None:
        """Of a segmentation: whether each class counts in the mean IoU, and in Dice."""
        found: Any = self.scores
        return (found.in_iou, found.in_dice) if found.task == "segmentation" else None


def score(members: Sequence[Member], split: str, manner: Manner, data: str | None = None) -> Scored:
    """The metrics of all samples of a split, each once.

    Several members are an ensemble; but on the validation of folds, which is another for each, a sample is scored by
    the members that have not seen it. data: another volume file. Raises UserError or ValueError, OSError.
    """
    folds = sorted({member.experiment.data.fold for member in members}, key=str)
    if data is None and len(folds) > 1 and split not in ("validation", "test"):
        raise UserError(f"--split {split}: each of the folds was trained on some of it; use validation or test")
    apart = data is None and len(folds) > 1 and split == "validation"
    teams = [[m for m in members if m.experiment.data.fold == fold] for fold in folds] if apart else [list(members)]
    parts = [_score_team(team, split, manner, data) for team in teams]
    order = np.concatenate([part.stored.samples for part in parts])
    if len(np.unique(order)) < len(order):
        raise UserError(f"{members[0].facts.file}: two folds have a validation sample in common; pack it again")
    notes = list(parts[0].notes)
    if len({m.experiment.train.loss.model_dump_json() for m in members}) > 1:
        notes.append(
            f"the loss, and the classes that count, are those of {members[0].run.name}; others have another loss"
        )
    if apart:
        notes.append(f"each sample by the runs of its fold, which have not seen it ({len(folds)} folds)")
        if len(folds) < (known := parts[0].volumes.num_folds):
            notes.append(f"{known - len(folds)} of {known} folds have no run here: their samples are left out")
    return _joined(parts, manner, tuple(notes))


def at_home(members: Sequence[Member], data: str | None) -> tuple[list[Member], str | None]:
    """Where `data` is the very file that all were trained on, wherever it lies now: members that know so, and None.

    Its training samples, and the folds, are theirs then, which those of another file are not. Raises as `score`.
    """
    if data is None:
        return list(members), None
    moved = [replace(member, experiment=_moved(member.experiment, data)) for member in members]
    own = all(_splits_of(member) == member.facts.fingerprint for member in moved)
    return (moved, None) if own else (list(members), data)


def _moved(experiment: Experiment, file: str) -> Experiment:
    return experiment.model_copy(update={"data": experiment.data.model_copy(update={"file": file})})


def _splits_of(member: Member) -> str | None:
    """The fingerprint of its file, its fold in it; None where the file has no such fold."""
    found = _training_data(member)
    return found.fingerprint if found else None


@dataclass(frozen=True)
class _Part:
    team: Sequence[Member]
    task: Task
    cells: np.ndarray
    stored: Stored
    volumes: VolumeFile
    notes: tuple[str, ...]


def _joined(parts: Sequence[_Part], manner: Manner, notes: tuple[str, ...]) -> Scored:
    """One evaluation of them all."""
    found = [part.stored for part in parts]
    order = np.argsort(np.concatenate([one.samples for one in found]), kind="stable")

    def column(name: str) -> np.ndarray:
        values: np.ndarray = np.concatenate([getattr(one, name) for one in found])[order]
        return values

    targets, losses = None if found[0].targets is None else column("targets"), column("losses")
    stored = Stored(column("samples"), targets, column("rows"), losses)
    cells = np.sum([part.cells for part in parts], axis=0)
    scores = parts[0].task.scores(cells, float(losses.mean(dtype=np.float64)), len(stored), stored)
    volumes, teams = parts[0].volumes, {int(n): part.team for part in parts for n in part.stored.samples}

    def ask(sample: int) -> Tensor:
        data, factors = volumes.read(sample)[0], (volumes.scale[sample], volumes.offset[sample])
        scale, offset = (torch.from_numpy(values.copy()).reshape(-1, *[1] * (data.ndim - 1)) for values in factors)
        return answer_together(teams[sample], torch.from_numpy(data.astype(np.float32)) * scale + offset, manner)

    return Scored(scores, stored, volumes, notes, ask)


def _score_team(team: Sequence[Member], split: str, manner: Manner, data: str | None) -> _Part:
    volumes, notes = _open(team, data)
    splits = [name for name in (SPLITS if split == ALL else (split,)) if len(volumes.indices(name))]
    if not splits:
        full = [name for name in SPLITS if len(volumes.indices(name))]
        raise UserError(f"--split {split}: {volumes.name} has no such samples; it has {', '.join(full)}")
    windowed = in_windows(team, volumes, manner)
    device = torch.device("cpu") if windowed else team[0].device
    trained_on = _training_data(team[0])
    if trained_on is None:
        notes.append("the training data cannot be read: where the loss has balanced weights, they are of this file")
    task = make_task(team[0].experiment, volumes if trained_on is None else trained_on, device)
    counts, kept = Counts(task.cells, device), Kept(task)
    answers = _window_answers if windowed else _batch_answers
    with torch.inference_mode():
        for outputs, labels, samples in (one for name in splits for one in answers(team, volumes, name, manner)):
            losses = task.losses(outputs, labels)
            counts.add(task, outputs, labels, losses.mean())
            kept.add(samples, outputs, labels, losses)
    order, targets, rows, own = (column.numpy() for column in kept.columns())
    stored = Stored(order, None if task.name == "segmentation" else targets, rows, own)
    if windowed:
        notes.append(_tell_windows(team, volumes, manner))
        if wide := sum(manner.wider(volumes.sample_shape(int(sample))[1:]) for sample in order):
            notes.append(
                f"--window is larger than {wide} of {len(order)} samples: their edges are repeated around them"
            )
    return _Part(team, task, counts.cells.cpu().numpy(), stored, volumes, tuple(notes))


def _open(team: Sequence[Member], data: str | None) -> tuple[VolumeFile, list[str]]:
    """The file to score on. Raises UserError where it is not one of the members' kind."""
    if data is not None:
        volumes, facts = open_volumes(data), team[0].facts
        if fault := facts.unlike(DataFacts.of(volumes)):
            raise UserError(f"--data {data} has {fault} as the data that {team[0].run.name} was trained on")
        return volumes, []
    files = {member.experiment.data.file: member.run.name for member in team}
    if len(files) > 1:
        (one, first), (other, second), *_ = files.items()
        raise UserError(
            f"{first} was trained on {one} and {second} on {other}, of which each may hold what the other is scored "
            f"on: name a file that none of them has seen: --data FILE.h5"
        )
    if not Path(file := team[0].experiment.data.file).exists():
        raise UserError(
            f"{file}, which {team[0].run.name} was trained on, is gone: say where it lies now, or name another file "
            f"packed alike, by --data FILE.h5"
        )
    return open_data(team[0].experiment), []


def _training_data(member: Member) -> VolumeFile | None:
    """Where the weights of the loss come from, while it is there."""
    try:
        return open_data(member.experiment)
    except (OSError, ValueError, UserError):
        return None


def in_windows(team: Sequence[Member], volumes: VolumeFile, manner: Manner) -> bool:
    """Whether samples are looked at one by one, in parts; else in batches, as the training validates."""
    maps = volumes.task == "segmentation"
    if manner.windows or (manner.window is not None and not maps):
        return True
    if maps:
        return volumes.ragged or any(m.windows(manner, volumes.shape[1:]).size != volumes.shape[1:] for m in team)
    return len({tuple(member.experiment.data.patch or ()) for member in team}) > 1


def _tell_windows(team: Sequence[Member], volumes: VolumeFile, manner: Manner) -> str:
    some = volumes.sample_shape(0)[1:]
    sizes = {member.windows(manner, some).size for member in team}
    told = " and ".join("x".join(map(str, size)) for size in sorted(sizes))
    if manner.windows:
        return f"mean over windows of {told}, overlap {manner.overlap:g}"
    if volumes.task == "segmentation":
        return f"whole volumes in windows of {told}, overlap {manner.overlap:g}"
    return f"windows of {told} about the centre"


Answers = Iterator[tuple[Tensor, Tensor, Tensor]]
"""logits (B, K, ...), targets, sample numbers (B,)"""


def _window_answers(team: Sequence[Member], volumes: VolumeFile, split: str, manner: Manner) -> Answers:
    """Whole samples one by one, all on the CPU."""
    threads = team[0].experiment.data.threads
    with Loader(volumes, split, 1, shuffle=False, dtype=torch.float32, threads=threads, verify=1.0) as loader:
        for one in loader:
            told = answer_together(team, one.inputs[0], manner)
            yield as_logits(volumes.task, told[None]), one.targets, one.samples


def _batch_answers(team: Sequence[Member], volumes: VolumeFile, split: str, manner: Manner) -> Answers:
    """Batches on the device: whole samples, or the boxes about their centres."""
    data, predictors = team[0].experiment.data, [member.predictor(manner) for member in team]
    maps, alone = volumes.task == "segmentation", len(team) == 1 and not manner.flips
    options: dict[str, Any] = {"threads": data.threads, "device": team[0].device, "dtype": torch.float32, "verify": 1.0}
    patch = None if maps else data.patch
    size = 1 if volumes.ragged and patch is None else manner.batch or data.batch_size
    with Loader(volumes, split, size, patch=patch, shuffle=False, **options) as loader:
        for one in loader:
            if alone:
                outputs = team[0].logits(one.inputs)
            else:
                told = torch.stack([predict(one.inputs) for predict in predictors]).mean(0)
                outputs = as_logits(volumes.task, told)
            yield outputs, one.targets, one.samples


def as_logits(task: str, probabilities: Tensor) -> Tensor:
    """What softmax, or of several labels the sigmoid, brings back to these probabilities; float32."""
    if task == "multilabel":
        inner = probabilities.double().clamp(_SURE, 1 - _SURE)
        return torch.logit(inner).float()
    return probabilities.float().clamp(min=torch.finfo(torch.float32).tiny).log()
