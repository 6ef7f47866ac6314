"""Trained networks that answer together: loaded from their runs' checkpoints, compared, and averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpc.errors import UserError, nearest
from hpc.experiment import Experiment, load
from hpc.rundir import RunDir, read_json
from jobs import checkpoint, choice
from jobs.inference.facts import DataFacts, recall
from jobs.inference.flips import check_axes, flipped
from jobs.inference.windows import Predict, Windows, centre, mean_over_windows, slide
from jobs.precision import Precision
from models3d import create_model, takes

_OVERLAP = 0.5
_WINDOWS = 4
"""in one forward pass"""


@dataclass(frozen=True)
class Manner:
    """How networks are asked. Axes as in the data: x, y, z or rows, columns."""

    flips: tuple[int, ...] = ()
    """spatial axes whose mirror images are asked, too"""
    window: tuple[int, ...] | None = None
    """voxels of sliding windows; None: the size that a network was trained on"""
    overlap: float = _OVERLAP
    batch: int = 0
    """windows, or whole samples, in one forward pass; 0: a few windows, samples as in training"""
    windows: bool = False
    """of a classification: the mean over windows of the volume, not the window about its centre alone"""

    def told(self) -> dict[str, Any]:
        """What decides the answers, as plain data."""
        window = self.window and list(self.window)
        return {"flips": list(self.flips), "window": window, "windows": self.windows, "overlap": self.overlap}

    def wider(self, shape: Sequence[int]) -> bool:
        """Whether a --window is longer than a volume of spatial `shape`, which is padded then."""
        return self.window is not None and any(n < size for n, size in zip(shape, self.window, strict=True))

    def words(self) -> list[str]:
        """What differs from the default, for names of files: flips-0-2, window-64x64x64, windows, overlap-0.25."""
        found = [f"flips-{'-'.join(map(str, self.flips))}"] if self.flips else []
        found += [f"window-{'x'.join(map(str, self.window))}"] if self.window else []
        found += ["windows"] if self.windows else []
        return found + ([f"overlap-{self.overlap:g}"] if self.overlap != _OVERLAP else [])


def find_checkpoint(run: RunDir, wanted: str) -> checkpoint.Checkpoint:
    """best, last, or a folder's name; its sums compared. Raises as checkpoint.verify, and UserError."""
    names = [path.name for path in checkpoint.newest_first(run.checkpoints)]
    if not names:
        raise UserError(f"{run.name} has no checkpoint yet; see 'hpc show {run.name}'")
    known = read_json(run.result) or read_json(run.state)
    best = known.get("best", {}).get("checkpoint")
    name = {"best": best or names[0], "last": names[0]}.get(wanted, wanted)
    if name not in names and wanted == "best":
        raise UserError(
            f"{run.name}: its best checkpoint {best} is gone; name another: --checkpoint last, or {names[0]}"
        )
    if name not in names:
        raise UserError(f"--checkpoint {wanted!r}: {nearest(name, ['best', 'last', *names])}")
    return checkpoint.verify(run.checkpoints / name)


