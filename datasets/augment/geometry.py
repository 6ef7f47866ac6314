"""The draws of geometry, from rotation to elastic deformation and flips, as one move of each sample.

Coordinates are voxels from the centre of the sample.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datasets.augment.chance import Chance, Floats, cosine, power, sine, tangent
from datasets.augment.options import per_axis
from datasets.order import Stream

OPTIONS = ("rotate", "zoom", "shear", "translate", "elastic", "crop")
RATIO = 4 / 3
"""the sides of a crop are at most so unequal, relative to the image's (torchvision's RandomResizedCrop)"""


@dataclass(frozen=True)
class Moves:
    """For each sample of a batch: source = matrix @ (position + bend) + offset."""

    matrix: Floats
    """(B, axes, axes)"""
    offset: Floats
    """(B, axes)"""
    bends: Floats | None
    """(B, *control points, axes) shifts of the control points of a cubic B-spline, voxels; None: not elastic"""
    knots: tuple[float, ...]
    """voxels between control points along each axis; () without bends"""

    def rows(self, rows: slice | NDArray[np.intp]) -> "Moves":
        return Moves(self.matrix[rows], self.offset[rows], None if self.bends is None else self.bends[rows], self.knots)


def draw_moves(chance: Chance, shape: tuple[int, ...]) -> Moves:
    """The moves of a batch of samples with this spatial shape, flips included."""
    size = np.array(shape, np.float64)
    matrix = np.linalg.inv(_linear(chance, len(shape))).astype(np.float64)
    translate = chance.amount("translate", len(shape)) * size
    offset = -(matrix * translate[:, None]).sum(2)
    share, place = _crop(chance, len(shape))
    # the flip is the last step back to the source, like that of a sample which is only flipped
    mirror = np.where(chance.flips[:, : len(shape)] & np.isin(range(len(shape)), chance.options.flip), -1.0, 1.0)
    matrix = mirror[:, :, None] * share[:, :, None] * matrix
    offset = mirror * (share * offset + place * size)
    bends, knots = _bends(chance, shape)
    return Moves(matrix, offset, bends, knots)


def _linear(chance: Chance, axes: int) -> Floats:
    """(B, axes, axes): content at position q goes to this @ q. Zoom, then shear, then rotation; the last two in mm."""
    turns = 1 if axes == 2 else 3
    rotation = rotations(np.radians(chance.amount("rotate", turns)))
    shear = np.zeros_like(rotation) + np.eye(axes)
    shear[:, *np.triu_indices(axes, 1)] = tangent(np.radians(chance.amount("shear", turns)))
    spacing = np.array(per_axis(chance.options.spacing, axes) or [1.0] * axes)
    millimetres = rotation @ shear * spacing / spacing[:, None]
    forward: Floats = chance.within("zoom", 1.0, log=True)[:, None, None] * millimetres
    return forward


def rotations(angles: Floats) -> Floats:
    """(B, 3) radians about the first, second and third axis (the third comes first), or (B, 1) in the plane."""
    cos, sin = cosine(angles), sine(angles)
    axes = 2 if angles.shape[1] == 1 else 3
    total = np.zeros((len(angles), axes, axes)) + np.eye(axes)
    for turn, (first, second) in enumerate([(0, 1)] if axes == 2 else [(1, 2), (2, 0), (0, 1)]):
        step = np.zeros_like(total) + np.eye(axes)
        step[:, first, first] = step[:, second, second] = cos[:, turn]
        step[:, first, second], step[:, second, first] = -sin[:, turn], sin[:, turn]
        total = total @ step
    return total


def _crop(chance: Chance, axes: int) -> tuple[Floats, Floats]:
    """(B, axes) the crop's length and the shift of its centre, both as shares of the image's sides."""
    drawn = chance.uniform["crop"]
    area = chance.within("crop", 1.0)
    ratio = np.where(chance.happens["crop"], power(RATIO, 2 * drawn[:, 1] - 1), 1.0)
    sides = np.ones((len(drawn), axes))
    sides[:, 0], sides[:, 1] = np.sqrt(area / ratio), np.sqrt(area * ratio)
    sides = np.minimum(sides, 1.0)
    place = np.zeros_like(sides)
    place[:, :2] = (drawn[:, 2:4] - 0.5) * (1 - sides[:, :2])
    return sides, place


def _bends(chance: Chance, shape: tuple[int, ...]) -> tuple[Floats | None, tuple[float, ...]]:
    elastic, axes = chance.options.elastic, len(shape)
    if not elastic:
        return None, ()
    knots = per_axis(elastic.spacing, axes)
    controls = [int((size - 1) / knot) + 4 for size, knot in zip(shape, knots, strict=True)]
    drawn = 2 * chance.stream(Stream.ELASTIC, int(np.prod(controls)) * axes) - 1
    drawn *= chance.happens["elastic"][:, None]
    return drawn.reshape(-1, *controls, axes) * np.array(per_axis(elastic.magnitude, axes)), knots
