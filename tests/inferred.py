"""What evaluate and predict leave, for their tests."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datasets import open_volumes
from hpc.experiment import load
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, write_json
from jobs import evaluate as command
from jobs.checkpoint import Snapshot
from jobs.inference.facts import recall, remember
from jobs.inference.members import Manner, build, load_members
from jobs.inference.scoring import Scored, score


def evaluate(run: RunDir, split: str, wanted: str = "best", manner: Manner | None = None) -> tuple[str, Scored]:
    """(checkpoint's name, evaluation) of one run, nothing written."""
    members = load_members([run], wanted, torch.device("cpu"))
    return members[0].checkpoint, score(members, split, manner or Manner())


def answer(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    """What `hpc evaluate ... --json` says."""
    capsys.readouterr()
    assert command.main([*map(str, arguments), "--json"]) == ExitCode.DONE
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def rows_of(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


NETS = """
import torch
from torch import nn

class Base(nn.Module):
    '''Nothing is learnt: what it says is known. One parameter, so that there is something to save.'''

    def __init__(self, in_channels, num_classes, sign=1.0):
        super().__init__()
        self.sign = nn.Parameter(torch.tensor(float(sign)))
        self.classes = num_classes

class Bright(Base):
    '''The map of class 1 where a voxel lies above the mean of the foreground, of class 0 elsewhere.'''

    def forward(self, x):
        one = 8 * self.sign * x[:, :1]
        rest = torch.full_like(one, -9).expand(-1, self.classes - 2, *[-1] * (x.ndim - 2))
        return torch.cat([-one, one, rest], 1)

class Mean(Base):
    '''Class k by how near the mean of all voxels is to k.'''

    def forward(self, x):
        mean = self.sign * x.flatten(1).mean(1, keepdim=True)
        return -(mean - torch.arange(self.classes, device=x.device)).abs()

class Broken(Base):
    '''Says nothing finite of what is bright.'''

    def forward(self, x):
        return torch.where(x.flatten(1).mean(1, keepdim=True) > 1, float("nan"), 0.0) + torch.zeros(1, self.classes)

class Fails(Base):
    def forward(self, x):
        return x.reshape(-1, 3)
"""


def make_run(folder: Path, data: Path, net: str, *overrides: str, step: int = 4) -> RunDir:
    """A run that has saved a network of NETS once; model.sign=-1 has another one say the opposite."""
    run = RunDir(folder)
    run.path.mkdir(parents=True)
    (folder / "nets.py").write_text(NETS)
    volumes = open_volumes(data)
    values = {
        "name": "known",
        "task": volumes.task,
        "model": {"name": f"file:{folder / 'nets.py'}:{net}"},
        "data": {"file": str(data), "batch_size": 2, "threads": 1},
        "train": {"device": "cpu"},
    }
    run.experiment.write_text(yaml.safe_dump(values))
    experiment, _ = load(run.experiment, list(overrides))
    run.experiment.write_text(yaml.safe_dump(experiment.as_dict()))
    fold = experiment.data.fold
    remember(run, volumes if fold is None else volumes.fold(fold))
    model = build(experiment, recall(run, experiment))
    run.checkpoints.mkdir()
    state: dict[str, Any] = {"state": {}, "param_groups": []}
    saved = Snapshot().take(1, step, model.state_dict(), state, {}, {"data": volumes.fingerprint})
    saved.write(run.checkpoints)
    write_json(run.result, {"best": {"checkpoint": next(run.checkpoints.iterdir()).name}})
    return run
