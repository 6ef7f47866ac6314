"""What the storage faults save and load: a small 3D network with Adam, trained for real; processes to save it in."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc.parent import end_with_parent
from jobs import checkpoint
from jobs.saving import Saver
from tests.tiny_run import CONTEXT

STEPS = 13
FACTS = {"world_size": 1, "data": "f" * 64}
State = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Weights, the optimizer's state, and what is JSON."""


def states(generation: int) -> list[State]:
    """The state after each of STEPS steps, from 0 on; a generation's neighbours have learnt something else."""
    return [
        (weights, moments, {"best": None, "last": {"step": step, "generation": generation, "loss": (step / 3).hex()}})
        for step, (weights, moments) in enumerate(_trained(generation % 3))
    ]


@cache
def _trained(seed: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    torch.set_num_threads(1)  # a process with threads cannot fork
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv3d(1, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    model.append(nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    found = []
    for _ in range(STEPS + 1):
        found.append((_copied(model.state_dict()), _copied(optimizer.state_dict())))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, 1, 6, 6, 6)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}  # no OrderedDict with _metadata: plain tensors
    return [_copied(item) for item in value] if isinstance(value, list) else value


def same(found: Any, wanted: Any) -> bool:
    """Equal bit for bit, types and shapes, too."""
    if isinstance(wanted, torch.Tensor):
        alike = isinstance(found, torch.Tensor) and found.dtype == wanted.dtype and found.shape == wanted.shape
        return alike and found.numpy().tobytes() == wanted.numpy().tobytes()
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict) and found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in found)
        )
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return bool(found == wanted)


@dataclass(frozen=True)
class Place:
    """Where one run's checkpoints are."""

    run: Path

    @classmethod
    def new(cls, run: Path) -> Place:
        run.mkdir()
        return cls(run)

    def remove(self) -> None:
        shutil.rmtree(self.run)

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def quarantine(self) -> Path:
        return self.run / "quarantine"

    def load(self) -> checkpoint.Checkpoint:
        """The newest that is good; all of it must be what its generation had at its step. AssertionError."""
        try:
            found = checkpoint.load_newest(self.checkpoints, self.quarantine)
        except checkpoint.Damaged as error:
            raise AssertionError(f"nothing loads: {error}") from error
        assert found is not None, "no checkpoint is there"
        weights, moments, facts = states(int(found.manifest["generation"]))[found.step]
        assert found.state() == facts, f"{found.name}: its state.json is another's"
        assert same(found.model(), weights), f"{found.name}: its weights are not those that were saved"
        assert same(found.optimizer(), moments), f"{found.name}: its optimizer is not the one that was saved"
        return found

    def asides(self) -> list[str]:
        """Temporary folders, and what is being deleted."""
        return sorted(path.name for path in self.checkpoints.glob(".*")) if self.checkpoints.is_dir() else []


@contextmanager
def quick(folder: Path) -> Iterator[Path]:
    """A folder in memory: what a kill leaves does not depend on the disk, and fsync costs nothing there."""
    memory = Path("/dev/shm")  # of every Linux
    with tempfile.TemporaryDirectory(
        prefix="hpc-faults-", dir=memory if os.access(memory, os.W_OK) else folder
    ) as path:
        yield Path(path)


def staged(function: Callable[[Path, int], str], folder: Path, number: int, seconds: float = 600) -> str:
    """`function(folder, number)` in a process of its own, that has torch and no threads, so that it can fork."""
    receiving, sending = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_stage, args=(function, folder, number, sending))
    child.start()
    sending.close()
    try:
        assert receiving.poll(seconds), f"{function.__name__} did not end in {seconds:.0f} s"
        good, told = receiving.recv()
    except EOFError:
        good, told = False, f"{function.__name__} died"
    finally:
        child.join(10)
        child.kill()
        child.join()
    assert good, told
    return str(told)


def _stage(function: Callable[[Path, int], str], folder: Path, number: int, sending: Any) -> None:
    end_with_parent()
    try:
        sending.send((True, function(folder, number)))
    except AssertionError as error:
        sending.send((False, f"{error}\n{traceback.format_exc()}"))
    except BaseException:
        sending.send((False, traceback.format_exc()))
    os._exit(0)


def spawned(function: Callable[[], None], log: Path) -> int:
    """Pid of a fork of this process that does `function()`; its exit code is 1, and `log` says why, where it failed."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            end_with_parent()
            function()
            os._exit(0)
        except BaseException:
            log.write_text(traceback.format_exc())
            os._exit(1)
    return child


def forked(function: Callable[[], None], log: Path) -> int:
    """Exit code of `function()` in a fork; negative: the signal that ended it. Its errors are raised here."""
    code = os.waitstatus_to_exitcode(os.waitpid(spawned(function, log), 0)[1])
    assert code <= 0, log.read_text()
    return code


@dataclass
class Saving:
    """A Saver as the training loop uses one, and what it has reported."""

    place: Place
    generation: int
    keep: int = 2
    fence: Callable[[], None] = lambda: None
    reports: list[str] = field(default_factory=list)

    def __enter__(self) -> Saving:
        self.saver = Saver(
            self.place.checkpoints,
            self.generation,
            keep=self.keep,
            device=torch.device("cpu"),
            fence=self.fence,
            report=lambda kind, *_, **__: self.reports.append(str(kind)),
        )
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.saver.close()

    def save(self, step: int, best: str = "", wait: bool = True) -> str:
        weights, moments, facts = states(self.generation)[step]
        return self.saver.save(step, weights, moments, facts, FACTS, {best} - {""}, wait=wait)

    def settled(self, names: set[str]) -> None:
        """Wait until these are there, and nothing else: the order of all storage calls is the same each time then."""
        end = time.monotonic() + 60
        while {path.name for path in self.place.checkpoints.iterdir()} != names:
            assert time.monotonic() < end, f"{sorted(self.place.checkpoints.iterdir())} are there, not {sorted(names)}"
            time.sleep(0.0005)
