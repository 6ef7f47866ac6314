"""Nothing that somebody else owns or may write is run or unpickled, and what is made here is its owner's alone."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import DelayedSubmission, FailedJobError, JobPaths

from hpc import attempt, resumption, trust
from hpc.errors import UserError
from hpc.functions import payload, step
from hpc.functions.job import LocalFunctionJob
from hpc.functions.submit import Files
from hpc.rundir import RunDir
from tests import scripted
from tests.fakeslurm import FakeSlurm, without_slurm

SOMEBODY = 12345
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch)


@pytest.fixture(params=[0o000, 0o002])
def open_umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(folder: Path) -> set[str]:
    """Of all that is in it."""
    found = [path.lstat() for path in (folder, *folder.rglob("*"))]
    return {stat.filemode(one.st_mode) for one in found if not stat.S_ISLNK(one.st_mode)}


def test_a_run_is_its_owners_alone_whatever_the_umask(tmp_path: Path, open_umask: None) -> None:
    run = scripted.make(tmp_path, "done")
    assert modes(run.path) <= {"drwx------", "-rw-------", "drwxr-xr-x", "-rw-r--r--"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (run.path, run.script, run.experiment)} == {0o700, 0o600}
    attempt.check_trust(run)


def test_pickles_and_results_are_their_owners_alone_whatever_the_umask(tmp_path: Path, open_umask: None) -> None:
    with Files(tmp_path / "deep" / "logs") as files:
        files.write([DelayedSubmission(len, "four")], False, "#!/bin/bash\n")
        files.keep(["7"])
    step.dump(("success", 4), JobPaths(files.folder, "7").result_pickle)
    assert modes(files.folder) == {"drwx------", "-rw-------"}


def writable(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o020)


def foreign(path: Path) -> None:
    os.chown(path, SOMEBODY, -1)


HARM = [
    pytest.param(writable, r"can be written by others \(mode 0\d{3}\): nothing of it is run; chmod", id="writable"),
    pytest.param(foreign, f"belongs to user {SOMEBODY}: nothing of it is run; read it, and copy", marks=root_only),
]


@pytest.mark.parametrize(("harm", "words"), HARM)
@pytest.mark.parametrize("part", ["path", "script", "code", "experiment", "code/jobs", "code/jobs/run.py"])
def test_a_run_in_which_others_have_a_hand_is_neither_begun_nor_resumed(
    tmp_path: Path, fake: FakeSlurm, part: str, harm: Callable[[Path], None], words: str
) -> None:
    run = scripted.make(tmp_path, "done")
    place = getattr(run, part, run.path / part)
    harm(place)
    with pytest.raises(UserError, match=words) as refusal:
        list(resumption.named([run.name], run.runs))
    assert "\n" not in str(refusal.value) and not any(call.startswith("sbatch /") for call in fake.calls())
    done = subprocess.run(["bash", str(run.script)], env={**os.environ, "HPC_STEP": "local"}, capture_output=True)
    assert done.returncode == 2 and not run.result.exists() and run.last_generation() == 0
    assert str(place).encode() in done.stderr and b"Traceback" not in done.stderr


def test_a_folder_of_runs_may_be_a_groups(tmp_path: Path) -> None:
    run = scripted.make(tmp_path, "done")
    run.runs.chmod(0o2775)
    attempt.check_trust(run)
    run.path.chmod(0o2755)
    attempt.check_trust(run)


def test_a_row_is_its_sweeps(tmp_path: Path) -> None:
    from tests.tails import make_row

    run = RunDir(tmp_path / "runs" / "exp-0000aaaa")
    run.path.mkdir(parents=True)
    row = make_row(run)
    attempt.check_trust(row)
    for shared in (row.path.parent, row.path.parent / "job-1.sbatch"):
        mode = shared.stat().st_mode
        shared.chmod(mode | 0o002)
        with pytest.raises(UserError, match="chmod -R go-w"):
            attempt.check_trust(row)
        shared.chmod(mode)


@pytest.mark.parametrize(("harm", "words"), HARM)
@pytest.mark.parametrize("array", [False, True])
def test_a_pickle_in_which_others_have_a_hand_is_not_opened(
    tmp_path: Path, harm: Callable[[Path], None], words: str, array: bool
) -> None:
    marks = tmp_path / "ran"
    job = "7_0" if array else "7"
    with Files(tmp_path / "logs") as files:
        files.write([DelayedSubmission(marks.touch)], array, "#!/bin/bash\n")
        files.keep(["7"])
    paths = JobPaths(files.folder, job)
    harm(payload.path_of(files.folder, "7", array))
    assert step.call(paths, local=True) == 1 and not marks.exists()
    with pytest.raises(FailedJobError) as failure:
        LocalFunctionJob[Any](files.folder, job, [0]).result()
    assert re.search(words, str(failure.value)) and "Traceback" not in str(failure.value)
    with pytest.raises(UserError, match=words):
        payload.load(paths)


@pytest.mark.parametrize(("harm", "words"), HARM)
def test_a_result_in_which_others_have_a_hand_is_not_opened(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    job = LocalFunctionJob[Any](tmp_path, "7", [0])
    step.dump(("success", 4), job.paths.result_pickle)
    assert job.result() == 4
    harm(job.paths.result_pickle)
    with pytest.raises(UserError, match=words):
        job.result()


def test_where_a_file_system_has_no_modes_they_are_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a FAT disk or a Windows drive: every file is shown as 0777, whatever it was made with."""
    shown = tmp_path / "job.sbatch"
    shown.touch()
    shown.chmod(0o777)
    with pytest.raises(UserError):
        trust.check(shown)
    monkeypatch.setattr(trust, "_OTHERS_WRITE", stat.S_IWUSR)  # so every file here looks like one of those
    trust.check(shown)


def test_the_check_costs_no_import_of_what_is_heavy() -> None:
    code = "import sys, hpc.trust; sys.exit(any(name in sys.modules for name in ('torch', 'pydantic', 'submitit')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
