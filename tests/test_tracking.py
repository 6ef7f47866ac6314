"""Events as TensorBoard's own reader and ours show them after kills and resumes, and on a disk that is full."""

import logging
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc import ledger
from hpc.attempt import process_start
from hpc.errors import UserError
from hpc.experiment import validate
from hpc.logs import series
from hpc.rundir import RunDir, read_json, write_json
from jobs.record import Recorder
from jobs.tracking import Tracker
from tests.tiny_run import in_child


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def attempt(run: RunDir, generation: int, resumed: int, last: int, closed: bool = True) -> None:
    """Log steps resumed + 1 to last, every fourth with an evaluation."""
    tracker = Tracker(run, generation, resumed)
    for step in range(resumed + 1, last + 1):
        tracker.scalars(step, {"step/loss": generation + step / 100})
        if step % 4 == 0:
            tracker.scalars(step, {"validation/accuracy": step / 100})
            tracker.evaluation({"step": step, "split": "validation", "metrics": {"accuracy": step / 100}})
    if closed:
        tracker.close()
    else:
        tracker.flush(10)


def killed_attempt(folder: str, generation: int, resumed: int, last: int) -> None:
    attempt(RunDir(folder), generation, resumed, last, closed=False)
    os._exit(9)


def shown(run: RunDir, tag: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard's reader has them; our own reader must agree."""
    accumulator = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    accumulator.Reload()
    theirs = [(event.step, round(event.value, 4)) for event in accumulator.Scalars(tag)]
    ours = series.scalars(run.tensorboard)[tag]
    assert [step for step, *_ in ours] == [step for step, _ in theirs]
    return theirs


def test_a_resumed_run_shows_each_step_once_with_its_last_value(run: RunDir) -> None:
    attempt(run, 1, 0, 10)
    attempt(run, 2, 6, 9)
    attempt(run, 3, 8, 12)
    expected = [1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 2.07, 2.08, 3.09, 3.10, 3.11, 3.12]
    assert shown(run, "step/loss") == list(enumerate(expected, start=1))
    # the saved step's own evaluation stays, those of lost steps go
    assert [step for step, _ in shown(run, "validation/accuracy")] == [4, 8, 12]
    assert [(line["step"], line["generation"]) for line in run.read_metrics()] == [(4, 1), (8, 2), (12, 3)]
    names = sorted(path.name for path in run.tensorboard.iterdir())
    assert [name[-5:] for name in names] == [".g001", ".g002", ".g003"]
    assert len({name.split(".")[3] for name in names}) == 3, "two in one second: readers order them by host name"


def test_a_run_killed_before_its_first_save_shows_only_the_second_attempt(run: RunDir) -> None:
    assert in_child(killed_attempt, str(run.path), 1, 0, 3) == 9
    attempt(run, 2, 0, 5)
    assert shown(run, "step/loss") == [(step, 2 + step / 100) for step in range(1, 6)]


def test_events_that_were_flushed_survive_a_kill(run: RunDir) -> None:
    assert in_child(killed_attempt, str(run.path), 1, 0, 7) == 9
    attempt(run, 2, 7, 9)
    assert [step for step, _ in shown(run, "step/loss")] == list(range(1, 10))


def open_a_second_attempt(folder: str) -> None:
    tracker = Tracker(RunDir(folder), 2, 0)
    tracker.scalars(1, {"a": 1.0})
    tracker.close()


def test_a_clock_that_is_ahead_on_another_node_does_not_hold_the_training_up(run: RunDir) -> None:
    run.tensorboard.mkdir()
    (run.tensorboard / f"events.out.tfevents.{int(time.time()) + 3600}.node7.1.0.g001").touch()
    assert in_child(open_a_second_attempt, str(run.path)) == 0
    assert len(list(run.tensorboard.glob("*.g002"))) == 1


def log_on_a_full_disk(folder: str, limit: int) -> None:
    logging.basicConfig(filename=Path(folder) / "log.txt")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run = RunDir(Path(folder) / "run")
    run.path.mkdir()
    tracker = Tracker(run, 1, 0)
    for step in range(1, 400):
        tracker.scalars(step, {"a": 1.0, "b": 2.0})
        if step % 100 == 0:
            tracker.picture(step, "picture", np.zeros((480, 640, 3), np.uint8))
            tracker.evaluation({"step": step, "split": "validation", "metrics": {}})
            tracker.flush()
    tracker.close()
    os._exit(17)


@pytest.mark.parametrize("limit", [0, 10, 90, 5000])
def test_a_full_disk_turns_the_events_off_with_one_warning(tmp_path: Path, limit: int) -> None:
    assert in_child(log_on_a_full_disk, str(tmp_path), limit) == 17
    if limit >= 5000:  # below, the warning itself finds no room
        assert (tmp_path / "log.txt").read_text().count("events are off") == 1
        assert [line["step"] for line in RunDir(tmp_path / "run").read_metrics()] == [100, 200, 300]


def test_a_folder_that_cannot_be_made_turns_logging_off(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    run.tensorboard.write_text("a file where the folder should be")
    tracker = Tracker(run, 1, 0)
    tracker.scalars(1, {"a": 1.0})
    tracker.close()
    assert caplog.text.count("events are off") == 1


def test_a_record_that_cannot_be_written_warns_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir(tmp_path)
    experiment = validate({"name": "a", "model": {"name": "m"}, "data": {"file": "f"}}, "test")
    recorder = Recorder(run, experiment, ["a", "b"], 1, (0, 10, 5))
    run.events.write_text("a file where a folder should be")
    recorder.event("checkpoint", step=1)
    recorder.event("checkpoint", step=2)
    assert len([r for r in caplog.records if "not recorded" in r.message]) == 1
    run.events.unlink()
    recorder.event("checkpoint", step=3)
    assert [event["step"] for event in run.read_events()] == [3]


def test_an_attempt_that_its_script_has_ended_writes_no_progress(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    experiment = validate({"name": "a", "model": {"name": "m"}, "data": {"file": "f"}}, "test")
    recorder = Recorder(run, experiment, ["a", "b"], 1, (0, 10, 5))
    write_json(run.state, {"generation": 1, "phase": "ended", "code": 137})
    with pytest.raises(UserError, match="ended this attempt"):
        recorder.state("training", 3, None, force=True)
    assert read_json(run.state)["code"] == 137


def test_a_state_that_an_older_attempt_wrote_back_does_not_end_this_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    experiment = validate({"name": "a", "model": {"name": "m"}, "data": {"file": "f"}}, "test")
    run.event("start", "shell", 2)
    write_json(run.state, {"generation": 2, "job": "7"})
    recorder = Recorder(run, experiment, ["a", "b"], 2, (0, 10, 5))
    write_json(run.state, {"generation": 1, "phase": "ended", "job": "6"})
    recorder.state("training", 3, None, force=True)
    assert {key: read_json(run.state)[key] for key in ("generation", "job", "step")} == {
        "generation": 2,
        "job": "7",
        "step": 3,
    }
    run.event("start", "shell", 3)
    with pytest.raises(UserError, match="held by generation 3"):
        recorder.hold()


def test_a_run_that_writes_its_result_is_running_until_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a run that waits for it would give up in that moment."""
    run = RunDir(tmp_path)
    experiment = validate({"name": "a", "model": {"name": "m"}, "data": {"file": "f"}}, "test")
    write_json(run.experiment, {})
    held = {"pid": os.getpid(), "process_start": process_start(os.getpid()), "host": os.uname().nodename}
    write_json(run.state, {"generation": 1, "job": None, "phase": "evaluating", "time": time.time(), **held})
    recorder, seen = Recorder(run, experiment, ["a", "b"], 1, (5, 5, 5)), []
    recorder.sample_usage = lambda: seen.append(ledger.statuses([run])[0].state)
    metrics = {"loss": 1.0, "accuracy": 0.5}
    line = {"epoch": 1, "step": 5, "metrics": metrics, "checkpoint": None, "matrix": [[1, 1], [1, 1]]}
    line |= {"per_class": [], "baseline": {"accuracy": 0.5}}
    recorder.result(5, line, line)
    assert [*seen, ledger.statuses([run])[0].state] == ["running", "finished"]
