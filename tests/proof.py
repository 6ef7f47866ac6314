"""A row is played, and its runs are compared with what the row says and with the undisturbed run, step by step."""

from collections.abc import Callable
from pathlib import Path

from hpc import stepledger
from hpc.rundir import RunDir, read_lines
from tests.events import happen
from tests.playing import Playing, Row, listed
from tests.slurm.cluster import Cluster


def play(row: Row, folder: Path, undisturbed: Callable[[str], Playing]) -> Playing:
    """Run one row from its first line to its last. AssertionError carries the block."""
    playing = Playing(row, folder, undisturbed)
    if row.cluster is not None:
        playing.cluster = Cluster(**row.cluster).start()
    try:
        for line in row.script.splitlines():
            playing.command(line.removeprefix("$ ")) if line.startswith("$ ") else happen(playing, line)
        _check(playing)
    finally:
        if playing.cluster:
            playing.cluster.stop()
    return playing


def _check(playing: Playing) -> None:
    row = playing.row
    if row.state == "no run":
        return
    status = {line["run"]: line for line in listed(playing)}
    runs = playing.runs
    assert sorted(status) == sorted(run.name for run in runs), f"hpc ls shows {sorted(status)}\n{playing.block()}"
    attempts = row.attempts if isinstance(row.attempts, tuple) else (row.attempts,) * len(runs)
    for run, count in zip(runs, attempts, strict=True):
        told = status[run.name]
        assert told["state"] == row.state, f"{run.name}: {told['state']}, not {row.state}\n{playing.block()}"
        assert told["attempts"] == count, f"{run.name}: {told['attempts']} attempts, not {count}\n{playing.block()}"
        _check_run(playing, run, row.causes if len(runs) == 1 else row.causes * (count - 1))


def _check_run(playing: Playing, run: Path, expected: tuple[str, ...]) -> None:
    row = playing.row
    causes = tuple(event["cause"] for event in playing.events("signal", run))
    assert causes == expected, f"{run.name}: stopped by {causes}, not {expected}\n{playing.block()}"
    if row.state == "finished":
        lines = RunDir(run).read_metrics() if row.lost is None else read_lines(run / "metrics.jsonl")
        steps = [line["step"] for line in lines]
        assert steps == sorted(set(steps)), f"an epoch was evaluated twice: {steps}\n{playing.block()}"
    if row.weights and playing.undisturbed:
        _check_equal(playing, run, playing.undisturbed(row.weights))


def _check_equal(playing: Playing, run: Path, golden: Playing) -> None:
    """Each step once, with the samples, pixels, losses and weights of the undisturbed run, and so the final weights."""
    found, wanted = stepledger.read(RunDir(run)), stepledger.read(RunDir(golden.run))
    steps = range(1, golden.read("result.json")["steps"] + 1)
    assert list(wanted.steps) == list(steps), "the undisturbed run has another ledger"
    told = stepledger.differences(found, wanted)
    assert not told, f"{run.name}, beside the undisturbed run: {'; '.join(told)}\n{playing.block()}"
    lost = playing.row.lost
    assert lost is None or found.lost == lost, f"{run.name}: {found.lost} steps lost, not {lost}\n{playing.block()}"
    same = _final(run) == _final(golden.run)
    assert same, f"{run.name}: the final weights differ from those of the undisturbed run\n{playing.block()}"


def _final(run: Path) -> bytes:
    newest = RunDir(run).newest_checkpoint()
    return (run / "checkpoints" / str(newest) / "model.safetensors").read_bytes()
