"""Runs that follow others: what SLURM is given, what waits where there is no SLURM, and what can never come true."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc import after, ledger, submission
from hpc.attempt import process_alive, process_start
from hpc.errors import UserError
from hpc.rundir import RunDir, write_json, write_text
from hpc.sweepdir import Chunk, SweepDir
from tests.fakeslurm import FakeSlurm
from tests.slurm.cluster import Cluster

LIMIT_S = 60
SCRIPT = "#!/bin/bash\n#SBATCH --comment={name}\n#SBATCH --output=/dev/null\n#SBATCH --mem=100M\n{line}\n"


def submitted(run: RunDir, job: str, cluster: str = "slurm") -> RunDir:
    here = {"process_start": process_start(int(job))} if cluster == "local" else {}
    write_json(run.submit, {"cluster": cluster, "job": job, "time": time.time(), **here})
    return run


def another(run: RunDir, name: str) -> RunDir:
    other = RunDir(run.path.parent / name)
    write_text(other.experiment, "name: exp\n")
    return other


def sweep_of_three(run: RunDir, *states: str, fake: FakeSlurm) -> SweepDir:
    """Array 70, each row in squeue in its state; one without a state is finished."""
    sweep = SweepDir(run.path.parent / "exp-sweep-0123abcd")
    names = [f"exp-0000000{number}" for number in range(3)]
    for number, (name, state) in enumerate(zip(names, states, strict=True)):
        row = RunDir(sweep.path / name)
        write_text(row.experiment, "name: exp\n")
        if state:
            fake.job(f"70_{number}", state, comment=f"{sweep.name}/0")
        else:
            write_json(row.result, {"finished": True})
    sweep.rows_file.write_text("".join(f"{name}\n" for name in names))
    sweep.write_chunks([Chunk(0, 0, 3)])
    sweep.record("slurm", {0: ("70", [0, 1, 2])})
    return sweep


@pytest.mark.parametrize("name", ["exp-0000aaaa", "exp-0000", "0000aaaa", "71"])
def test_slurm_is_given_one_dependency_by_name_beginning_id_or_job(fake: FakeSlurm, run: RunDir, name: str) -> None:
    submitted(run, "71")
    fake.job("71", "PENDING", "Priority", comment=run.name)
    options = after.options([name], run.path.parent, "slurm")
    assert options == ["--dependency=afterok:71", "--kill-on-invalid-dep=yes"]
    assert after.options([name, str(run.path)], run.path.parent, "slurm") == options, "each job once"


def test_of_a_sweep_the_rows_that_are_not_finished(fake: FakeSlurm, run: RunDir) -> None:
    sweep = sweep_of_three(run, "RUNNING", "", "PENDING", fake=fake)
    given = after.options([sweep.name], run.path.parent, "slurm")
    assert given == ["--dependency=afterok:70_0:70_2", "--kill-on-invalid-dep=yes"]


def test_a_sweep_with_a_row_that_will_not_finish_is_refused(fake: FakeSlurm, run: RunDir) -> None:
    sweep = sweep_of_three(run, "RUNNING", "TIMEOUT", "PENDING", fake=fake)
    words = f"--after {sweep.name}: exp-00000001 is lost, so it will not finish; 'hpc resume {sweep.name}' first"
    with pytest.raises(UserError) as refusal:
        after.options([sweep.name], run.path.parent, "slurm")
    assert str(refusal.value) == words


def test_what_is_finished_is_not_waited_for(fake: FakeSlurm, run: RunDir) -> None:
    write_json(run.result, {"finished": True})
    for cluster in ("slurm", "local"):
        assert after.options([run.name], run.path.parent, cluster) == []


def test_who_cannot_be_followed_is_named(
    fake: FakeSlurm, run: RunDir, alive: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    runs = run.path.parent
    submitted(another(run, "here-0000aaaa"), str(alive.pid), "local")
    write_json(another(run, "failed-0000aaaa").state, {**_ended(), "code": 1, "reason": "failed with exit code 1"})
    for name, words in {
        "nobody": "--after nobody: no run 'nobody' in ",
        run.name: f"--after {run.name}: {run.name} is planned, so it will not finish; 'hpc resume {run.name}' first",
        "failed": "--after failed: failed-0000aaaa is failed, so it will not finish",
        "here": "--after here: here-0000aaaa runs on local, and this one would on slurm",
    }.items():
        with pytest.raises(UserError) as refusal:
            after.options([name], runs, "slurm")
        assert str(refusal.value).startswith(words) and "\n" not in str(refusal.value)
    assert after.options(["here"], runs, "local") == [str(runs / "here-0000aaaa")]


def _ended() -> dict[str, object]:
    return {"phase": "ended", "pid": 1, "host": "away", "time": time.time(), "started": time.time() - 9, "job": None}


def test_waiting_ends_when_all_are_finished_when_one_fails_or_when_it_is_given_up(
    run: RunDir, alive: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(after, "_POLL_S", 0.01)
    other = submitted(another(run, "here-0000aaaa"), str(alive.pid), "local")
    write_json(run.result, {"finished": True})
    rounds: list[int] = []

    def given_up() -> bool:
        rounds.append(len(rounds))
        if len(rounds) == 3:
            write_json(other.result, {"finished": True})
        return len(rounds) > 20

    assert after.wait([run, other], given_up) and len(rounds) == 3
    other.result.unlink()
    assert not after.wait([run, other], given_up) and len(rounds) == 21, "given up"
    alive.kill()
    alive.wait()
    assert not after.wait([run, other])
    assert capsys.readouterr().err == "not started: here-0000aaaa, which it was to follow, is failed\n"


def test_a_local_run_that_waits_starts_only_after_a_finished_one_and_can_be_ended(
    run: RunDir, alive: subprocess.Popen[bytes]
) -> None:
    """What waits becomes the run's shell: nothing of it goes on once it is told to end."""
    first = submitted(another(run, "here-0000aaaa"), str(alive.pid), "local")
    run.script.write_text(f"touch {run.path}/started\n")
    waiting = int(submission.submit(run, "local", [str(first.path)]).job_id)
    _wait(lambda: _waiting_for(first), "hpc.after")
    (pid,) = _waiting_for(first)
    os.kill(waiting, signal.SIGTERM)
    _wait(lambda: not process_alive(pid), "its end")
    assert not (run.path / "started").exists()
    write_json(first.result, {"finished": True})
    submission.submit(run, "local", [str(first.path)])
    _wait((run.path / "started").exists, "the start")


