"""Resampling in a single pass: the sources of all voxels from a move, a few rows at a time, and the values read there.

A source outside the sample takes the nearest edge voxel.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from datasets.augment.chance import Floats
from datasets.augment.geometry import Moves
from datasets.augment.products import product

BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""of sampling grid at a time: little beside a large volume, and not so many blocks that threads wait for each other"""


def warp(inputs: Tensor, maps: Tensor | None, moves: Moves) -> tuple[Tensor, Tensor | None]:
    """inputs (n, C, *shape), float32, resampled linearly, and maps (n, *shape) by nearest neighbour; new tensors."""
    out, moved = torch.empty_like(inputs), None if maps is None else torch.empty_like(maps)
    labels = None if maps is None else maps[:, None].float()
    rows, pieces = _block(inputs)
    sources = _Sources(moves, tuple(inputs.shape[2:]), rows * pieces, inputs.device)
    for first in range(0, inputs.shape[2], rows * pieces):
        block = slice(first, first + rows * pieces)
        grid = sources.grid(first)
        out[:, :, block] = _resample(inputs, grid, pieces, "bilinear")[:, :, : inputs.shape[2] - first]
        if labels is not None and moved is not None:
            moved[:, block] = _resample(labels, grid, pieces, "nearest")[:, 0, : inputs.shape[2] - first]
    return out, moved


def _block(inputs: Tensor) -> tuple[int, int]:
    """Rows of the first axis for a thread, and threads: grid_sample shares samples out to them, not voxels."""
    kind, size = inputs.device.type, inputs.shape[2]
    threads = torch.get_num_threads() if kind == "cpu" and len(inputs) == 1 else 1
    row_bytes = len(inputs) * (inputs.ndim - 2) * 4 * int(np.prod(inputs.shape[3:]))
    most = BLOCK_BYTES.get(kind, BLOCK_BYTES["cuda"]) // (row_bytes * threads)
    rows = min(max(1, most), -(-size // threads))
    return rows, min(threads, -(-size // rows))


def _resample(tensor: Tensor, grid: Tensor, pieces: int, mode: str) -> Tensor:
    """(n, C, rows of the grid, ...); one sample may go in as several, each a piece of its result."""
    samples, rows = grid.shape[:2]
    if pieces > 1:
        tensor = tensor.expand(pieces, *tensor.shape[1:])
    slabs = grid.reshape(samples * pieces, rows // pieces, *grid.shape[2:])
    out = grid_sample(tensor, slabs, mode=mode, padding_mode="border", align_corners=False)
    return out.reshape(samples, pieces, *out.shape[1:]).transpose(1, 2).flatten(2, 3)


class _Sources:
    """Where each voxel comes from, as grid_sample wants it: -1 to 1 from edge to edge, last axis first."""

    def __init__(self, moves: Moves, shape: tuple[int, ...], rows: int, device: torch.device) -> None:
        self.shape, self.count, self.rows = shape, len(moves.matrix), rows
        lines = [_to_grid(_line(moves, axis, size), shape).to(device) for axis, size in enumerate(shape)]
        rest = lines[1]
        for line in lines[2:]:
            rest = rest.unsqueeze(-2) + line.unsqueeze(1)
        # along the last axis as one long row, which is added four times faster than voxel by voxel
        row = shape[-1] * len(shape)
        self._first = lines[0].unsqueeze(2).expand(-1, -1, shape[-1], -1).reshape(self.count, shape[0], 1, row)
        self._rest = rest.reshape(self.count, 1, -1, row)
        self._grid = torch.empty(self.count, rows, self._rest.shape[2], row, device=device)
        self._bend = None
        if moves.bends is not None and moves.bends.any():
            self._bend = _splines(moves, moves.bends, shape, device)

    def grid(self, first: int) -> Tensor:
        """(n, rows, *shape[1:], axes) for rows from `first` on; past the end the last one. Valid until the next."""
        index = torch.arange(first, first + self.rows, device=self._rest.device).clamp_(max=self.shape[0] - 1)
        grid = torch.add(self._first[:, index], self._rest, out=self._grid)
        if self._bend is not None:
            basis, field = self._bend
            grid.view(self.count, self.rows, -1).add_(product(basis[index].expand(self.count, -1, -1), field))
        return grid.view(self.count, self.rows, *self.shape[1:], len(self.shape))


def _line(moves: Moves, axis: int, size: int) -> Floats:
    """(n, size, axes) what the place along one axis adds to the source; the first axis brings the offset."""
    places = np.arange(size) - (size - 1) / 2
    line: Floats = moves.matrix[:, None, :, axis] * places[:, None]
    return line + moves.offset[:, None] if axis == 0 else line


def _to_grid(positions: Floats, shape: tuple[int, ...]) -> Tensor:
    """Voxels from the centre, axes last, in the units and the order of grid_sample."""
    scaled = (positions * (2 / np.array(shape, np.float64)))[..., ::-1]
    return torch.from_numpy(np.ascontiguousarray(scaled, np.float32))


def _splines(moves: Moves, bends: Floats, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What the bends add to the grid as a product: (rows, control points) and (n, control points, rest of the grid)."""
    field = _to_grid(np.einsum("nij,n...j->n...i", moves.matrix, bends), shape).to(device)
    basis = [spline_basis(size, knot).to(device) for size, knot in zip(shape, moves.knots, strict=True)]
    for axis in reversed(range(1, len(shape))):
        lines = field.reshape(int(np.prod(bends.shape[: axis + 1])), bends.shape[axis + 1], -1)
        field = product(basis[axis].expand(len(lines), -1, -1), lines)
    return basis[0], field.reshape(*bends.shape[:2], -1)


def spline_basis(size: int, knot: float) -> Tensor:
    """(size, control points) weights of the uniform cubic B-spline at voxels 0, 1, ...

    Rueckert et al., Nonrigid registration using free-form deformations, IEEE TMI 18, 1999.
    """
    place = np.arange(size) / knot
    left = place.astype(np.int64)
    part = place - left
    weights = ((1 - part) ** 3, 3 * part**3 - 6 * part**2 + 4, -3 * part**3 + 3 * part**2 + 3 * part + 1, part**3)
    basis = np.zeros((size, int((size - 1) / knot) + 4), np.float32)
    for step, weight in enumerate(weights):
        basis[np.arange(size), left + step] = weight / 6
    return torch.from_numpy(basis)
