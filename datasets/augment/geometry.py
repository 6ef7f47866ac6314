"""Where each voxel of the result comes from: rotation to elastic deformation and flips, resampled in a single pass.

Coordinates are voxels from the centre of the sample. A source outside it takes the nearest edge voxel.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

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


def warp(inputs: Tensor, maps: Tensor | None, moves: Moves) -> tuple[Tensor, Tensor | None]:
    """inputs (n, C, *shape), float32, resampled linearly, and maps (n, *shape) by nearest neighbour, in float32."""
    shape = tuple(inputs.shape[2:])
    threads = torch.get_num_threads() if inputs.device.type == "cpu" and len(inputs) == 1 else 1
    slab = -(-shape[0] // threads)
    pieces = -(-shape[0] // slab)
    grid = _grid(moves, shape, slab * pieces, inputs.device)
    moved = None if maps is None else _resample(maps[:, None].float(), grid, pieces, "nearest")[:, 0]
    return _resample(inputs, grid, pieces, "bilinear"), moved


def _resample(tensor: Tensor, grid: Tensor, pieces: int, mode: str) -> Tensor:
    """On the CPU grid_sample shares samples, not voxels, out to threads: one sample goes in as slabs of its result."""
    samples, rows = len(tensor), grid.shape[1]
    if pieces > 1:
        tensor = tensor.expand(pieces, *tensor.shape[1:])
    slabs = grid.reshape(samples * pieces, rows // pieces, *grid.shape[2:])
    out = grid_sample(tensor, slabs, mode=mode, padding_mode="border", align_corners=False)
    joined = out.reshape(samples, pieces, *out.shape[1:]).transpose(1, 2).flatten(2, 3)
    return joined[:, :, : tensor.shape[2]]


def _grid(moves: Moves, shape: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """(n, rows, *shape[1:], axes) sources as grid_sample wants them: -1 to 1 from edge to edge, last axis first.

    Rows from shape[0] on repeat the last one.
    """
    axes, count = len(shape), len(moves.matrix)
    lines: list[Tensor] = []
    for axis, size in enumerate(shape):
        places = np.minimum(np.arange(rows if axis == 0 else size), size - 1) - (size - 1) / 2
        sources = moves.matrix[:, None, :, axis] * places[:, None]
        lines.append(_to_grid(sources + moves.offset[:, None] if axis == 0 else sources, shape, device))
    rest = lines[1]
    for line in lines[2:]:
        rest = rest.unsqueeze(-2) + line.unsqueeze(1)
    # long rows, which are added four times faster than voxel by voxel
    row = shape[-1] * axes
    first = lines[0].unsqueeze(2).expand(-1, -1, shape[-1], -1).reshape(count, rows, 1, row)
    grid = (first + rest.reshape(count, 1, -1, row)).view(count, rows, *shape[1:], axes)
    if moves.bends is not None and moves.bends.any():
        _bend(grid, moves, moves.bends, shape)
    return grid


def _to_grid(positions: Floats, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Voxels from the centre, axes last, in the units and the order of grid_sample."""
    scaled = (positions * (2 / np.array(shape, np.float64)))[..., ::-1]
    return torch.from_numpy(np.ascontiguousarray(scaled, np.float32)).to(device)


def _bend(grid: Tensor, moves: Moves, bends: Floats, shape: tuple[int, ...]) -> None:
    count, rows = grid.shape[:2]
    turned = np.einsum("nij,n...j->n...i", moves.matrix, bends)
    field = _to_grid(turned, shape, grid.device)
    for axis in reversed(range(1, len(shape))):
        basis = spline_basis(shape[axis], shape[axis], moves.knots[axis]).to(grid.device)
        field = basis @ field.reshape(count, *bends.shape[1 : axis + 2], -1)
    basis = spline_basis(rows, shape[0], moves.knots[0]).to(grid.device)
    grid.view(count, rows, -1).baddbmm_(basis.expand(count, -1, -1), field.reshape(count, bends.shape[1], -1))


def spline_basis(rows: int, size: int, knot: float) -> Tensor:
    """(rows, control points) weights of the uniform cubic B-spline at voxels 0, 1, ...; those past `size` repeat it.

    Rueckert et al., Nonrigid registration using free-form deformations, IEEE TMI 18, 1999.
    """
    place = np.minimum(np.arange(rows), size - 1) / knot
    left = place.astype(np.int64)
    part = place - left
    weights = ((1 - part) ** 3, 3 * part**3 - 6 * part**2 + 4, -3 * part**3 + 3 * part**2 + 3 * part + 1, part**3)
    basis = np.zeros((rows, int((size - 1) / knot) + 4), np.float32)
    for step, weight in enumerate(weights):
        basis[np.arange(rows), left + step] = weight / 6
    return torch.from_numpy(basis)
