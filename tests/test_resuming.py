"""Where a run goes on: ranks that read different checkpoints, storage that does not answer, a saver that ends late."""

import errno
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpc.allocation import Allocation
from hpc.errors import UserError
from hpc.preempt import ExitCode
from hpc.rundir import RunDir
from jobs import checkpoint, resuming
from jobs.checkpoint import Snapshot, StorageError
from jobs.engine import Engine
from jobs.precision import Fault
from tests import tiny_run
from tests.tiny_run import in_child


class Ranks(Engine):
    """An engine of one rank, told what the others hold."""

    def __init__(self, others: list[list[int]]) -> None:
        super().__init__(Allocation(node="n0"), torch.device("cpu"), deterministic=True, token="run 1")
        self._others = others

    def max(self, values: Any) -> list[int]:
        both = [[*other, *(-value for value in other)] for other in self._others]
        return [max(column) for column in zip(values, *both, strict=True)]


def write(folder: Path, step: int) -> None:
    optimizer = {"state": {}, "param_groups": []}
    Snapshot().take(1, step, {"weight": torch.full((3,), float(step))}, optimizer, {}, {"data": "d"}).write(folder)


@pytest.mark.parametrize("other", [[1, 3], [2, 4], [-1, -1]], ids=["older", "of another generation", "none"])
def test_ranks_that_read_different_checkpoints_do_not_train(other: list[int], tmp_path: Path) -> None:
    write(tmp_path, 4)
    found = checkpoint.load_newest(tmp_path, tmp_path / "quarantine")
    resuming.agree(Ranks([[1, 4], [1, 4]]), tmp_path, found)
    with pytest.raises(StorageError, match=r"do not see the same checkpoint: rank 0 on n0 reads g001-s00000004"):
        resuming.agree(Ranks([[1, 4], other]), tmp_path, found)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> list[str]:
    """Reading from this checkpoint says EIO so often; what was asked for."""
    real, asked = os.preadv, []

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if name in path and len(asked) < times:
            asked.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(checkpoint, "_PAUSE_S", 0.0)
    return asked


def test_a_read_error_that_passes_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 4)
    asked = failing(monkeypatch, "s00000004", 2)
    found = checkpoint.load_newest(tmp_path, tmp_path / "quarantine")
    assert found and found.step == 4 and len(asked) == 2


def test_a_read_error_that_stays_condemns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, quarantine = tmp_path / "checkpoints", tmp_path / "quarantine"
    folder.mkdir(mode=0o700)
    write(folder, 3)
    write(folder, 4)
    failing(monkeypatch, "s00000004", 99)
    found = checkpoint.load_newest(folder, quarantine)
    assert found and found.step == 3, "an older one that can be read"
    failing(monkeypatch, "s0000000", 99)
    with pytest.raises(StorageError) as raised:
        checkpoint.load_newest(folder, quarantine)
    assert raised.value.errno == errno.EIO
    assert not quarantine.exists() and len(list(checkpoint.newest_first(folder))) == 2


def test_a_bad_one_that_cannot_be_moved_keeps_no_older_one_from_being_read(tmp_path: Path) -> None:
    folder, quarantine = tmp_path / "checkpoints", tmp_path / "quarantine"
    folder.mkdir(mode=0o700)
    write(folder, 3)
    write(folder, 4)
    (folder / "g001-s00000004" / "model.safetensors").write_bytes(b"cut")
    quarantine.write_text("a file of the user's")
    found = checkpoint.load_newest(folder, quarantine)
    assert found and found.step == 3
    assert quarantine.read_text() == "a file of the user's"


def reads_back_slowly(folder: Path, data: Path) -> None:
    """The last checkpoint is read back for longer than the figures take to draw."""
    run, readable = tiny_run.make_run(folder / "run", data, "train.keep=1"), checkpoint.readable

    def slow(path: Path, cancelled: Any = lambda: False) -> bool:
        if checkpoint.step_of(path.name) == tiny_run.STEPS:
            time.sleep(4)
        return readable(path, cancelled)

    checkpoint.readable = slow  # type: ignore[assignment]
    assert tiny_run.train(run, save_always=True) == "done"
    os._exit(ExitCode.DONE if run.result.exists() else ExitCode.CRASH)


def test_a_run_is_finished_once_its_last_checkpoint_is_read_back(tmp_path: Path) -> None:
    assert in_child(reads_back_slowly, tmp_path, tiny_run.make_data(tmp_path)) == ExitCode.DONE


def evaluates(folder: Path, generation: int, boundary: int | None, number: int) -> None:
    """An attempt whose checkpoints reach the disk only where it stops for them."""
    write = Snapshot.write

    def late(snapshot: Snapshot, *given: Any) -> Path:
        time.sleep(60 if number == signal.SIGKILL else 0)
        return write(snapshot, *given)

    Snapshot.write = late  # type: ignore[method-assign]
    answer = tiny_run.train(RunDir(folder), generation, boundary, number)
    os._exit(ExitCode.STOPPED if answer == "stopped" else ExitCode.DONE)


def test_an_evaluation_that_is_done_again_is_shown_once(tmp_path: Path) -> None:
    """Stopped twice in the evaluation of step 8, killed after it, before the checkpoint that knows of it is durable."""
    run = tiny_run.make_run(tmp_path / "run", tiny_run.make_data(tmp_path))
    assert in_child(evaluates, run.path, 1, 12, signal.SIGTERM) == ExitCode.STOPPED
    assert in_child(evaluates, run.path, 2, 2, signal.SIGTERM) == ExitCode.STOPPED
    assert in_child(evaluates, run.path, 3, 6, signal.SIGKILL) == -signal.SIGKILL
    assert tiny_run.newest(run).step == 8 and tiny_run.shown_steps(run, "validation/accuracy") == [4, 8]
    assert in_child(evaluates, run.path, 4, None, signal.SIGTERM) == ExitCode.DONE
    assert tiny_run.shown_steps(run, "validation/accuracy") == [4, 8, 12]
    assert tiny_run.shown_steps(run, "step/loss") == list(range(1, tiny_run.STEPS + 1))


