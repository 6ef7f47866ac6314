"""The Saver: what the training waits for, what it gets to know, and what is on the disk after every fault."""

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpc.errors import UserError
from jobs import checkpoint, saving
from jobs.checkpoint import StorageError
from jobs.saving import Saver
from tests.test_checkpoint import moments, same, spoil, steps, tensors

CPU = torch.device("cpu")


class Gate:
    """Stands in the fence: the writing thread stops there until it is let through."""

    def __init__(self) -> None:
        self.arrived, self._passes, self.open = threading.Semaphore(0), threading.Semaphore(0), True

    def __call__(self) -> None:
        if not self.open:
            self.arrived.release()
            assert self._passes.acquire(timeout=60)

    def close(self) -> None:
        self.open = False

    def wait_for_writer(self) -> None:
        assert self.arrived.acquire(timeout=60)

    def let_through(self, last: bool = False) -> None:
        self.open = last
        self._passes.release()


class Bench:
    """A saver in a folder of its own, its reports, and a disk whose calls can be made to fail."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.gate = folder, Gate()
        self.reports: list[tuple[str, dict[str, Any]]] = []
        self._patch = monkeypatch
        self.saver = self.make()

    def make(self, keep: int = 2, **options: Any) -> Saver:
        self.saver = Saver(
            self.folder,
            1,
            keep=keep,
            device=CPU,
            fence=options.pop("fence", self.gate),
            report=lambda kind, **fields: self.reports.append((kind, fields)),
            **options,
        )
        return self.saver

    def save(self, step: int, protect: set[str] | None = None, wait: bool = False) -> str:
        return self.saver.save(step, tensors(step), moments(step), {"step": step}, {"f": 1}, protect or set(), wait)

    def failing(self, name: str, code: int, when: Callable[[int], bool] = lambda count: True) -> list[int]:
        """os.<name> raises at those of its calls; the list has their count."""
        real, calls = getattr(os, name), [0]

        def call(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if when(calls[0]):
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        self._patch.setattr(os, name, call)
        return calls

    def recording(self, name: str, seen: list[str]) -> None:
        """`seen` gets the names of what os.<name> is called for."""
        real = getattr(os, name)
        self._patch.setattr(os, name, lambda path, *rest: seen.append(Path(path).name) or real(path, *rest))

    def heal(self) -> None:
        self._patch.undo()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.reports]

    def loads(self, step: int) -> bool:
        found = checkpoint.verify(self.folder / checkpoint.name_of(1, step))
        return same(found.model(), tensors(step)) and found.state() == {"step": step}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(tmp_path / "checkpoints", monkeypatch)
    yield made
    monkeypatch.undo()
    made.gate.open = True


# What is saved.


def test_the_caller_may_change_everything_at_once(bench: Bench) -> None:
    bench.gate.close()
    model, optimizer, state = tensors(3), moments(3), {"step": 3, "deep": [1]}
    protect: set[str] = set()
    name = bench.saver.save(3, model, optimizer, state, {"world_size": 2}, protect)
    bench.gate.wait_for_writer()
    assert bench.saver.busy
    for value in (*model.values(), *optimizer["state"][0].values()):
        value.zero_()
    state["deep"].append(2)
    bench.gate.let_through(last=True)
    bench.saver.wait()
    assert not bench.saver.busy
    found = checkpoint.verify(bench.folder / name)
    assert same(found.model(), tensors(3)) and same(found.optimizer()["state"][0], moments(3)["state"][0])
    assert found.state() == {"step": 3, "deep": [1]} and found.manifest["world_size"] == 2


def test_wait_returns_when_it_is_durable_and_a_name_is_written_once(bench: Bench) -> None:
    assert bench.saver.slow_s is None
    assert bench.save(4, wait=True) == "g001-s00000004"
    assert bench.loads(4)
    before = (bench.folder / "g001-s00000004").stat().st_ino
    bench.save(4, wait=True)
    bench.saver.close()
    assert (bench.folder / "g001-s00000004").stat().st_ino == before
    [(kind, fields)] = bench.reports
    assert kind == "checkpoint" and fields["step"] == 4 and fields["name"] == "g001-s00000004"
    assert 0 <= fields["stall"] <= fields["seconds"]
    assert bench.saver.slow_s is not None and not bench.saver.failed


def test_a_name_that_was_set_aside_is_written_again(bench: Bench) -> None:
    bench.save(4, wait=True)
    checkpoint.set_aside(bench.folder / "g001-s00000004", bench.folder.parent / "quarantine", "went back")
    bench.save(4, wait=True)
    assert bench.loads(4)


def test_two_buffers_serve_all_saves(bench: Bench) -> None:
    contents = set()
    for step in range(1, 21):
        bench.save(step, wait=step % 3 == 0)
        bench.saver.wait()
        contents |= {id(snapshot.pages.files["model.safetensors"]) for snapshot in bench.saver._free}
    bench.saver.close()
    assert len(contents) == 2
    assert steps(bench.folder) == [19, 20] and bench.kinds() == ["checkpoint"] * 20


def test_what_cannot_be_saved_is_the_callers_error_and_costs_no_buffer(bench: Bench) -> None:
    for _ in range(3):
        with pytest.raises(TypeError, match="complex64"):
            bench.saver.save(1, {"w": torch.ones(1).to(torch.complex64)}, {}, {}, {}, set())
        with pytest.raises(TypeError):
            bench.saver.save(1, {}, {}, {"x": object()}, {}, set())
    bench.save(1, wait=True)


# One is written, one waits.


def test_of_those_that_wait_only_the_newest_is_written(bench: Bench) -> None:
    bench.gate.close()
    bench.save(1)
    bench.gate.wait_for_writer()
    for step in (2, 3, 4):
        bench.save(step)
    bench.gate.let_through(last=True)
    bench.saver.wait()
    bench.saver.close()
    assert steps(bench.folder) == [1, 4] and bench.loads(4)
    assert bench.saver.failed == {"g001-s00000002", "g001-s00000003"}


@pytest.mark.parametrize("why", ["protected", "milestone"])
def test_one_that_is_to_stay_is_never_dropped_for_a_newer_one(bench: Bench, why: str) -> None:
    bench.make(keep=1, keeps=lambda step: why == "milestone" and step == 2)
    protect = {"g001-s00000002"} if why == "protected" else set()
    bench.gate.close()
    bench.save(1)
    bench.gate.wait_for_writer()
    bench.save(2, protect)
    newer = threading.Thread(target=bench.save, args=(3, protect, True))  # must wait for a buffer
    newer.start()
    bench.gate.let_through(last=True)
    newer.join(60)
    assert not newer.is_alive()
    bench.saver.close()
    assert steps(bench.folder) == [2, 3] and not bench.saver.failed


def test_a_save_that_is_awaited_puts_off_reading_back_and_deleting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.make(keep=1)
    reading, seen = threading.Event(), []

    def readable(path: Path, cancelled: Callable[[], bool]) -> bool:
        if path.name == "g001-s00000001":
            reading.set()
            while not cancelled():  # a slow disk
                threading.Event().wait(0.005)
            seen.append(path.name)
        return True

    monkeypatch.setattr(checkpoint, "readable", readable)
    bench.save(1)
    assert reading.wait(60)
    bench.save(2, wait=True)
    bench.saver.close()
    assert seen == ["g001-s00000001"] and steps(bench.folder) == [2]


# Retention.


def test_the_newest_the_best_and_the_milestones_stay(bench: Bench) -> None:
    bench.make(keep=2, keeps=lambda step: step % 4 == 0)
    for step in range(1, 11):
        bench.save(step, {"g001-s00000003"}, wait=True)
    bench.saver.close()
    assert steps(bench.folder) == [3, 4, 8, 9, 10]
    assert not list(bench.folder.glob(".*"))


def test_what_does_not_read_back_deletes_nothing_and_is_known_to_have_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.make(keep=1)
    bench.save(1, wait=True)
    real = checkpoint.readable

    def readable(path: Path, *rest: Any) -> bool:
        if path.name == "g001-s00000002":
            spoil(path)  # between the commit and the reading
        return real(path, *rest)

    monkeypatch.setattr(checkpoint, "readable", readable)
    bench.save(2, wait=True)
    bench.saver.close()
    assert bench.loads(1) and bench.saver.failed == {"g001-s00000002"}
    assert bench.kinds() == ["checkpoint", "checkpoint", "save-failed"]
    assert "does not read back" in bench.reports[-1][1]["reason"]


def test_the_old_best_stays_while_the_new_one_is_not_durable(bench: Bench) -> None:
    bench.make(keep=1)
    bench.save(1, {"g001-s00000001"}, wait=True)
    bench.failing("fsync", errno.EIO)
    with pytest.raises(StorageError):
        bench.save(2, {"g001-s00000002"}, wait=True)
    bench.heal()
    for step in (3, 4):
        bench.save(step, {"g001-s00000002"}, wait=True)
    bench.saver.close()
    assert steps(bench.folder) == [1, 4] and bench.saver.failed == {"g001-s00000002"}


def test_deletion_that_fails_is_no_failed_save(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.make(keep=1)
    bench.save(1, wait=True)
    bench.failing("rmdir", errno.EIO)
    bench.save(2, wait=True)
    bench.saver.close()
    assert bench.kinds() == ["checkpoint"] * 2 and "not deleted for now" in caplog.text
    bench.heal()
    bench.make(keep=1)
    bench.save(3, wait=True)
    bench.saver.close()
    assert [path.name for path in bench.folder.iterdir()] == ["g001-s00000003"]


# A disk that fails.


FAULTS = [("mkdir", 1), ("open", 1), ("open", 4), ("write", 1), ("write", 4), ("rename", 1)]
FAULTS += [("fsync", nth) for nth in range(1, 7)]  # four files, their folder, the folder of all


@pytest.mark.parametrize(("name", "nth"), FAULTS)
def test_a_fault_that_passes_costs_one_more_try_under_a_new_name(bench: Bench, name: str, nth: int) -> None:
    bench.save(1, wait=True)
    bench.saver.close()
    bench.make()
    made: list[str] = []
    bench.recording("mkdir", made)
    bench.failing(name, errno.EIO, lambda count: count == nth)
    bench.save(2, wait=True)
    bench.saver.close()
    assert bench.loads(2) and not bench.saver.failed
    assert bench.kinds() == ["checkpoint", "save-failed", "checkpoint"]
    reason = bench.reports[1][1]["reason"]
    assert str(bench.folder) in reason and "Input/output error (EIO)" in reason and "\n" not in reason
    assert made[-1] == ".g001-s00000002.1" and bench.names() == ["g001-s00000001", "g001-s00000002"]


def test_failures_in_a_row_are_warned_of_once_and_the_fifth_ends_the_run(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    bench.save(1, wait=True)
    bench.saver.close()
    bench.make()
    bench.failing("fsync", errno.ENOSPC)
    for step in range(2, 6):
        bench.save(step)
        with pytest.raises(StorageError, match="No space left on device"):
            bench.saver.wait()  # who waits for it must not take it as saved
        assert bench.names() == ["g001-s00000001"]
    [warning] = caplog.messages
    assert all(word in warning for word in (str(bench.folder), "(ENOSPC)", "free some space", "older checkpoints stay"))
    bench.save(6)
    with pytest.raises(StorageError):
        bench.saver.wait()
    for _ in range(2):
        with pytest.raises(StorageError) as raised:
            bench.save(7)
        assert raised.value.errno == errno.ENOSPC
    assert bench.saver.failed == {checkpoint.name_of(1, step) for step in range(2, 7)}
    assert bench.kinds() == ["checkpoint"] + ["save-failed"] * 10
    assert bench.loads(1)


def test_a_disk_that_recovers_is_used_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for first in (1, 10):
        calls = bench.failing("mkdir", errno.EDQUOT)
        for step in range(first, first + 4):
            with pytest.raises(StorageError, match="quota there is used up"):
                bench.save(step, wait=True)
        assert calls[0] == 8
        bench.heal()
        bench.save(first + 4, wait=True)
        assert bench.loads(first + 4)
    assert len([line for line in caplog.messages if "written again" in line]) == 2


def test_what_cannot_be_removed_is_one_folder_and_the_next_save_removes_it(bench: Bench) -> None:
    bench.save(1, wait=True)
    bench.failing("write", errno.EROFS)
    bench.failing("unlink", errno.EROFS)
    bench.failing("rmdir", errno.EROFS)
    for step in (2, 3):
        with pytest.raises(StorageError, match="read-only"):
            bench.save(step, wait=True)
        assert len(list(bench.folder.glob(".*"))) == 1
    bench.heal()
    bench.save(4, wait=True)
    assert bench.loads(4) and not list(bench.folder.glob(".*"))


def test_what_an_older_attempt_left_and_nobody_can_remove_stops_no_save_and_no_retention(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, left = os.unlink, [bench.folder / ".g000-s00000002.0", bench.folder / ".trash-g000-s00000001"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "held").write_text("as by NFS")

    def unlink(path: str | Path, **options: Any) -> None:
        if Path(path).name == "held":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    for step in range(1, 5):
        bench.save(step, wait=True)
    bench.saver.close()
    assert bench.loads(4) and bench.loads(3)
    assert sorted(path.name for path in bench.folder.iterdir()) == [
        *sorted(folder.name for folder in left),
        "g001-s00000003",
        "g001-s00000004",
    ]
    assert "what an earlier attempt left" in caplog.text and "held" in caplog.text


# Who holds the run, and what else can end it.


def test_who_lost_the_run_commits_and_deletes_nothing(bench: Bench) -> None:
    held = True

    def fence() -> None:
        if not held:
            raise UserError("the run is held by generation 2")

    bench.make(keep=1, fence=fence)
    bench.save(1, wait=True)
    held = False
    with pytest.raises(UserError, match="generation 2"):
        bench.save(2, wait=True)
    for again in (lambda: bench.save(3), bench.saver.wait, bench.saver.close):
        with pytest.raises(UserError, match="generation 2"):
            again()
    assert bench.names() == ["g001-s00000001"]
    assert "g001-s00000002" in bench.saver.failed


def test_the_fence_is_asked_before_a_deletion_too(bench: Bench) -> None:
    asked: list[list[int]] = []

    def fence() -> None:
        asked.append(steps(bench.folder))
        if len(asked) == 3:
            raise UserError("lost")

    bench.make(keep=1, fence=fence)
    bench.save(1, wait=True)
    with pytest.raises(
        UserError, match="lost"
    ):  # from the save, or from close: the deletion follows the commit at once
        bench.save(2, wait=True)
        bench.saver.close()
    assert asked == [[], [1], [1, 2]] and steps(bench.folder) == [1, 2]


def test_any_other_error_of_the_writing_thread_reaches_the_caller(bench: Bench) -> None:
    bench.save(1, wait=True)
    bench.folder.chmod(0o777)
    with pytest.raises(UserError, match="chmod"):
        bench.save(2, wait=True)
    with pytest.raises(UserError, match="chmod"):
        bench.save(3)


LEAVES = """
import sys, threading, torch
from pathlib import Path
from jobs.saving import Saver
arrived = threading.Event()
def never():
    arrived.set()
    threading.Event().wait()
