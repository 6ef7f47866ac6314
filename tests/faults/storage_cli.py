"""Storage faults that a user meets: a disk that fills, one that is slow, and a run whose checkpoints are all bad."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hpc.preempt import ExitCode
from hpc.rundir import RunDir, read_json
from jobs import checkpoint
from jobs.saving import room
from tests.faults.storage_kills import goes_on, key, spoil
from tests.faults.storage_states import STEPS, Place, Saving, forked
from tests.stage import furnish

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = "exec hpc train tiny.yaml launch.cluster=local launch.budgets.storage=0"
WAIT_S = 180.0


class Typed:
    """A command as a user types it, in a folder of theirs."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.output = folder, folder / "output.txt"
        environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        with self.output.open("ab") as file:
            self.process = subprocess.Popen(
                text, shell=True, cwd=folder, env=environ, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT
            )

    def wait(self, condition: Callable[[], Any], what: str, unless: str = "no such file") -> None:
        """`unless`: a file that says that it is too late."""
        end = time.monotonic() + WAIT_S
        while not condition():
            late = self.process.poll() is not None or (self.folder / unless).exists() or time.monotonic() > end
            assert not late, f"waited for {what}\n{self.told()}"
            time.sleep(0.02)

    def ended(self) -> int:
        try:
            return self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end\n{self.told()}") from None

    def told(self) -> str:
        return self.output.read_text()


@contextmanager
def typed(folder: Path, text: str) -> Iterator[Typed]:
    command = Typed(folder, text)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                command.process.wait(30)
        command.process.kill()


def the_run(folder: Path) -> RunDir:
    """The only run; before it is there a folder that is not there."""
    return RunDir(next((folder / "runs").glob("tiny-*"), folder / "none"))


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.read_events() if event["event"] == kind]


# B5: a limit on files, and a disk that fills.


def file_limit(folder: Path, number: int) -> str:
    """A real RLIMIT_FSIZE, at any byte: the one before stays, and with enough it goes on."""
    place = Place.new(folder / "run")
    with Saving(place, 1) as saving:
        saving.save(1)
    sizes = sorted(path.stat().st_size for path in (place.checkpoints / checkpoint.name_of(1, 1)).iterdir())

    def limited(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(checkpoint.StorageError, match="ulimit -f"):
            room(place.checkpoints, limit + 1)
        with suppress(checkpoint.StorageError), Saving(place, 2) as saving:
            for step in range(2, STEPS):
                saving.save(step, wait=False)
                with suppress(checkpoint.StorageError):
                    saving.saver.wait()
            os._exit(0)
        signal.raise_signal(signal.SIGALRM)

    for limit in (0, 100, *(size - 1 for size in sizes)):
        assert forked(lambda limit=limit: limited(limit), folder / "child.txt") == -signal.SIGALRM, f"{limit} bytes do"
        assert key(place.load()) == (1, 1) and len(place.asides()) <= 1, f"{limit} bytes: {place.asides()}"
    goes_on(place, 3)
    return f"{2 + len(sizes)} limits"


IN_MEMORY = """unshare -rm sh -c '
mount -t tmpfs -o size=16m tmpfs runs || exit 99
hpc train tiny.yaml launch.cluster=local launch.budgets.storage=0 train.ledger=false; echo $? > first.txt
read next
hpc train tiny.yaml launch.cluster=local launch.budgets.storage=0 "model={name: resnet3d_tiny, width: 64}"
echo $? > second.txt
read next'"""
GOES_ON, AGAIN = "training goes on", "written again"


def full_disk(folder: Path, number: int) -> str:
    """A real file system of 16 MiB fills while a run saves, and has room again; a second run never has any."""
    furnish(folder, here=True)
    (folder / "runs").mkdir()
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder / "runs")]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip(f"no file system of a process's own can be mounted here ({' '.join(mount[:-1])})")
    with typed(folder, IN_MEMORY) as command:
        command.wait(lambda: _inside(command) is not None, "the file system in memory")
        runs = _inside(command)
        assert runs is not None
        command.wait(lambda: len(_saved(runs)) >= 2, "two checkpoints", "first.txt")
        _fill(runs / "ballast", 0)
        before = set(_saved(runs))
        command.wait(lambda: GOES_ON in command.told(), "a save that fails", "first.txt")
        assert set(_saved(runs)) <= before, "something was saved on a full disk"
        assert checkpoint.verify(_saved(runs)[-1]), "the newest one"
        asides = list(runs.glob("tiny-*/checkpoints/.*"))
        assert len(asides) <= 1, f"left aside: {asides}"
        (runs / "ballast").unlink()
        _end(command, "first.txt", ExitCode.DONE)
        [result] = runs.glob("tiny-*/result.json")
        assert checkpoint.verify(_saved(runs)[-1]).step == read_json(result)["steps"], command.told()
        assert AGAIN in command.told(), command.told()
        _refused(command, runs)
    return "trained on with a full disk and saved again; refused at the start with exit code 74"


def _saved(runs: Path) -> list[Path]:
    """Seen through /proc: nothing here may resolve a path."""
    return sorted(runs.glob("tiny-*/checkpoints/g*"), key=lambda path: path.name)


def _end(command: Typed, file: str, code: ExitCode) -> None:
    command.wait(lambda: (command.folder / file).exists() and (command.folder / file).read_text(), f"{file}, {code!r}")
    assert int((command.folder / file).read_text()) == code, command.told()


