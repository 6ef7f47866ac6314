"""SLURM's commands as small executables first on PATH: jobs are files of a folder, and any command can be told to fail.

The real quoting, parsing and exit codes are tested so, with no patching inside our code. `fails["squeue"] = "words"`
makes a command say the words and leave with 1; sbatch then submits all the same when the words begin with "Socket".
`configure` sets what `scontrol show config|partition|node` say: two idle nodes of 12 CPUs, 64000 MB and one A100 each.
Test files that need no other kinds use the fixtures `fake` and `run` (tests/conftest.py imports them).
"""

import os
from pathlib import Path

import pytest

from hpc.rundir import RunDir, write_text

_HEAD = """#!/usr/bin/env bash
cd "$(dirname "$0")/.."
me=${0##*/}
echo "$me $*" >> calls
[ ! -e "$me.hangs" ] || exec sleep 60
fail() { [ ! -e "$me.fails" ] || { cat "$me.fails" >&2; exit 1; }; }
"""
RUN = "exp-0000aaaa"
_JOB = "|" * 7  # eight empty fields
_CONFIG = {
    "JobRequeue": "1",
    "KillWait": "30 sec",
    "MaxArraySize": "1001",
    "PreemptMode": "REQUEUE",
    "PreemptType": "preempt/partition_prio",
    "PreemptParameters": "(null)",
    "SchedulerParameters": "(null)",
    "SlurmctldParameters": "(null)",
    "AccountingStorageType": "accounting_storage/none",
    "ClusterName": "fake",
    "SLURM_VERSION": "22.05.8",
}
_PARTITION = {
    "PartitionName": "gpu",
    "AllowAccounts": "ALL",
    "Default": "YES",
    "GraceTime": "0",
    "Hidden": "NO",
    "MaxNodes": "UNLIMITED",
    "MaxTime": "UNLIMITED",
    "Nodes": "node[0-1]",
    "PreemptMode": "REQUEUE",
    "State": "UP",
    "TotalNodes": "2",
}
_NODE = {
    "NodeName": "node0",
    "CPUTot": "12",
    "OS": "Linux 6.1.0 #1 SMP @0",
    "Gres": "gpu:a100:1",
    "RealMemory": "64000",
    "State": "IDLE",
    "Partitions": "gpu",
}
_BODIES = {
    "sinfo": "fail\necho gpu\n",
    "srun": "fail\n",
    "scancel": 'fail\nfor job in "$@"; do echo \'CANCELLED|None||\' > "jobs/$job"; done\n',
    "squeue": """
fail
for job in jobs/*; do
  [ -e "$job" ] || continue
  { IFS='|' read -r state reason node comment; read -r more || more=$DEFAULTS; } < "$job"
  echo "${job##*/}|$state|$reason|$node|$more||$comment"
done
""".replace("$DEFAULTS", f"'{_JOB}'"),
    "scontrol": """
fail
case " $* " in
  *" show node "*) grep "NodeName=${@: -1} " node || cat node;;
  *" show "*) cat "${@: -1}";;
  *" requeue "*) echo 'PENDING|BeginTime||' > "jobs/$2";;
esac
""",
    "sacct": "fail\ncat accounted 2>/dev/null || { echo 'Slurm accounting storage is disabled' >&2; exit 1; }\n",
    "sbatch": """
script=${@: -1}
case " $* " in *" --version "*) echo "slurm-wlm 22.05.8"; exit 0;; esac
case " $* " in *" --test-only "*) fail; echo "sbatch: Job 1 to start at 2030-01-01T00:00:00" >&2; exit 0;; esac
[ ! -e sbatch.fails ] || grep -q ^Socket sbatch.fails || fail
number=$(($(ls jobs | wc -l) + 101))
echo "PENDING|Priority||$(sed -n "s/^#SBATCH --comment=//p" "$script")" > "jobs/$number"
fail
case " $* " in *" --parsable "*) echo "$number";; *) echo "Submitted batch job $number";; esac
""",
}


class FakeSlurm:
    """The folder behind the executables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "jobs").mkdir()
        for name, body in _BODIES.items():
            path = folder / "bin" / name
            path.write_text(_HEAD + body)
            path.chmod(0o755)
        self.configure({}, [{}], [{}, {"NodeName": "node1"}])

    @property
    def path(self) -> str:
        return f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def job(
        self, number: str, state: str, reason: str = "None", node: str = "", comment: str = RUN, more: str = _JOB
    ) -> None:
        """squeue shows this job from now on; `more`: PARTITION|NODES|SUBMITTED|START|END|LIMIT|PRIORITY|DEPENDENCY.

        Its comment is that of the fixture `run`.
        """
        (self.folder / "jobs" / number).write_text(f"{state}|{reason}|{node}|{comment}\n{more}\n")

    def configure(
        self,
        config: dict[str, str] | None = None,
        partitions: list[dict[str, str]] | None = None,
        nodes: list[dict[str, str]] | None = None,
    ) -> None:
        """What scontrol shows from now on: each entry is what differs from the defaults of one gpu partition."""
        if config is not None:
            lines = [f"{key:<23} = {value}" for key, value in {**_CONFIG, **config}.items()]
            (self.folder / "config").write_text("\n".join(["Configuration data as of now", *lines, "", "Slurmctld"]))
        for name, default, given in (("partition", _PARTITION, partitions), ("node", _NODE, nodes)):
            if given is not None:
                lines = [" ".join(f"{k}={v}" for k, v in {**default, **entry}.items()) + " " for entry in given]
                (self.folder / name).write_text("\n".join(lines) + "\n")

    def accounted(self, *lines: str, submitted: str = "Unknown", cluster: str = "fake", comment: str = "") -> None:
        """sacct prints these lines, without their last three fields, from now on; until then there is no accounting."""
        last = f"|{submitted}|{cluster}|{comment}\n"
        (self.folder / "accounted").write_text("".join(line + last for line in lines))

    def jobs(self) -> dict[str, str]:
        """Job number to state."""
        return {path.name: path.read_text().split("|")[0] for path in sorted((self.folder / "jobs").iterdir())}

    def fails(self, command: str, words: str) -> None:
        (self.folder / f"{command}.fails").write_text(words + "\n")

    def hangs(self, command: str) -> None:
        (self.folder / f"{command}.hangs").touch()

    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """The fake executables, first on PATH."""
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", fake.path)
    return fake


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run folder with experiment and script, and no job around the test."""
    without_slurm(monkeypatch)
    run = RunDir(tmp_path / "runs" / RUN)
    write_text(run.experiment, "name: exp\n")
    write_text(run.script, f"#!/bin/bash\n#SBATCH --comment={RUN}\n")
    return run


def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a job around the tests."""
    for key in list(os.environ):
        if key.startswith(("SLURM_", "HPC_")) and key != "HPC_REQUIRE_SLURM":
            monkeypatch.delenv(key)