saver = Saver(Path(sys.argv[1]), 1, keep=1, device=torch.device("cpu"), fence=never, report=print)
saver.save(1, {"w": torch.ones(9)}, {}, {}, {}, set())
assert arrived.wait(60)
"""


def test_a_save_under_way_keeps_no_process_alive(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert subprocess.run([sys.executable, "-c", LEAVES, str(folder)], timeout=120, check=False).returncode == 0
    assert [path.name for path in folder.iterdir()] == [".g001-s00000001.0"]
    checkpoint.sweep(folder)
    assert not list(folder.iterdir())


# Space.


def test_what_a_full_checkpoint_will_need_is_known_before_the_first_step() -> None:
    model = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50), nn.Linear(50, 10))
    model[2].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    for optimizer in (
        torch.optim.AdamW(trained),
        torch.optim.Adam(trained, amsgrad=True),
        torch.optim.SGD(trained, lr=0.1, momentum=0.9),
        torch.optim.SGD(trained, lr=0.1),
    ):
        weights, state = saving.estimated_bytes(model, optimizer)
        assert weights == sum(v.nbytes for v in model.state_dict().values())
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor) and v.dim()]
        assert state == sum(value.nbytes for value in held)


def test_no_room_for_two_is_one_line_before_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "yet"
    saving.room(folder, 1000, 2000)
    with pytest.raises(
        StorageError, match=r"has [\d.]+ GB free, and two checkpoints need .* free some space"
    ) as raised:
        saving.room(folder, 1 << 50, 1 << 50)
    assert raised.value.errno == errno.ENOSPC and "\n" not in str(raised.value)
    code = "import resource as r, sys; from jobs import saving; from pathlib import Path\n"
    code += "r.setrlimit(r.RLIMIT_FSIZE, (1500, 1500)); saving.room(Path(sys.argv[1]), 1400, 1400)\n"
    code += "try: saving.room(Path(sys.argv[1]), 1000, 2000)\nexcept OSError as error: print(error.errno, error)"
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    assert out.startswith(f"{errno.EFBIG} ") and "ulimit -f" in out and len(out.splitlines()) == 1
