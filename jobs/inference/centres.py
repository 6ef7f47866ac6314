"""Places in volumes whose class is asked for, of networks that were trained on patches by the class of their middle.

A table with the columns x, y, z, in mm of the files' own world (RAS, as NIfTI has it), and id where there are several
files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.packing.geometry import Affine
from datasets.tables import read_cells, require_column
from hpc.errors import UserError
from jobs.inference.members import Manner, Member

AXES = ("x", "y", "z")


@dataclass(frozen=True)
class Centres:
    """Of each file (N, 3) mm, in the order of the table; under the id None those of a table without ids."""

    table: Path
    places: dict[str | None, NDArray[np.float64]]
    digest: str

    @classmethod
    def read(cls, table: Path) -> Centres:
        """Raises UserError or ValueError, OSError."""
        header, lines = read_cells(table)
        for name in AXES:
            require_column(table, header, name)
        found: dict[str | None, list[list[float]]] = {}
        for where, cells in lines:
            try:
                place = [float(cells[name]) for name in AXES]
            except ValueError:
                place = [np.nan]
            if not np.isfinite(place).all():
                raise UserError(f"{where}: {', '.join(cells[name] for name in AXES)} is no place in mm")
            found.setdefault(cells["id"] if "id" in header else None, []).append(place)
        if not found:
            raise UserError(f"{table} names no place")
        return cls(table, {id: np.array(some) for id, some in found.items()}, _digest(table))

    def check(self, ids: Iterable[str]) -> None:
        """Raises UserError for places in files that are not asked about, and for several files without ids."""
        known = list(ids)
        if None in self.places and len(known) > 1:
            raise UserError(f"{self.table} has no column id, and there are {len(known)} files: add it")
        if strangers := [id for id in self.places if id is not None and id not in known]:
            raise UserError(f"{self.table} has places of {strangers[0]!r}, which is none of the files: {known[0]!r} is")

    def of(self, id: str) -> NDArray[np.float64] | None:
        return self.places.get(id, self.places.get(None))

    def places_of(self, id: str) -> NDArray[np.float64]:
        return self.places[id if id in self.places else None]


def _digest(table: Path) -> str:
    return hashlib.sha256(table.read_bytes()).hexdigest()[:16]


def answer_at(
    members: Sequence[Member], volume: Tensor, affine: Affine, places: NDArray[np.float64], manner: Manner, batch: int
) -> NDArray[np.float32]:
    """(N, K) probabilities of the patches about places in a volume (C, x, y, z); NaN where one does not lie inside.

    A patch is of the size that a network was trained on, its middle the voxel nearest to the place, as packing has it.
    """
    grid = np.linalg.inv(affine)
    voxels = np.floor(places @ grid[:3, :3].T + grid[:3, 3] + 0.5 + 1e-6).astype(np.int64)
    sizes = [np.array(member.trained_size) for member in members]
    corners = [voxels - size // 2 for size in sizes]
    inside = np.ones(len(places), bool)
    for corner, size in zip(corners, sizes, strict=True):
        inside &= (corner >= 0).all(1) & (corner + size <= np.array(volume.shape[1:])).all(1)
    told = np.full((len(places), len(members[0].facts.class_names)), np.nan, np.float32)
    rows = np.flatnonzero(inside)
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        total: Tensor | float = 0.0
        for member, corner, size in zip(members, corners, sizes, strict=True):
            boxes = [tuple(slice(int(a), int(a + n)) for a, n in zip(corner[row], size, strict=True)) for row in some]
            patches = torch.stack([volume[(slice(None), *box)] for box in boxes])
            total = total + member.predictor(manner)(patches.to(member.device)).cpu()
        assert isinstance(total, Tensor)
        told[some] = (total / len(members)).numpy()
    return told
