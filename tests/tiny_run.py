"""A run of seconds for the tests of jobs/: 27 volumes of 8 x 8 x 8, 12 optimizer steps in 3 epochs, on one thread.

    run = make_run(folder / "run", make_data(folder), "train.seed=3")
    assert train(run, signal_at=5) == "stopped"
    assert train(run, generation=2) == "done"

A boundary is a place where the loop asks whether to stop: before the first step, after every step and after every
validation batch. BOUNDARIES of them make an undisturbed run.
"""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets.writer import VolumeWriter
from hpc.allocation import Allocation
from hpc.experiment import load
from hpc.preempt import StopFlag
from hpc.rundir import RunDir, read_json
from hpc.steptimes import TIMING
from jobs import checkpoint
from jobs.engine import Engine
from jobs.schedule import Schedule
from jobs.train import Stopped, Trainer

SPLITS = {"train": 17, "validation": 6, "test": 4}
BATCH, EPOCHS = 4, 3
STEPS_PER_EPOCH, STEPS = 4, 12
BOUNDARIES = 1 + STEPS + 2 * EPOCHS
CHILD_LIMIT_S = 600  # of a hang: a minute on two cores of its own, ten times that beside other work
Outcome = dict[str, Any]
CLASSES = ("early", "late", "none")

# Children are forked from a server that has imported torch once, and never from a process with threads.
CONTEXT = multiprocessing.get_context("forkserver")
_EVENTS = "tensorboard.backend.event_processing.event_accumulator"
CONTEXT.set_forkserver_preload(["torch._dynamo", "pytest", "matplotlib.font_manager", _EVENTS, "tests.tiny_run"])


def make_data(folder: Path, splits: dict[str, int] = SPLITS, **relabel: int) -> Path:
    """scans.h5: noise with a faint class-dependent bar; `relabel` gives samples (by id) another class."""
    generator, path = np.random.default_rng(7), folder / "scans.h5"
    total = sum(splits.values())
    with VolumeWriter(path, shape=(1, 8, 8, 8), dtype="int16", num_samples=total, class_names=CLASSES) as writer:
        for split, count in splits.items():
            for number in range(count):
                label = number % len(CLASSES)
                volume = generator.integers(-40, 40, (1, 8, 8, 8)).astype("int16")
                volume[:, 2 * label : 2 * label + 2] += 30
                id = f"{split}{number}"
                writer.add(volume, relabel.get(id, label), id=id, split=split, scale=0.02)
    return path


def make_run(folder: Path, data: Path, *overrides: str) -> RunDir:
    """A run folder as the login node leaves it."""
    run = RunDir(folder)
    run.path.mkdir(parents=True)
    model = {"name": "resnet3d_tiny", "width": 4, "layers": 1, "downsample": [], "stem_stride": 2, "dropout": 0.2}
    values = {
        "name": "tiny",
        "model": model,
        "data": {"file": str(data), "batch_size": BATCH, "augment": {"flip": [0]}, "verify": 0, "threads": 1},
        "train": {
            "epochs": EPOCHS,
            "device": "cpu",
            "figures": "few",
            "optimizer": {"lr": 0.02},
            "scheduler": {"name": "one_cycle"},
        },
    }
    run.experiment.write_text(yaml.safe_dump(values))
    resolved, _ = load(run.experiment, list(overrides))
    run.experiment.write_text(yaml.safe_dump(resolved.as_dict()))
    return run


class SignalAtBoundary(StopFlag):
    """Sends its own process a real signal when the loop asks for the n-th time whether to stop.

    SIGKILL waits for `settle`: what is lost is then known (tests/faults/ kills in the middle of a save).
    """

    def __init__(self, boundary: int | None, number: int) -> None:
        super().__init__()
        self._boundary, self._number, self.asked = boundary, number, 0
        self.settle: Callable[[], None] = lambda: None

    def agree(self, max_over_ranks: Callable[[int], int]) -> str | None:
        self.asked += 1
        if self.asked == self._boundary:
            if self._number == signal.SIGKILL:
                self.settle()
            os.kill(os.getpid(), self._number)
        return super().agree(max_over_ranks)


def make_trainer(
    run: RunDir, generation: int = 1, flag: StopFlag | None = None, allocation: Allocation | None = None
) -> Trainer:
    """A trainer before `resume`, on one thread."""
    experiment = load(run.experiment)[0]
    place = replace(allocation or Allocation(cpus_per_task=1), generation=generation)
    engine = Engine(place, torch.device("cpu"), deterministic=True, token=f"{run.name} {generation}")
    return Trainer(run, experiment, engine, flag or StopFlag())


