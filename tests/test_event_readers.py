"""A run that is killed and preempted: TensorBoard, open all the while, and all other readers show each step once."""

import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tbparse import SummaryReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpc.logs import series
from hpc.rundir import RunDir
from tests import tiny_run
from tests.tiny_run import in_child

LOADERS = {"fast": (), "python": ("--load_fast=false",), "multifile": ("--load_fast=false", "--reload_multifile=true")}
PATIENCE_S = 60
Shown = dict[str, list[int]]


class Board:
    """A TensorBoard that looks at the folder twice a second."""

    def __init__(self, folder: Path, log: Path, options: tuple[str, ...]) -> None:
        self._port, self.log = tiny_run.free_port(), log
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--reload_interval", "0.5", *options]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)

    def get(self, path: str, **query: str) -> Any:
        text = urllib.parse.urlencode(query)
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/data/{path}?{text}", timeout=10) as answer:
            return json.load(answer)

    def shown(self) -> Shown:
        """Steps by tag; {} while it does not answer."""
        try:
            tags = self.get("plugin/scalars/tags").get("tb", {})
            return {tag: [p[1] for p in self.get("plugin/scalars/scalars", run="tb", tag=tag)] for tag in tags}
        except OSError:
            return {}

    def wait_for(self, good: Callable[[Shown], bool]) -> Shown:
        until = time.monotonic() + PATIENCE_S
        while not good(shown := self.shown()) and time.monotonic() < until:
            time.sleep(0.2)
        assert good(shown), f"{shown}\n{self.log.read_text()}"
        return shown


@contextmanager
def boards(folder: Path, logs: Path) -> Iterator[list[Board]]:
    opened = [Board(folder, logs / f"{name}.txt", options) for name, options in LOADERS.items()]
    try:
        yield opened
    finally:
        for board in opened:
            board.process.terminate()
        for board in opened:
            board.process.wait()


def killed(folder: str, generation: int, boundary: int, *options: str) -> None:
    """Everything up to the kill is in the event files, steps that were not saved among it."""
    flag = tiny_run.SignalAtBoundary(boundary, 9)
    trainer = tiny_run.make_trainer(RunDir(folder), generation, flag)
    trainer.resume()

    def settle() -> None:
        trainer._flush()
        trainer.saver.wait()
        if "unflushed" not in options:
            trainer.recorder.flush(10)

    flag.settle = settle
    trainer.fit()


def stopped(folder: str, generation: int, boundary: int) -> None:
    os._exit(tiny_run.train(RunDir(folder), generation, boundary) != "stopped")


def finished(folder: str, generation: int) -> None:
    os._exit(tiny_run.train(RunDir(folder), generation) != "done")


def by_accumulator(run: RunDir) -> Shown:
    accumulator = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [event.step for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def by_tbparse(run: RunDir) -> Shown:
    table = SummaryReader(str(run.tensorboard)).scalars
    return {tag: rows["step"].tolist() for tag, rows in table.groupby("tag", sort=False)}


def by_us(run: RunDir) -> Shown:
    return {tag: [step for step, *_ in points] for tag, points in series.scalars(run.tensorboard).items()}


def assert_once(shown: Shown, run: RunDir) -> None:
    assert shown == by_us(run)
    assert shown["step/loss"] == list(range(1, tiny_run.STEPS + 1))
    assert shown["validation/loss"] == [4, 8, 12]


def test_every_reader_shows_each_step_once(tmp_path: Path) -> None:
    run = tiny_run.make_run(tmp_path / "run", tiny_run.make_data(tmp_path))
    with boards(run.path, tmp_path) as opened:
        assert in_child(killed, str(run.path), 1, 10) == -9
        lost = by_us(run)["step/loss"]
        assert lost[-1] in (6, 7), "the last checkpoint is of step 4"
        for board in opened:
            board.wait_for(lambda shown: shown.get("step/loss") == lost)
        assert in_child(stopped, str(run.path), 2, 3) == 0
        assert in_child(killed, str(run.path), 3, 3) == -9
        assert in_child(finished, str(run.path), 4) == 0
        for board in opened:
            assert_once(board.wait_for(lambda shown: shown.get("epoch", [0])[-1] == tiny_run.STEPS), run)
    assert_once(by_accumulator(run), run)
    assert_once(by_tbparse(run), run)


@pytest.mark.parametrize("stage", ["30s", "off"])
def test_what_a_kill_takes_from_the_node_is_written_again(tmp_path: Path, stage: str) -> None:
    """Nothing of the steps up to the checkpoint is lost, though no flush but the save's came."""
    run = tiny_run.make_run(tmp_path / "run", tiny_run.make_data(tmp_path), f"train.stage_logs={stage}")
    assert in_child(killed, str(run.path), 1, 10, "unflushed") == -9
    assert in_child(finished, str(run.path), 2) == 0
    assert_once(by_accumulator(run), run)
    assert_once(by_tbparse(run), run)
    assert [line["step"] for line in run.read_metrics()] == [4, 8, 12]
