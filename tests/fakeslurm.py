"""SLURM's commands as small executables first on PATH: jobs are files of a folder, and any command can be told to fail.

The real quoting, parsing and exit codes are tested so, with no patching inside our code. `fails["squeue"] = "words"`
makes a command say the words and leave with 1; sbatch then submits all the same when the words begin with "Socket".
"""

import os
from pathlib import Path

import pytest

_HEAD = """#!/usr/bin/env bash
cd "$(dirname "$0")/.."
me=${0##*/}
echo "$me $*" >> calls
[ ! -e "$me.hangs" ] || exec sleep 60
fail() { [ ! -e "$me.fails" ] || { cat "$me.fails" >&2; exit 1; }; }
"""
_BODIES = {
    "sinfo": "fail\necho gpu\n",
    "srun": "fail\n",
    "scancel": "fail\necho 'CANCELLED|None||' > \"jobs/$1\"\n",
    "squeue": 'fail\nfor job in jobs/*; do [ ! -e "$job" ] || echo "${job##*/}|$(cat "$job")"; done\n',
    "scontrol": "fail\necho 'PENDING|BeginTime||' > \"jobs/$2\"\n",
    "sbatch": """
script=${@: -1}
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

    @property
    def path(self) -> str:
        return f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def job(self, number: str, state: str, reason: str = "None", node: str = "", comment: str = "(null)") -> None:
        """squeue shows this job from now on."""
        (self.folder / "jobs" / number).write_text(f"{state}|{reason}|{node}|{comment}\n")

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


def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a job around the tests."""
    for key in list(os.environ):
        if key.startswith(("SLURM_", "HPC_")) and key != "HPC_REQUIRE_SLURM":
            monkeypatch.delenv(key)
