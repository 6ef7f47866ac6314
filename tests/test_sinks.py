"""Runs replayed to a real MLflow server on loopback: what is there is what happened, once, whatever came in between."""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Run, ViewType
from mlflow.tracking import MlflowClient

from hpc.errors import UserError
from hpc.logs import positions, prune, status
from hpc.logs.following import TimeUp, bounded
from hpc.logs.series import scalars
from hpc.logs.sinks import feed, is_sink, sink_of
from hpc.logs.sinks.mlflow import MlflowSink
from hpc.rundir import write_text
from hpc.sweepdir import Chunk, SweepDir
from tests.mlflow_server import MlflowServer, free_port
from tests.sinkruns import BEGAN, FakeRun, secrets_in

KILLS = 60 if os.environ.get("HPC_SOAK") else 5
Points = dict[str, list[tuple[int, int, float]]]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0"}
    os.environ.update(patience)
    running = MlflowServer(tmp_path_factory.mktemp("mlflow")).start()
    yield running
    running.stop()
    for name in patience:
        del os.environ[name]


class Place:
    """One test's runs folder and its experiment on the server."""

    def __init__(self, server: MlflowServer, runs: Path, experiment: str) -> None:
        self.server, self.runs, self.experiment = server, runs, experiment
        self.client = MlflowClient(server.url)
        self.said: list[str] = []
        self._began = BEGAN

    def run(self, name: str = "tiny-1a2b3c4d") -> FakeRun:
        self._began += 1
        return FakeRun(self.runs, name, self._began, self.experiment)

    def feed(self, *names: str) -> int:
        return feed(self.runs, f"mlflow:{self.server.url}", names, self.said.append)

    def all(self) -> list[Run]:
        found = self.client.get_experiment_by_name(self.experiment)
        return list(self.client.search_runs([found.experiment_id], run_view_type=ViewType.ALL)) if found else []

    def one(self) -> Run:
        (run,) = [run for run in self.all() if run.info.lifecycle_stage == "active"]
        return run

    def points(self, run: Run | None = None) -> Points:
        """As the server has them, doubles too."""
        run = run or self.one()
        found = {}
        for key in run.data.metrics:
            history = self.client.get_metric_history(run.info.run_id, key)
            found[key] = sorted((one.step, one.timestamp, one.value) for one in history)
        return found

    def files(self, folder: str = "") -> set[str]:
        found = self.client.list_artifacts(self.one().info.run_id, folder or None)
        return {path for one in found for path in (self.files(one.path) if one.is_dir else {one.path})}


