"""Rows that are commands and events (tests/playing.py), and what is measured of a run that was stopped."""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc import stepledger
from hpc.experiment import load
from hpc.rundir import RunDir
from tests.faults.fault import Fault
from tests.playing import Playing, Row
from tests.stage import played

Measure = Callable[[Playing], str]
SOAK = os.environ.get("HPC_SOAK") == "1"
"""The full counts, on a machine of their own."""


def scripted(
    id: str,
    injection: str,
    expectation: str,
    script: str,
    *checks: Measure,
    here: int = 1,
    soak: int = 20,
    root: bool = False,
    **row: Any,
) -> Fault:
    """A fault that is a script. `20..60` in it is a number between, another each time.

    `row` are fields of Row; `root`: only root can play it. Checks raise AssertionError, and give what they measured.
    """

    def play(folder: Path, number: int) -> str:
        if root and os.geteuid():
            pytest.skip("files can be given to another user by root alone")
        draw = random.Random(number)
        drawn = re.sub(r"\b(\d+)\.\.(\d+)\b", lambda pair: str(draw.randint(int(pair[1]), int(pair[2]))), script)
        playing = played(Row(id, injection, drawn, **row), folder)
        try:
            return ", ".join(text for check in checks if (text := check(playing)))
        except AssertionError as error:
            raise AssertionError(f"{error}\n{playing.block()}") from error

    return Fault(id, injection, expectation, play, here, soak, cluster=row.get("cluster") is not None)


def lost(play: Playing) -> str:
    """Steps that were done and had to be done again."""
    return f"{stepledger.read(RunDir(play.run)).lost} steps lost"


def saves(play: Playing) -> list[float]:
    """Seconds from each signal, as its process heard it, to the checkpoint that is on the disk."""
    saved = play.events("checkpoint")
    took = []
    for told in play.events("signal"):
        heard = told["received"] or told["time"]  # by another rank
        own = [event for event in saved if event["generation"] == told["generation"]]
        stored = [event["time"] for event in own if event["step"] == told["step"]]  # already, perhaps, when it came
        assert stored, f"no checkpoint of the signal at step {told['step']}"
        took.append(max(0.0, min(stored) - heard))
    return took


def saved(play: Playing) -> str:
    return f"save {max(saves(play)):.1f} s"


def freed(play: Playing) -> str:
    """From the checkpoint on the disk to the node that the displacing job has, the longest of all preemptions."""
    took = []
    for generation in [int(key.removeprefix("free ")) for key in play.when if key.startswith("free ")]:
        stored = max(event["time"] for event in play.events("checkpoint") if event["generation"] == generation)
        took.append(play.when[f"free {generation}"] - stored)
    assert within(max(took), 5), f"the node is free {max(took):.1f} s after the save"
    return f"node free after {max(took):.1f} s"


def within(seconds: float, limit: float) -> bool:
    """By the clock where rows have the machine to themselves; beside other tests all takes longer."""
    return seconds < limit * (1 if SOAK else 6)


def at_most_an_interval(play: Playing) -> str:
    """A kill may cost what was done since the last save: by its wall clock, as a number of steps."""
    steps = stepledger.read(RunDir(play.run)).lost
    saved = play.events("checkpoint")
    slowest = max(event["seconds"] for event in saved)
    pause = load(play.run / "experiment.yaml")[0].model.options["pause"]
    limit = (EVERY_S + slowest) / pause + 2
    assert steps <= limit, f"{steps} steps lost, of at most {limit:.0f} between two saves"
    return f"{steps} of at most {limit:.0f} steps lost"


EVERY_S = 1.0
"""Between saves, in tests/stage.py."""