def train(
    run: RunDir,
    generation: int = 1,
    signal_at: int | None = None,
    number: int = signal.SIGTERM,
    allocation: Allocation | None = None,
    save_always: bool = False,
) -> str:
    """One attempt, for processes of their own: "done", or "stopped" by the signal at boundary `signal_at`."""
    flag = SignalAtBoundary(signal_at, number)
    trainer = make_trainer(run, generation, flag.install(), allocation)
    if save_always:
        _save_at_each_step(trainer)
    try:
        trainer.resume()
        if trainer.saver:
            flag.settle = trainer.saver.wait
        trainer.fit()
        trainer.engine.barrier()
    except Stopped:
        return "stopped"
    finally:
        trainer.close()
    return "done"


def _save_at_each_step(trainer: Trainer) -> None:
    """Each save is durable before the next step."""
    save = trainer._save
    trainer.schedule = Schedule(0, trainer.engine.allocation, lambda: None)
    trainer._save = lambda wait=False: save(wait=True)  # type: ignore[method-assign]


def newest(run: RunDir) -> checkpoint.Checkpoint:
    return checkpoint.verify(next(checkpoint.newest_first(run.checkpoints)))


def shown_steps(run: RunDir, tag: str) -> list[int]:
    """As TensorBoard's reader has them."""
    return [event.step for event in _shown(run, tag)]


def shown_values(run: RunDir, tag: str) -> list[float]:
    """As TensorBoard's reader has them."""
    return [float(event.value) for event in _shown(run, tag)]


def _shown(run: RunDir, tag: str) -> list[Any]:
    accumulator = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    accumulator.Reload()
    return list(accumulator.Scalars(tag))


def outcome(run: RunDir) -> Outcome:
    """All that must not depend on interruptions: final weights and optimizer byte by byte, metrics, best epoch."""
    found = newest(run)
    measured = ("generation", "time", "samples_per_second", "waiting_share", *TIMING)
    lines = [{key: value for key, value in line.items() if key not in measured} for line in run.read_metrics()]
    moments = found.optimizer()
    state = found.state()
    return {
        "step": found.step,
        "weights": {key: value.numpy().tobytes() for key, value in found.model().items()},
        "trained": {key: value.numpy().tobytes() for key, value in found.trained().items()},
        "optimizer": {
            (number, key): torch.as_tensor(value).numpy().tobytes()
            for number, entry in moments["state"].items()
            for key, value in entry.items()
        },
        "groups": moments["param_groups"],
        "metrics": lines,
        "last": state["last"],
        "learner": state["learner"],
        "best": {key: value for key, value in state["best"].items() if key != "checkpoint"},
    }


def in_child(function: Callable[..., None], *args: Any) -> int:
    """Exit code of `function(*args)` in a process of its own (negative: the signal that ended it)."""
    child = CONTEXT.Process(target=function, args=args)
    child.start()
    child.join(CHILD_LIMIT_S)
    if child.exitcode is None:
        child.kill()
        raise AssertionError(f"{function.__name__} did not end in {CHILD_LIMIT_S} s")
    return child.exitcode


def play(
    folder: Path, data: Path, stops: tuple[int, ...] = (), *overrides: str, boundaries: int = BOUNDARIES
) -> Outcome:
    """A run stopped at these boundaries, one an attempt, then trained to its end."""
    run = make_run(folder, data, *overrides)
    for generation, boundary in enumerate(stops, start=1):
        assert train(run, generation, boundary) == "stopped"
        assert read_json(run.stop)["generation"] == generation
        assert read_json(run.stop)["step"] == newest(run).step
        assert not run.result.exists()
    assert train(run, len(stops) + 1, None if stops else boundaries + 1) == "done"
    return outcome(run)


def assert_same(found: Outcome, wanted: Outcome) -> None:
    assert found.keys() == wanted.keys()
    for key in wanted:  # the weights last: their difference says least
        if key not in ("weights", "trained", "optimizer"):
            assert found[key] == wanted[key], key
    for key in ("optimizer", "trained", "weights"):
        changed = [name for name in wanted[key] if found[key].get(name) != wanted[key][name]]
        assert not changed, f"{key} differ in {changed}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(function: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[int | None]:
    """Exit codes of processes that run together; None for one that hung."""
    ranks = [CONTEXT.Process(target=function, args=given) for given in arguments]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + CHILD_LIMIT_S
    for rank in ranks:
        rank.join(max(0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def play_rank(rank: int, world: int, rows: list[tuple[Path, int, int | None, int]]) -> None:
    """Attempts (run, generation, boundary, port) one after another; only the last rank is signalled."""
    for folder, generation, boundary, port in rows:
        place = Allocation(rank, world, rank, cpus_per_task=1, master_port=port)
        mine = boundary if rank == world - 1 else None
        answer = train(RunDir(folder), generation, mine, allocation=place)
        assert answer == ("done" if boundary is None else "stopped")
    os._exit(0)
