"""C1, C2, L1, L2: stopped after any step, and resumed on the same ranks or on others, a run ends as if undisturbed.

Real runs (tests/tiny_run.py) of 10 steps an epoch; the signal comes exactly after a step, to the last rank.
"""

import os
import random
import socket
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock

import numpy as np
import yaml

from hpc import stepledger
from hpc.allocation import Allocation
from hpc.experiment import load
from hpc.preempt import ExitCode
from hpc.rundir import RunDir
from tests import tiny_run
from tests.faults.fault import Fault
from tests.faults.rows import SOAK
from tests.tiny_run import CONTEXT

STEPS_PER_EPOCH = 10
LIMIT_S = 300  # of an attempt that takes 3 s on a machine of its own
_SPLITS = {"train": 121, "validation": 6, "test": 2}
_BASE = tempfile.TemporaryDirectory(prefix="hpc-layouts-")
_COMMON = ("data.batch_size=12", "train.ledger=true", "data.augment={flip: [0, 1, 2], noise: 0.1}", "train.epochs=2")
_KINDS = {
    "long": (*_COMMON, "train.epochs=6"),
    "short": _COMMON,
    "layout": (*_COMMON, "train.deterministic=layout", "train.clip_norm=1"),
    # BatchNorm would see other batches and dropout draw other numbers; Adam would blow up a difference in the last bit
    "run": (*_COMMON, f"model.name=file:{_BASE.name}/plain.py:Plain", "train.optimizer.name=sgd"),
}
_PLAIN = """
from torch import nn

class Plain(nn.Sequential):
    def __init__(self, in_channels, num_classes):
        conv, norm = nn.Conv3d(in_channels, 8, 3, stride=2), nn.GroupNorm(2, 8)
        super().__init__(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 27, num_classes))
"""
_LOCKS: dict[object, Lock] = defaultdict(Lock)


@dataclass(frozen=True)
class Leg:
    """One attempt: on how many ranks, and the step after which it is stopped (None: to the end)."""

    ranks: int
    stop: int | None = None
    threads: int | None = None
    """That read, where other than before."""


@cache
def _make_data() -> Path:
    (Path(_BASE.name) / "plain.py").write_text(_PLAIN)
    return tiny_run.make_data(Path(_BASE.name), _SPLITS)


def _data() -> Path:
    with _LOCKS["data"]:
        return _make_data()


@cache
def _play_undisturbed(kind: str, ranks: int, seed: int) -> RunDir:
    return travel(Path(_BASE.name) / f"{kind}-{ranks}-{seed}", kind, [Leg(ranks)], f"train.seed={seed}")


def undisturbed(kind: str, ranks: int, seed: int = 0) -> RunDir:
    """The run that others must equal; done when it is first asked for."""
    with _LOCKS[kind, ranks, seed]:
        return _play_undisturbed(kind, ranks, seed)


def travel(folder: Path, kind: str, legs: Sequence[Leg], *overrides: str) -> RunDir:
    """A run of these attempts, one after another. AssertionError where one does not end as it should."""
    run, begin = tiny_run.make_run(folder, _data(), *_KINDS[kind], *overrides), 0
    for generation, leg in enumerate(legs, start=1):
        if leg.threads is not None:
            changed, _ = load(run.experiment, [f"data.threads={leg.threads}"])
            run.experiment.write_text(yaml.safe_dump(changed.as_dict()))
        evaluated = ((leg.stop or 0) - 1) // STEPS_PER_EPOCH - begin // STEPS_PER_EPOCH
        boundary = None if leg.stop is None else 1 + leg.stop - begin + evaluated
        codes = _attempt(run, leg.ranks, generation, boundary)
        wanted = ExitCode.DONE if leg.stop is None else ExitCode.STOPPED
        assert codes == [wanted] * leg.ranks, f"attempt {generation} on {leg.ranks} ranks ended with {codes}"
        begin = leg.stop or begin
    stops = [event["step"] for event in run.read_events() if event["event"] == "signal"]
    assert stops == [leg.stop for leg in legs if leg.stop], f"stopped after {stops}"
    return run