def resumes(folder: Path) -> None:
    tiny_run.make_trainer(RunDir(folder), 2).resume()


def is_refused(folder: Path, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resumes(folder)
    os._exit(ExitCode.BAD_INPUT)


def test_a_checkpoint_of_another_experiment_is_refused_and_its_difference_named(tmp_path: Path) -> None:
    data = tiny_run.make_data(tmp_path)
    one = tiny_run.make_run(tmp_path / "one", data, "train.seed=7")
    other = tiny_run.make_run(tmp_path / "other", data)
    elsewhere = tiny_run.make_run(tmp_path / "elsewhere", data, "train.seed=7", "launch.time=3h", "name=renamed")
    assert in_child(evaluates, one.path, 1, 2, signal.SIGTERM) == ExitCode.STOPPED
    for run in (other, elsewhere):
        shutil.copytree(one.checkpoints, run.checkpoints)
    assert in_child(resumes, elsewhere.path) == 0
    words = "s00000001 was saved by another experiment: its train.seed is 7, not 0. Move it away"
    assert in_child(is_refused, other.path, words) == ExitCode.BAD_INPUT


def test_each_change_of_the_data_needs_a_consent_of_its_own(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    experiment: Any = SimpleNamespace(data=SimpleNamespace(file="scans.h5"))

    def asked(before: str, now: str) -> bool:
        found: Any = SimpleNamespace(manifest={"data": before}, name="g001-s00000001")
        volumes: Any = SimpleNamespace(fingerprint=now)
        try:
            assert resuming.compare_data(run, experiment, volumes, found) == before
        except UserError:
            return True
        run.event("data-changed", "rank0", 1, before=before, now=now)
        return False

    for before, now in (("a", "b"), ("b", "a"), ("a", "b")):
        assert asked(before, now)
        run.event("accept-data-change", "login")
        assert [asked(before, now) for _ in range(3)] == [False] * 3, "killed before a save: the same consent"


def rolls_back_to_an_epochs_end(folder: Path) -> None:
    """Goes on at step 8, whose evaluation is due, does not improve there, and meets bad losses at steps 14 to 18."""
    run = RunDir(folder)
    trainer = tiny_run.make_trainer(run, 2)
    trainer.resume()
    gradients, judge, sums = trainer.learner.update.gradients, trainer._judge, []
    bad = set(range(14, 19))

    def spoilt(batch: Any, step: int) -> Any:
        counts, is_bad = gradients(batch, step)
        is_bad = Fault.NOT_FINITE if step + 1 in bad else is_bad
        bad.discard(step + 1)
        return counts, is_bad

    def no_better(scores: Any) -> None:
        sums.append(trainer.sums.counts.samples)
        judge(scores)
        if trainer.step == 8:
            trainer.state["best"] = trainer.state["best"] | {"step": 4}

    trainer.learner.update.gradients, trainer._judge = spoilt, no_better  # type: ignore[method-assign]
    trainer.fit()
    trainer.close()
    (folder / "sums").write_text(" ".join(map(str, sums)))
    os._exit(0)


def test_an_evaluation_that_is_due_where_a_run_goes_back_to_is_done(tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", tiny_run.make_data(tmp_path), "train.epochs=5")
    assert in_child(evaluates, run.path, 1, 12, signal.SIGTERM) == ExitCode.STOPPED
    assert in_child(rolls_back_to_an_epochs_end, run.path) == 0
    assert [event["step"] for event in run.read_events() if event["event"] == "rollback"] == [8]
    assert tiny_run.shown_steps(run, "validation/loss") == [4, 8, 12, 16, 20]
    assert [line["step"] for line in run.read_metrics()] == [4, 8, 12, 16, 20]
    assert (run.path / "sums").read_text().split() == ["16", "16", "4", "16", "0", "0", "8"], "training samples"


def bad_on_one_rank(folder: Path, rank: int, port: int) -> None:
    """Rank 1 alone has a loss that is no number, at step 3."""
    place = Allocation(rank, 2, rank, cpus_per_task=1, master_port=port)
    trainer = tiny_run.make_trainer(RunDir(folder), 1, None, place)
    trainer.resume()
    backward = trainer.learner.passes.backward

    def spoilt(batch: Any, step: int) -> Any:
        if rank == 1 and step == 2:
            batch.inputs.fill_(float("nan"))
            (folder / "spoilt").write_text("\n".join(trainer.samples.ids(batch)))
        return backward(batch, step)

    trainer.learner.passes.backward = spoilt  # type: ignore[method-assign]
    trainer.fit()
    os._exit(0)


def test_a_skipped_step_names_the_samples_that_were_bad(tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", tiny_run.make_data(tmp_path), "train.epochs=1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [tiny_run.CONTEXT.Process(target=bad_on_one_rank, args=(run.path, rank, port)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(tiny_run.CHILD_LIMIT_S)
    assert [process.exitcode for process in ranks] == [0, 0]
    told = [event for event in run.read_events() if event["event"] == "skipped"]
    assert {event["step"] for event in told} == {3} and len(told) == 2
    named = sorted(name for event in told for name in event["samples"])
    assert named == sorted((run.path / "spoilt").read_text().split()), "rank 0's own samples were good"
