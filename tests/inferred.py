"""What evaluate and predict leave, for their tests."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.preempt import ExitCode
from hpc.rundir import RunDir
from jobs import evaluate as command
from jobs.inference.members import Manner, load_members
from jobs.inference.scoring import Scored, score


def evaluate(run: RunDir, split: str, wanted: str = "best", manner: Manner | None = None) -> tuple[str, Scored]:
    """(checkpoint's name, evaluation) of one run, nothing written."""
    members = load_members([run], wanted, torch.device("cpu"))
    return members[0].checkpoint, score(members, split, manner or Manner())


def answer(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    """What `hpc evaluate ... --json` says."""
    assert command.main([*map(str, arguments), "--json"]) == ExitCode.DONE
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def rows_of(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