@dataclass(frozen=True)
class Member:
    """One run's network on the device, in evaluation mode."""

    run: RunDir
    experiment: Experiment
    facts: DataFacts
    checkpoint: str
    model: nn.Module = field(repr=False)
    device: torch.device

    @property
    def trained_size(self) -> tuple[int, ...] | None:
        """Spatial shape of what it was trained on: its patches, or whole samples of one shape."""
        if self.experiment.data.patch is not None:
            return tuple(self.experiment.data.patch)
        return None if self.facts.shape is None else self.facts.shape[1:]

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, C, *spatial) on the device -> (B, K, ...) float32, in the precision of the training. Raises UserError."""
        name = self.experiment.model.name
        try:
            with torch.inference_mode(), Precision(self.experiment.train, self.device).autocast():
                outputs: Tensor = self.model(inputs).float()
        except torch.OutOfMemoryError:
            raise UserError(
                f"the memory of {self.device} is too small for model {name} on {tuple(inputs.shape)}: lower --batch"
            ) from None
        except RuntimeError as error:
            raise UserError(f"model {name} fails on an input {tuple(inputs.shape)}: {_first(error)}") from None
        maps = tuple(inputs.shape[2:]) if self.facts.task == "segmentation" else ()
        if tuple(outputs.shape) != (wanted := (len(inputs), len(self.facts.class_names), *maps)):
            shape, given = tuple(outputs.shape), tuple(inputs.shape)
            raise UserError(f"model {name} gives {shape} for an input {given}, not {wanted}")
        return outputs

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Softmax over the classes, or of several labels the sigmoid of each."""
        logits = self.logits(inputs)
        return logits.sigmoid() if self.facts.task == "multilabel" else logits.softmax(1)

    def predictor(self, manner: Manner) -> Predict:
        return flipped(self.probabilities, manner.flips, maps=self.facts.task == "segmentation")

    def windows(self, manner: Manner, shape: Sequence[int]) -> Windows:
        """For a volume of spatial `shape`: of the size it was trained on, unless another is asked for."""
        return Windows(manner.window or self.trained_size or tuple(shape), manner.overlap, manner.batch or _WINDOWS)

    def answer(self, volume: Tensor, manner: Manner) -> Tensor:
        """(C, *spatial) float32 on the CPU -> (K,), or (K, *spatial) of a segmentation, float32 on the CPU.

        Raises UserError where a volume of this shape is nothing for the network.
        """
        predict, windows = self.predictor(manner), self.windows(manner, volume.shape[1:])
        if self.facts.task == "segmentation":
            return slide(volume, predict, windows, self.device)
        if manner.windows:
            return mean_over_windows(volume, predict, windows, self.device)
        return predict(self.view(volume, manner)[None].to(self.device))[0].cpu()

    def view(self, volume: Tensor, manner: Manner) -> Tensor:
        """What of a volume a classifier looks at without windows: all of it, or the box about its centre."""
        size = manner.window or (tuple(self.experiment.data.patch) if self.experiment.data.patch else None)
        if size is not None:
            return centre(volume, size)
        if self.facts.shape is not None and tuple(volume.shape) != self.facts.shape:
            have, want = ("x".join(map(str, shape[1:])) for shape in (volume.shape, self.facts.shape))
            raise UserError(
                f"it is {have} when prepared as the training data, which are {want}: add --windows for the mean over "
                f"windows of that size"
            )
        return volume


def load_members(runs: Sequence[RunDir], wanted: str, device: torch.device) -> list[Member]:
    """The networks of these runs, `wanted` being best, last or a checkpoint's name.

    Raises UserError where they cannot answer together; as checkpoint.verify.
    """
    members: list[Member] = []
    for run in runs:
        experiment = choice.chosen(run, load(run.experiment)[0])
        facts = recall(run, experiment)
        if members and (fault := members[0].facts.unlike(facts)):
            raise UserError(
                f"{run.name} was trained on data with {fault} as in {runs[0].name}: predict with each alone"
            )
        found = find_checkpoint(run, wanted)
        model = build(experiment, facts)
        try:
            model.load_state_dict(found.model())
        except RuntimeError as error:
            raise UserError(
                f"{run.name}/{found.name} does not fit model {experiment.model.name}: {_first(error)}"
            ) from None
        members.append(Member(run, experiment, facts, found.name, model.to(device).eval(), device))
    return members


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def build(experiment: Experiment, facts: DataFacts) -> nn.Module:
    """The network of an experiment with fresh weights; nothing is fetched, as a checkpoint fills it."""
    name, options = experiment.model.name, experiment.model.options
    patch = experiment.data.patch
    size = tuple(patch) if patch else facts.shape[1:] if facts.shape else None
    known = takes(name)
    if "input_size" in known and size:
        options.setdefault("input_size", size)
    options.pop("pretrained", None)
    return create_model(name, in_channels=facts.channels, num_classes=len(facts.class_names), **options)


def answer_together(members: Sequence[Member], volume: Tensor, manner: Manner) -> Tensor:
    """The mean of what all say of a volume: (K,) or (K, *spatial)."""
    total = members[0].answer(volume, manner)
    for member in members[1:]:
        total += member.answer(volume, manner)
    return total / len(members) if len(members) > 1 else total


def check_manner(members: Sequence[Member], manner: Manner) -> None:
    """Raises UserError for what makes no sense for these networks."""
    facts = members[0].facts
    axes, maps = facts.spatial_axes, facts.task == "segmentation"
    try:
        check_axes(manner.flips, axes)
        Windows(manner.window or (1,) * axes, manner.overlap)
    except ValueError as error:
        raise UserError(str(error)) from None
    if manner.window is not None and len(manner.window) != axes:
        given = ",".join(map(str, manner.window))
        raise UserError(f"--window {given} has {len(manner.window)} sizes, and the data have {axes} axes")
    if maps and manner.windows:
        raise UserError("--windows is for classifiers: a segmentation is always predicted in windows")
    for member in members:
        if manner.windows and (manner.window or member.trained_size) is None:
            raise UserError(f"{member.run.name} was trained on whole volumes of different shapes: add --window X,Y,Z")