def _waiting_for(run: RunDir) -> list[int]:
    wanted = [b"-m", b"hpc.after", str(run.path).encode()]
    return [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if _words(p)[1:4] == wanted]


def _words(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\0")
    except OSError:
        return []


def _wait(condition: object, what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"waited {LIMIT_S} s for {what}"
        time.sleep(0.05)


def test_waiting_as_a_command(run: RunDir) -> None:
    command = [sys.executable, "-m", "hpc.after", str(run.path), "--", "sh", "-c", "yes | head -n 1; exit 7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == f"not started: {run.name}, which it was to follow, is planned\n"
    write_json(run.result, {"finished": True})
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "y\n", ""), "the command's own, as from a shell"


@pytest.mark.slurm
def test_on_slurm_a_run_starts_after_a_good_end_and_ends_after_a_bad_one(
    slurm_cluster: Cluster, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in slurm_cluster.environment().items():
        monkeypatch.setenv(key, value)
    runs = run.path.parent
    first, second, third = (another(run, f"{name}-0000aaaa") for name in ("first", "second", "third"))
    third.experiment.write_text("name: exp\n")
    for one, line, names in ((first, "sleep 1", []), (second, "exit 3", ["first"]), (third, "true", ["second"])):
        one.script.write_text(SCRIPT.format(name=one.name, line=line))
        submission.submit(one, "slurm", after.options(names, runs, "slurm"))
    waiting = ledger.statuses([second, third])
    assert [(status.state, status.detail) for status in waiting] == [("pending", "Dependency")] * 2
    job = waiting[1].job
    slurm_cluster.wait_for(lambda: slurm_cluster.state(job) == "CANCELLED", 60, "the end of the third")
    assert slurm_cluster.state(waiting[0].job) == "FAILED", "it began after the first had ended well"
    assert slurm_cluster.job_field(job, "Reason") == "DependencyNeverSatisfied"
    assert not ledger.status(third).live
