"""What the tests of the batch script's tail share: a run whose attempt 3 ends, its job, and what SLURM was asked."""

from typing import Any

import pytest

from hpc.rundir import ROWS, RunDir, write_json, write_text
from hpc.sweepdir import Chunk, SweepDir
from tests.fakeslurm import FakeSlurm

HELD = {
    "host": "n",
    "node": "node0",
    "pid": 1,
    "phase": "training",
    "step": 40,
    "epoch": 2,
    "started": 1.0,
    "time": 2.0,
}


def hold(run: RunDir, **state: Any) -> None:
    write_json(run.state, {**HELD, "generation": 3, "job": None, **state})


def in_job(monkeypatch: pytest.MonkeyPatch, fake: FakeSlurm, job: str = "55", nodes: int = 1) -> None:
    """The environment of a job, or of the array task 54_2, that squeue knows."""
    array, _, task = job.partition("_")
    names = {"JOB_ID": "57", "ARRAY_JOB_ID": array, "ARRAY_TASK_ID": task} if task else {"JOB_ID": job}
    for key, value in names.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    fake.job(job, "RUNNING", node="node0", more=f"gpu|{nodes}|N/A|N/A|N/A|1:00:00|1|(null)")


def changes(fake: FakeSlurm) -> list[str]:
    """What SLURM was asked to do."""
    asked = [call for call in fake.calls() if not call.startswith("squeue") and " show " not in call]
    return [call for call in asked if "--test-only" not in call]


def make_row(run: RunDir) -> RunDir:
    """Row 4 of a sweep of two chunks of three rows, job 54_1, beside this run."""
    sweep = SweepDir(run.path.parent / "exp-sweep-0000bbbb")
    sweep.path.mkdir()
    (sweep.path / ROWS).write_text("".join(f"exp-0000000{number}\n" for number in range(6)))
    sweep.write_chunks([Chunk(0, 0, 3), Chunk(1, 3, 3, parallel=2)])
    for number in range(2):
        write_text(sweep.script(number), f"#!/bin/bash\n#SBATCH --comment={sweep.token(number)}\n#SBATCH --array=0-2\n")
    row = sweep.rows()[4]
    hold(row, job="54_1")
    return row
