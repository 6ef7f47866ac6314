"""Batch scripts in tests: how they are rendered, what SLURM reads in them, and what bash runs when it plays one."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from hpc import instances, template
from hpc.experiment import Experiment, validate
from hpc.instances import Instance
from hpc.rundir import RunDir
from hpc.sweepdir import SweepDir

PYTHON = "/opt/hpc/bin/python"
DEAF = ["sh", "-c", 'trap "" HUP TERM INT USR2; exec "$@"', "rank"]
CEDIA = instances.find("cedia-a100-40gb")


def experiment(**launch: Any) -> Experiment:
    model, data = {"name": "resnet3d"}, {"file": "/data/scans.h5"}
    values = {"name": "golden", "model": model, "data": data, "launch": {"instance": "cedia-a100-40gb", **launch}}
    return validate(values, "here")


def render(given: Experiment, run: Path, python: str = PYTHON, instance: Instance | None = None) -> str:
    return template.render(given, instance or instances.find(given.launch.instance), RunDir(run), python)


def options(script: str) -> dict[str, str]:
    """The #SBATCH lines as SLURM reads them: quotes taken off, and a backslash escapes within them, too."""
    lines = [line.removeprefix("#SBATCH --") for line in script.split("\n") if line.startswith("#SBATCH ")]
    pairs = (line.partition("=") for line in lines)
    return {key: "".join(shlex.split(value)).replace("\\\\", "\\") for key, _, value in pairs}


STUB = """#!/bin/sh
printf '%s\\0' "$@" >> "$RECORD"
printf '\\001' >> "$RECORD"
[ "$2" != hpc.attempt ] || echo "export HPC_GENERATION=7 HPC_MASTER_ADDR=h HPC_MASTER_PORT=1"
[ "$2" != hpc.requeue ] || echo "end $5"
"""


def played(script: str, folder: Path, **own: str) -> list[list[str]]:
    """The arguments of every call that the script makes, run by bash in `folder` with `own` in its environment."""
    path = folder / "job.sbatch"
    path.write_text(script)
    subprocess.run(["bash", "-n", str(path)], check=True)
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "HPC_"))}
    environ |= {"RECORD": str(folder / "record"), **own}
    done = subprocess.run(
        ["bash", str(path)], cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [call.split("\0")[:-1] for call in (folder / "record").read_text().split("\1")[:-1]]


def rows_of(folder: Path, count: int) -> SweepDir:
    """A sweep's folder whose rows are called row-0, row-1, ..."""
    for number in range(count):
        (folder / f"row-{number}" / "logs").mkdir(parents=True)
    (folder / "rows.txt").write_text("".join(f"row-{number}\n" for number in range(count)))
    return SweepDir(folder)