def _refused(command: Typed, runs: Path) -> None:
    [first] = runs.glob("tiny-*")
    _fill(runs / "ballast", 6 << 20)
    assert command.process.stdin is not None
    command.process.stdin.write(b"\n")
    command.process.stdin.flush()
    _end(command, "second.txt", ExitCode.STORAGE)
    [second] = set(runs.glob("tiny-*")) - {first}
    assert not list(second.glob("checkpoints/g*")) and not (second / "metrics.jsonl").exists(), "it trained"
    assert re.search("free, and two checkpoints need .*: free some space", command.told()), command.told()
    command.process.stdin.close()


def _inside(command: Typed) -> Path | None:
    """runs/ as the command sees it: its mounts are its own, and end with it."""
    pid = command.process.pid
    for child in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        seen = Path(f"/proc/{child}/root{command.folder}/runs")
        with suppress(OSError):
            if os.path.ismount(seen) or seen.stat().st_dev != command.folder.stat().st_dev:
                return seen
    return None


def _fill(ballast: Path, left: int) -> None:
    """So that `left` bytes stay free."""
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while (free := shutil.disk_usage(ballast.parent).free) > left:
            file.write(bytes(min(1 << 16, free - left)))


# B7: all are bad.


def all_corrupt(folder: Path, number: int) -> str:
    furnish(folder, here=True)
    with typed(folder, TRAIN) as command:
        command.wait(lambda: len(events(the_run(folder), "checkpoint")) >= 2, "two checkpoints")
        command.process.send_signal(signal.SIGTERM)
        assert command.ended() == ExitCode.STOPPED, command.told()
    run = the_run(folder)
    for path in checkpoint.newest_first(run.checkpoints):
        spoil(path)
    there, lines = _contents(run), run.metrics.read_text() if run.metrics.exists() else ""
    for generation in (2, 3):
        with typed(folder, "hpc resume tiny") as command:
            assert command.ended() == 0, command.told()
        end = time.monotonic() + WAIT_S
        while not (ended := [event for event in events(run, "end") if event["generation"] == generation]):
            assert time.monotonic() < end, f"attempt {generation} does not end\n{_output(run)}"
            time.sleep(0.05)
        assert ended[0]["code"] == ExitCode.STORAGE and not ended[0]["again"], f"{ended}\n{_output(run)}"
        assert _contents(run) == there, f"changed or deleted: {sorted(there.items() ^ _contents(run).items())}"
        assert "no good checkpoint" in _output(run) and "hpc submit" in _output(run), _output(run)
    assert (run.metrics.read_text() if run.metrics.exists() else "") == lines, "it started afresh"
    return f"{len(there)} files kept, 2 x exit code 74"


def _output(run: RunDir) -> str:
    return "\n".join(path.read_text() for path in sorted(run.logs.glob("*")) if path.is_file())


def _contents(run: RunDir) -> dict[str, str]:
    """Digest of every file of a checkpoint, wherever it is now."""
    files = [path for base in (run.checkpoints, run.quarantine) for path in base.glob("g*/*") if base.is_dir()]
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "reason.txt"
    }


# B9: a slow disk.

WRITE_S = 0.4
SLOW = """
import sys
import time
from pathlib import Path

import torch
from torch import nn

from models3d import create_model

sys.path.append({root!r})
from tests.faults.shim import WRITES, Shim


class Slow(nn.Module):
    def __init__(self, in_channels, num_classes, pause=0.0):
        super().__init__()
        small = dict(width=4, layers=1, downsample=[], stem_stride=2)
        self.body = create_model("resnet3d_tiny", in_channels=in_channels, num_classes=num_classes, **small)
        self.pause = pause
        if torch.get_default_device().type != "meta":  # in the job: its disk is slow from now on
            disk = Path(sys.argv[1]) / "checkpoints"
            Shim(disk, lambda call: time.sleep({write_s} * (call.name in WRITES))).__enter__()

    def forward(self, x):
        if self.training and not x.is_meta:
            time.sleep(self.pause)
        return self.body(x)
"""


def slow_disk(folder: Path, number: int) -> str:
    """Each write of a checkpoint sleeps; the training goes on beside it, and SIGTERM comes while one is written."""
    furnish(folder, here=True)
    (folder / "slow.py").write_text(SLOW.format(root=str(ROOT), write_s=WRITE_S))
    options = "model.name=file:slow.py:Slow train.ledger=false"
    with typed(folder, f"{TRAIN} {options} train.epochs=100") as command:
        command.wait(lambda: len(events(the_run(folder), "checkpoint")) >= 2, "two checkpoints")
        run = the_run(folder)
        command.wait(lambda: list(run.checkpoints.glob(".g*")), "a save under way")
        command.process.send_signal(signal.SIGTERM)
        assert command.ended() == ExitCode.STOPPED, command.told()
    saves = events(run, "checkpoint")
    # The save that it stops for may wait for the best one's buffer: by then the training has ended.
    beside = [save for save in saves if save["step"] != read_json(run.stop)["step"]]
    shares = [save["stall"] / save["seconds"] for save in beside]
    assert min(save["seconds"] for save in saves) > 2 * WRITE_S, "the disk was not slow: the case proves nothing"
    assert max(shares) < 0.1, f"the training stood still for {max(shares):.0%} of a save"
    stop, found = read_json(run.stop), checkpoint.verify(next(checkpoint.newest_first(run.checkpoints)))
    assert stop["step"] == found.step == saves[-1]["step"], f"stopped at {stop}, {found.name} is the newest"
    return f"{len(beside)} saves, stall {100 * max(shares):.1f} % of a save"
