"""What the tests of `hpc why` share: a submitted run with logs, and how its attempt has ended."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from hpc import why
from hpc.rundir import RunDir, write_json, write_text
from tests.fakeslurm import without_slurm

HEAD = 'Traceback (most recent call last):\n  File "train.py", line 12, in fit\n    batch = next(self.loader)\n'
LOST = "torch.distributed.DistBackendError: NCCL communicator was aborted: Connection reset by peer\n"
EXPERIMENT = "name: exp\nmodel: {name: resnet3d_tiny}\ndata: {file: /x.h5}\nlaunch: {instance: cedia-a100-40gb}\n"
LINE = "55|{state}|{code}|60|2027-01-15T08:00:00|2027-01-15T09:00:00|08:00:00|64000M|{rss}|node1|None"


def ended(run: RunDir, code: int = 1, job: str | None = "55", phase: str = "ended", **state: Any) -> None:
    """An attempt of job 55 that began a minute ago and is over."""
    now = time.time()
    run.event("start", "shell", 1, job=job, node="node1", restart=0)
    common = {"generation": 1, "job": job, "host": os.uname().nodename, "node": "node1", "pid": 1 << 22, "step": 40}
    ending = {"code": code, "reason": f"failed with exit code {code}"}
    write_json(run.state, {**common, "epoch": 2, "started": now - 60, "time": now, "phase": phase, **ending, **state})


def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A submitted run with logs."""
    without_slurm(monkeypatch)
    run = RunDir(tmp_path / "runs" / "exp-0000aaaa")
    write_text(run.experiment, EXPERIMENT)
    write_text(run.script, "#!/bin/bash\n")
    run.logs.mkdir()
    write_json(run.submit, {"cluster": "slurm", "job": "55", "time": time.time() - 100})
    return run


def log(run: RunDir, text: str, rank: int = 0, job: str = "55", age_s: float = 0.0) -> None:
    path = run.output(job, str(rank), "err")
    path.write_text(text)
    os.utime(path, (time.time() - age_s, time.time() - age_s))


def words(answer: why.Answer) -> str:
    return " ".join(answer.lines)