@pytest.fixture
def place(server: MlflowServer, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    (tmp_path / "runs").mkdir()
    return Place(server, tmp_path / "runs", request.node.name)


def truth(run: FakeRun) -> Points:
    """The run's canonical series under the server's names."""
    told = {"IoU@0.5": "IoU_x40_0.5"}
    return {
        told.get(tag, tag): [(step, round(wall * 1000), value) for step, wall, value in steps]
        for tag, steps in scalars(run.dir.tensorboard).items()
    }


def finished(place: Place, steps: int = 20) -> FakeRun:
    run = place.run()
    run.attempt()
    run.steps(1, steps)
    run.picture(steps, "confusion_matrix/validation")
    run.evaluation(steps, accuracy=0.5)
    run.finish()
    return run


def test_a_finished_run_is_there_whole_and_once(place: Place) -> None:
    run = finished(place)
    assert place.feed() == 0
    assert place.feed() == 0
    there = place.one()
    assert place.points() == {**truth(run), "validation/accuracy": [(20, round(run.evaluated * 1000), 0.5)]}
    assert (there.info.status, there.info.end_time) == ("FINISHED", round(run.clock * 1000))
    assert (there.info.run_name, there.info.start_time) == (run.dir.name, round(run.began * 1000))
    wanted = {"experiment.yaml", "job.sbatch", "metrics.jsonl", "result.json", "figures/confusion_matrix.png"}
    assert place.files() == wanted | {"images/confusion_matrix/validation/00000020.png"}
    assert there.data.params["train.optimizer.lr"] == "0.003"
    assert there.data.params["model.hidden"] == "[64, 32]"
    assert there.data.params["train.class names _x40_ _x28_odd_x29_"] == "a#b"
    tags = there.data.tags
    assert (tags["hpc.instance"], tags["hpc.jobs"], tags["hpc.attempts"]) == ("laptop", "4711", "1")
    (position,) = positions.read(place.runs)
    assert position.complete
    assert position.size == run.file.stat().st_size
    assert position.last_step == 20
    assert [line.split(":")[0] for line in place.said] == [run.dir.name]  # the second time there was nothing


def test_steps_after_the_checkpoint_wait_for_the_next_one(place: Place) -> None:
    """So a step that an attempt loses was never sent."""
    run = place.run()
    run.attempt()
    run.steps(1, 10)
    place.feed()
    assert place.points() == {}
    assert place.one().info.status == "RUNNING"
    run.checkpoint(10)
    run.steps(11, 15)
    place.feed()
    assert [step for step, _, _ in place.points()["step/loss"]] == list(range(1, 10))
    assert not positions.read(place.runs)[0].complete
    run.attempt(resumed=10)  # 11 to 15 are lost
    place.feed()
    run.steps(11, 30, offset=0.5)
    place.feed()
    run.checkpoint(30)
    place.feed()
    run.finish()
    place.feed()
    assert place.points() == truth(run) and len(place.all()) == 1


def test_steps_that_were_sent_and_lost_give_a_new_version(place: Place) -> None:
    """A failed run is sent whole; one resumed behind that has another past. What people wrote goes along."""
    run = place.run()
    run.attempt()
    run.steps(1, 10)
    run.checkpoint(5)
    run.fail()
    place.feed()
    old = place.one()
    assert old.info.status == "FAILED" and len(place.points()["step/loss"]) == 10
    place.client.set_tag(old.info.run_id, "mlflow.note.content", "a promising one")
    place.client.set_tag(old.info.run_id, "reviewed", "yes")
    run.attempt(resumed=5)
    run.steps(6, 12, offset=0.5)
    place.feed()
    new = place.one()
    assert new.info.run_id != old.info.run_id and new.info.status == "RUNNING"
    run.finish()
    assert place.feed() == 0
    assert place.points() == truth(run)
    assert (new.data.tags["hpc.version"], new.data.tags["reviewed"]) == ("2", "yes")
    assert new.data.tags["mlflow.note.content"] == "a promising one"
    gone = place.client.get_run(old.info.run_id)
    assert gone.info.lifecycle_stage == "deleted" and gone.data.tags["hpc.superseded_by"] == new.info.run_id
    assert any("sent anew" in line for line in place.said)


def test_a_resumed_run_that_lost_nothing_goes_on_as_running(place: Place) -> None:
    run = place.run()
    run.attempt()
    run.steps(1, 10)
    run.checkpoint(10)
    run.fail()
    place.feed()
    run.attempt(resumed=10)
    run.steps(11, 12)
    place.feed()
    assert (place.one().info.status, len(place.all())) == ("RUNNING", 1)
    run.finish()
    place.feed()
    assert place.points() == truth(run) and place.one().info.status == "FINISHED"


def test_killed_at_any_moment_it_ends_equal(place: Place) -> None:
    run = finished(place, steps=2000)
    rng = random.Random(8)
    for _ in range(KILLS):
        child = os.fork()
        if not child:
            feed(place.runs, f"mlflow:{place.server.url}", (), lambda _: None)
            os._exit(0)
        time.sleep(rng.uniform(0.05, 1.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert place.feed() == 0
    there = place.points()
    there.pop("validation/accuracy")
    assert there == truth(run)
    assert len(place.files()) == 6


def test_two_senders_at_once_make_one_run(place: Place) -> None:
    """Both may find none and make one each; the younger is retired, and who was sending to it fails and comes again."""
    run = finished(place, steps=300)
    children = []
    for _ in range(2):
        if not (child := os.fork()):
            os._exit(place.feed())
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 1)
    assert place.feed() == 0
    assert place.points()["step/loss"] == truth(run)["step/loss"]
    assert place.one().data.tags["hpc.version"] == "1"


def test_a_server_that_lost_the_run_is_told_again(place: Place) -> None:
    run = finished(place)
    place.feed()
    first = place.one().info.run_id
    place.client.delete_run(first)
    assert place.feed() == 0
    assert place.one().info.run_id != first and place.points()["step/loss"] == truth(run)["step/loss"]


def test_what_a_server_has_lost_is_not_complete_and_not_pruned(place: Place) -> None:
    finished(place)
    place.feed()

    def stays() -> str:
        return prune.candidates(place.runs, 0, "logs", None, unasked=True)[0].kept

    assert positions.read(place.runs)[0].complete and stays() == ""
    found = place.client.get_experiment_by_name(place.experiment).experiment_id
    place.client.delete_experiment(found)
    assert "deleted on the server" in stays()
    assert place.feed() == 1 and not positions.read(place.runs)[0].complete and status.look(place.runs).exit_code == 1
    place.client.restore_experiment(found)
    assert place.feed() == 0 and positions.read(place.runs)[0].complete and stays() == ""
    place.client.set_tag(place.one().info.run_id, "hpc.cursor", "{}")
    assert "lacks steps" in stays()
    place.client.delete_run(place.one().info.run_id)
    assert "does not have it any more" in stays()


def test_a_server_with_an_older_copy_is_told_what_it_lacks(place: Place) -> None:
    run = finished(place)
    place.feed()
    place.client.set_tag(place.one().info.run_id, "hpc.cursor", "{}")
    assert place.feed() == 0
    assert place.points()["step/loss"] == truth(run)["step/loss"] and len(place.all()) == 1


def test_files_that_were_repaired_are_sent_without_a_new_version(place: Place) -> None:
    """Other bytes before the cursor, but nothing taken back."""
    run = finished(place)
    run.dir.result.unlink()
    run.attempt(resumed=20)
    place.feed()
    older = next(path for path in run.dir.tensorboard.iterdir() if path.name.endswith("g001"))
    older.write_bytes(older.read_bytes() + b"\x01")  # a torn tail that was not there yet
    run.steps(21, 25)
    run.finish()
    assert place.feed() == 0
    assert len(place.all()) == 1 and place.points()["step/loss"] == truth(run)["step/loss"]


@pytest.mark.parametrize("kind", ["hole", "flip", "torn"])
def test_a_damaged_file_is_sent_up_to_its_damage_and_whole_when_it_is_repaired(place: Place, kind: str) -> None:
    """An older attempt's: it is told again, though nothing is new."""
    run = place.run()
    run.attempt()
    run.steps(1, 5)
    older, valid = run.file, run.file.stat().st_size
    run.steps(6, 10)
    run.value(10, "validation/accuracy", 0.1)
    run.evaluation(10, accuracy=0.1)
    whole = older.read_bytes()
    rest = whole[valid:]
    spoiled = {"hole": bytes(4096) + rest, "flip": rest[:20] + bytes([rest[20] ^ 1]) + rest[21:], "torn": rest[:30]}
    older.write_bytes(whole[:valid] + spoiled[kind])
    run.attempt(resumed=10)
    run.steps(11, 12)
    run.finish()
    for _ in range(2):
        assert place.feed() == (kind != "torn")
        assert [step for step, _, _ in place.points()["step/loss"]] == [*range(1, 6), 11, 12]
        (position,) = positions.read(place.runs)
        assert position.complete == (kind == "torn") and "anew" not in " ".join(place.said)
        told = [line for line in place.said if "damaged at byte" in line]
        assert bool(told) == (kind != "torn") and all(f"byte {valid}; 'hpc fsck" in line for line in told)
    older.write_bytes(whole)
    assert place.feed() == 0 and positions.read(place.runs)[0].complete
    assert place.points() == truth(run) and len(place.all()) == 1


def test_what_is_skipped_is_named_with_its_reason(place: Place) -> None:
    names = ["bare-00000001", "bare-00000002"]
    for name in names:
        (place.runs / name).mkdir()
        (place.runs / name / "experiment.yaml").write_text("name: x\n")
    assert place.feed() == 0
    (line,) = place.said
    assert line.startswith(f"{', '.join(names)}: skipped: planned, not submitted; no record"), line


def test_values_that_are_no_numbers_arrive(place: Place) -> None:
    run = place.run()
    run.attempt()
    for step, value in enumerate((math.nan, math.inf, -math.inf), 1):
        run.value(step, "step/loss", value)
    run.finish()
    assert place.feed() == 0 == place.feed()
    nan, inf, minus = place.points()["step/loss"]
    assert math.isnan(nan[2]) and (inf[2], minus[2]) == (sys.float_info.max, -sys.float_info.max)


def test_a_long_name_is_kept_whole_in_a_tag(place: Place) -> None:
    run = place.run()
    run.attempt()
    run.value(1, "long" * 100, 0.25)
    run.finish()
    place.feed()
    (point,) = MlflowSink(place.server.url).history(_remote(place))
    assert (point.tag, point.value) == ("long" * 100, 0.25)


def _remote(place: Place) -> object:
    class Remote:
        id = place.one().info.run_id

    return Remote()


def test_a_changed_parameter_is_a_tag(place: Place) -> None:
    """The server refuses another value."""
    run = place.run()
    run.attempt()
    place.feed()
    run.change(epochs=9, note="x" * 7000)
    assert place.feed() == 0
    there = place.one()
    assert (there.data.params["train.epochs"], there.data.tags["hpc.changed.train.epochs"]) == ("3", "9")
    assert "7000 characters" in there.data.params["train.note"]


def test_one_run_that_fails_does_not_stop_the_others(place: Place) -> None:
    good, bad = place.run(), place.run("bad-00000000")
    for run in (good, bad):
        run.attempt()
        run.steps(1, 3)
        run.finish()
    write_text(bad.dir.experiment, "name: [")
    assert place.feed() == 1
    assert [line.split(":")[0] for line in sorted(place.said)] == ["bad-00000000", good.dir.name]
    assert place.points() == truth(good)


def test_the_same_run_on_two_clusters_is_two(place: Place) -> None:
    """Equal names and ids; the moments at which they were submitted are not."""
    for _ in range(2):
        run = place.run()
        run.attempt()
        run.steps(1, 3)
        run.finish()
        place.feed()
        run.dir.path.rename(place.runs.parent / f"copy-{run.began}")
    assert len([run for run in place.all() if run.info.lifecycle_stage == "active"]) == 2


def test_the_rows_of_a_sweep_are_runs_that_know_their_sweep(place: Place) -> None:
    rows = [place.run(f"sweep-x/row-{number}") for number in range(2)]
    (place.runs / "sweep-x" / "rows.txt").write_text("row-0\nrow-1\n")
    SweepDir(place.runs / "sweep-x").write_chunks([Chunk(0, 0, 2, None, None)])
    for run in rows:
        run.attempt()
        run.steps(1, 3)
        run.finish()
    assert place.feed("sweep-x/row-0") == 0 == place.feed("sweep-x"), place.said
    assert {run.info.run_name for run in place.all()} == {"row-0", "row-1"}
    assert {run.data.tags["hpc.sweep"] for run in place.all()} == {"sweep-x"}
    assert {one.run for one in positions.read(place.runs)} == {"sweep-x/row-0", "sweep-x/row-1"}


def test_the_server_goes_away_in_the_middle_and_comes_back(place: Place) -> None:
    run = finished(place, steps=1500)
    child = os.fork()
    if not child:
        os._exit(place.feed())
    time.sleep(0.7)
    place.server.stop()
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 1)
        assert place.feed() == 1 and "does not answer: 1 run not sent" in place.said[-1]
    finally:
        place.server.start()
    assert place.feed() == 0
    assert place.points()["step/loss"] == truth(run)["step/loss"]


def test_keys_are_taken_from_the_environment_and_left_nowhere(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they in the arguments of a process: the address with a key in it is refused."""
    secret = "hunter2-not-to-be-seen"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", secret)
    finished(place)
    assert place.feed() == 0
    assert feed(place.runs, f"mlflow:http://127.0.0.1:{free_port()}", (), place.said.append) == 1
    assert not secrets_in(place.runs, secret) and not secrets_in(place.server.folder, secret)
    assert not any(secret in line for line in place.said)
    arguments = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert secret not in arguments
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        sink_of(f"mlflow:http://me:{secret}@127.0.0.1:5000")
    assert secret not in str(refused.value)


def test_the_time_is_up_while_a_server_does_not_answer(tmp_path: Path) -> None:
    """MLflow's client takes any Exception for a failed request, and would go on with the next run."""
    FakeRun(tmp_path).attempt()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"mlflow:http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TimeUp), bounded(1.0):
            feed(tmp_path, uri, (), print)


@pytest.mark.parametrize("uri", ["mlflow:", "mlflow:sqlite:///x.db", "mlflow:http://", "mlflow:127.0.0.1:5000"])
def test_what_is_no_address_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match="http://127"):
        sink_of(uri)


def test_folders_and_hosts_are_no_sinks() -> None:
    assert not any(map(is_sink, ("runs", "/data/mlflow", "host:runs", "me@mlflow:runs", "./mlflow:x")))
    assert sink_of("host:runs") is None
