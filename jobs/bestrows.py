"""The rows of the best evaluation, kept in the run's folder: the figures at the end need them, whoever trained it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from hpc.rundir import RunDir, write_bytes
from jobs.pictured import Pictured
from jobs.tasks.contract import Stored

BEST = "best"
MOST_BYTES = 1 << 28
"""of rows: larger ones are not kept, and the figures are those that counts give"""
_PARTS = ("image", "truth", "found")

Pictures = dict[str, list[Pictured]]
"""Label maps to be drawn, by the name of the figure."""


def save(run: RunDir, step: int, stored: Stored, pictures: Pictures, names: Sequence[str], ids: Sequence[str]) -> bool:
    """predictions/best.npz, as `hpc evaluate` writes a split's, with samples, losses, step and pictures beside.

    False where they are too many. Raises OSError.
    """
    if stored.rows.nbytes > MOST_BYTES:
        return False
    arrays = {"samples": stored.samples, "scores": stored.rows, "losses": stored.losses, "step": np.array(step)}
    if stored.targets is not None:
        arrays["targets"] = stored.targets
    for kind, shown in pictures.items():
        arrays[f"{kind}/samples"] = np.array([one.sample for one in shown], np.int64)
        arrays[f"{kind}/losses"] = np.array([one.loss for one in shown], np.float64)
        arrays |= {f"{kind}/{n}/{part}": getattr(one, part) for n, one in enumerate(shown) for part in _PARTS}
    buffer = io.BytesIO()
    np.savez(buffer, ids=np.array(list(ids)), class_names=np.array(list(names)), **arrays)  # type: ignore[arg-type]
    write_bytes(run.prediction(BEST), buffer.getvalue())
    return True


def load(run: RunDir, step: int) -> tuple[Stored, Pictures] | None:
    """Of the evaluation after `step`; None where the file is missing, unreadable, or of another one."""
    try:
        with np.load(run.prediction(BEST), allow_pickle=False) as file:
            if int(file["step"]) != step:
                return None
            targets = file.get("targets", None)
            stored = Stored(file["samples"], targets, file["scores"], file["losses"])
            kinds = [name.removesuffix("/samples") for name in file.files if name.endswith("/samples")]
            return stored, {kind: _shown(file, kind) for kind in kinds}
    except (OSError, ValueError, KeyError):
        return None


def _shown(file: np.lib.npyio.NpzFile, kind: str) -> list[Pictured]:
    pairs = zip(file[f"{kind}/samples"].tolist(), file[f"{kind}/losses"].tolist(), strict=True)
    return [
        Pictured(sample, loss, *(file[f"{kind}/{number}/{part}"] for part in _PARTS))
        for number, (sample, loss) in enumerate(pairs)
    ]
