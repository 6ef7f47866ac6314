"""Memory that batches are read into, and used again only when nobody can see it any more.

Fresh memory for each batch costs half the speed; a blind ring would overwrite batches that a user still holds. A slot
is one NumPy array; every tensor on it, and every view of such a tensor, keeps a reference to that array, so the count
of references says whether it is free. The ring grows when batches are held, and shrinks again.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass
class _Layout:
    """Shapes and dtypes of one sample's inputs and label map (None: the targets are in the table)."""

    inputs: tuple[int, ...]
    dtype: np.dtype[Any]
    maps: tuple[int, ...] | None

    @property
    def input_bytes(self) -> int:
        return math.prod(self.inputs) * self.dtype.itemsize

    @property
    def map_bytes(self) -> int:
        return 0 if self.maps is None else math.prod(self.maps)


class Slot:
    """Room for one batch: inputs of all samples, then their label maps."""

    def __init__(self, layout: _Layout, rows: int, pinned: bool) -> None:
        self._layout, self._rows = layout, rows
        size = max(1, rows * (layout.input_bytes + layout.map_bytes))
        self._memory: Any = (
            torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy() if pinned else np.empty(size, np.uint8)
        )
        self.busy = False
        """being filled, or not handed over yet"""
        self.copied: Any = None
        """torch.cuda.Event of the copy to the device that must have passed before the slot is filled again"""
        self._unseen = self._references()

    def input_buffer(self, row: int) -> memoryview:
        size = self._layout.input_bytes
        return memoryview(self._memory)[row * size : (row + 1) * size]

    def map_buffer(self, row: int) -> memoryview | None:
        if self._layout.maps is None:
            return None
        size, start = self._layout.map_bytes, self._rows * self._layout.input_bytes
        return memoryview(self._memory)[start + row * size : start + (row + 1) * size]

    def inputs(self, count: int, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """(count, C, *spatial) view of the first samples; `shape` of one sample, where it is not the slot's own."""
        return self._view(0, count, shape or self._layout.inputs, self._layout.dtype)

    def maps(self, count: int, shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
        """(count, *spatial) view of the first label maps."""
        assert self._layout.maps is not None
        start = self._rows * self._layout.input_bytes
        return self._view(start, count, shape or self._layout.maps, np.dtype(np.uint8))

    def _view(self, start: int, count: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        part: NDArray[Any] = self._memory[start : start + count * math.prod(shape) * dtype.itemsize]
        return part.view(dtype).reshape(count, *shape)

    @property
    def free(self) -> bool:
        if self.busy or (self.copied is not None and not self.copied.query()):
            return False
        return self._references() <= self._unseen

    def _references(self) -> int:
        return sys.getrefcount(self._memory)


class Ring:
    def __init__(
        self, inputs: tuple[int, ...], dtype: np.dtype[Any], maps: tuple[int, ...] | None, rows: int, pinned: bool
    ) -> None:
        self._layout, self._rows, self._pinned = _Layout(inputs, dtype, maps), rows, pinned
        self.slots: list[Slot] = []

    @property
    def sample_bytes(self) -> int:
        return self._layout.input_bytes + self._layout.map_bytes

    def acquire(self, spare: int) -> Slot:
        """A slot nobody sees, marked busy; of the other free ones, at most `spare` are kept."""
        free = [slot for slot in self.slots if slot.free]
        if not free:
            free = [self._wait_for_copy() or self._grow()]
        for extra in free[1 + spare :]:
            self.slots.remove(extra)
        free[0].busy = True
        return free[0]

    def _grow(self) -> Slot:
        self.slots.append(Slot(self._layout, self._rows, self._pinned))
        return self.slots[-1]

    def _wait_for_copy(self) -> Slot | None:
        """On a GPU, wait for a copy to pass rather than pin ever more memory."""
        for slot in self.slots:
            if slot.copied is not None and not slot.busy:
                slot.copied.synchronize()
                if slot.free:
                    return slot
        return None