def _attempt(run: RunDir, ranks: int, generation: int, boundary: int | None) -> list[int | None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = [(run.path, rank, ranks, generation, boundary, port) for rank in range(ranks)]
    processes = [CONTEXT.Process(target=_rank, args=one) for one in given]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
    for process in processes:
        process.kill()
    return [_left(run.path, rank, generation) for rank in range(ranks)]


def _rank(folder: Path, rank: int, ranks: int, generation: int, boundary: int | None, port: int) -> None:
    place = Allocation(rank, ranks, rank, cpus_per_task=1, master_port=port)
    mine = boundary if rank == ranks - 1 else None
    answer = tiny_run.train(RunDir(folder), generation, mine, allocation=place)
    code = ExitCode.STOPPED if answer == "stopped" else ExitCode.DONE
    _word(folder, rank, generation).write_text(str(int(code)))
    os._exit(code)


def _word(folder: Path, rank: int, generation: int) -> Path:
    return folder.with_name(f"{folder.name}-left-{generation}-{rank}")


def _left(folder: Path, rank: int, generation: int) -> int | None:
    """How a rank ended, in its own word; None without. Process.exitcode may be wrong where several threads start
    processes: each start asks for the codes of all, and of two that ask at once one gets 255."""
    try:
        return int(_word(folder, rank, generation).read_text())
    except OSError:
        return None


# What must come of it.


def check_steps(run: RunDir, golden: RunDir, same_ranks: bool) -> str:
    """Each step once, with the same samples and pixels; on the same ranks with the same losses and weights too."""
    found, wanted = stepledger.read(run), stepledger.read(golden)
    steps = run.read_metrics()[-1]["step"]
    assert list(wanted.steps) == list(range(1, steps + 1)), "the undisturbed run has another ledger"
    told = stepledger.differences(found, wanted, weights=same_ranks)
    assert not told, "; ".join(told)
    assert found.lost == 0, f"{found.lost} steps were done again"
    return f"{found.lost} steps lost"


def check_bits(run: RunDir, golden: RunDir) -> None:
    """Final weights, optimizer and metrics, byte by byte."""
    found, wanted = tiny_run.outcome(run), tiny_run.outcome(golden)
    different = [key for key in wanted if found[key] != wanted[key]]
    assert not different, f"{', '.join(different)} differ from the undisturbed run's"


def check_weights_on_the_way(run: RunDir, golden: RunDir) -> None:
    """Every ten steps, on every rank of whatever layout."""
    sums = [
        {step: {line.get("weights") for line in lines.values()} for step, lines in stepledger.read(of).steps.items()}
        for of in (run, golden)
    ]
    for step in range(10, len(sums[1]) + 1, 10):
        assert len(sums[1][step] - {None}) == 1, f"ranks have different weights at step {step}, or none"
        assert sums[0][step] == sums[1][step], f"other weights at step {step}"


def distance(run: RunDir, golden: RunDir) -> float:
    """The largest difference of any weight."""
    found, wanted = (tiny_run.newest(of).model() for of in (run, golden))
    return max(float(np.abs(found[key].double().numpy() - wanted[key].double().numpy()).max()) for key in wanted)


# The rows.


def _stop_anywhere(folder: Path, number: int) -> str:
    step = 1 + number * 37 % 60  # each of 60 once, the first ones far apart
    run, golden = travel(folder / "run", "long", [Leg(1, step), Leg(1)]), undisturbed("long", 1)
    told = check_steps(run, golden, same_ranks=True)
    check_bits(run, golden)
    return told


def _same_ranks(ranks: int, folder: Path, number: int) -> str:
    stops = _twice(number)[: None if ranks == 2 or SOAK else 1]
    run = travel(folder / "run", "short", [*(Leg(ranks, stop) for stop in stops), Leg(ranks)])
    golden = undisturbed("short", ranks)
    told = check_steps(run, golden, same_ranks=True)
    check_bits(run, golden)
    return told


def _twice(number: int) -> tuple[int, int]:
    """Two steps, in the middle of an epoch each."""
    draw = random.Random(number)
    first = draw.choice([3, 5, 7])
    return first, draw.choice([first + 1, 9, 12, 15, 18])


def _elastic(number: int) -> list[Leg]:
    first, second = _twice(number)
    return [Leg(2, first, 3), Leg(1, second, 0), Leg(4, None, 2)]


def _other_ranks(folder: Path, number: int) -> str:
    run, golden = travel(folder / "run", "run", _elastic(number)), undisturbed("run", 2)
    told, apart = check_steps(run, golden, same_ranks=False), distance(run, golden)
    assert apart < 1e-6, f"a weight differs by {apart}"
    return f"{told}, weights {apart * 1e6:.3f} millionths apart"


def _other_ranks_same_bits(folder: Path, number: int) -> str:
    run, golden = travel(folder / "run", "layout", _elastic(number)), undisturbed("layout", 2)
    told = check_steps(run, golden, same_ranks=False)
    check_weights_on_the_way(run, golden)
    check_bits(run, golden)
    return told


def _any_ranks(folder: Path, number: int) -> str:
    golden, *others = (undisturbed("layout", ranks, number) for ranks in (1, 2, 4))
    for other in others:
        check_steps(other, golden, same_ranks=False)
        check_weights_on_the_way(other, golden)
        check_bits(other, golden)
    return "3 runs, all bits equal"


LAYOUTS = [
    Fault(
        "C1",
        "1 rank, stopped after a step, each of 1 to 60 in turn, and resumed",
        "no step lost; bit-identical to the undisturbed run",
        *(_stop_anywhere, 5, 60),
    ),
    Fault(
        "C2",
        "stopped twice in mid-epoch, resumed on other ranks and reading threads: 2/3, 1/0, 4/2; deterministic: run",
        "the same samples and pixels; weights within 1e-6 (a network without dropout and batch statistics, SGD)",
        *(_other_ranks, 1, 20),
    ),
    Fault(
        "C2",
        "stopped twice in mid-epoch, resumed on other ranks and reading threads: 2/3, 1/0, 4/2; deterministic: layout",
        "the same samples and pixels; bit-identical to the undisturbed run",
        *(_other_ranks_same_bits, 1, 20),
    ),
    *(
        Fault(
            "L1",
            f"{ranks} ranks, stopped twice in mid-epoch and resumed",
            "no step lost; bit-identical to the undisturbed run" + " (in `make test` stopped once)" * (ranks > 2),
            *(partial(_same_ranks, ranks), 1, 20),
        )
        for ranks in (2, 3, 4)
    ),
    Fault(
        "L2",
        "1, 2 and 4 ranks; deterministic: layout",
        "bit-identical to each other",
        *(_any_ranks, 1, 5),
    ),
]
