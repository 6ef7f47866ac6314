"""Start of an attempt: who gets the run, and who is refused."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc import attempt, slurm
from hpc.errors import UserError
from hpc.rundir import RunDir, read_json, write_json
from tests.fakeslurm import FakeSlurm, without_slurm

HOST = os.uname().nodename


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch)


@pytest.fixture
def other() -> Iterator[int]:
    """The pid of a live process that is not ours."""
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


def hold(run: RunDir, **state: Any) -> None:
    held = {"generation": 1, "job": None, "host": HOST, "node": "n", "pid": 1, "phase": "training", "step": 40}
    start = attempt.process_start(int(state.get("pid", 1)))
    write_json(run.state, {**held, "process_start": start, "epoch": 2, "started": 1.0, "time": time.time(), **state})


def test_the_generation_grows_with_every_start_and_the_place_is_kept(run: RunDir) -> None:
    for generation in (1, 2, 3):
        values = attempt.begin(run, os.getpid())
        assert values["HPC_GENERATION"] == str(generation) and int(values["HPC_MASTER_PORT"]) > 0
        state = read_json(run.state)
        assert (state["generation"], state["pid"], state["phase"]) == (generation, os.getpid(), "starting")
        write_json(run.state, {**state, "step": 10 * generation, "epoch": generation})
    assert (read_json(run.state)["step"], run.last_generation()) == (30, 3)
    assert [event["event"] for event in run.read_events()] == ["start"] * 3


def test_the_generation_is_above_that_of_every_checkpoint(run: RunDir) -> None:
    """Where events/ was lost, or checkpoints come from another run."""
    for name in ("g002-s00000047", "g001-s00000090"):
        (run.checkpoints / name).mkdir(parents=True)
    assert attempt.begin(run, os.getpid())["HPC_GENERATION"] == "3"


def test_generations_taken_at_once_are_never_shared(run: RunDir) -> None:
    taken: list[int] = []
    gate = threading.Barrier(8)

    def take() -> None:
        gate.wait()
        for _ in range(10):
            taken.append(attempt._take_generation(run))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 81))


def test_of_shells_that_start_a_run_at_once_one_gets_it(run: RunDir) -> None:
    text = '"$0" -m hpc.attempt "$1"; code=$?; echo "code $code"; read -r _'
    command = ["bash", "-c", text, sys.executable, str(run.path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    shells = [subprocess.Popen(command, text=True, **pipes) for _ in range(6)]
    said = []
    for shell in shells:
        assert shell.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith("code "):
            lines.append(shell.stdout.readline())
        said.append("".join(lines))
    for shell in shells:
        shell.communicate("\n")
    winners = [words for words in said if words.endswith("code 0\n")]
    losers = [words for words in said if words.endswith("code 2\n")]
    assert (len(winners), len(losers)) == (1, 5), said
    assert f"HPC_GENERATION={read_json(run.state)['generation']}" in winners[0]
    assert all("exp-0000aaaa is held by process" in words and "Traceback" not in words for words in losers)


def test_a_finished_run_is_refused(run: RunDir) -> None:
    write_json(run.result, {"finished": True})
    with pytest.raises(UserError, match=r"exp-0000aaaa is finished: .*see 'hpc show exp-0000aaaa'"):
        attempt.begin(run, os.getpid())
    assert run.last_generation() == 0 and not run.state.exists()
    text = 'attempt=$("$0" -m hpc.attempt "$1") || exit $?; eval "$attempt"; exit 9'  # as the template has it
    shell = subprocess.run(["bash", "-c", text, sys.executable, str(run.path)], stderr=subprocess.PIPE, text=True)
    assert shell.returncode == 0 and "is finished" in shell.stderr


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        attempt.begin(RunDir(tmp_path / "nothing"), os.getpid())
    assert not list(tmp_path.iterdir())


def test_a_live_holder_here_is_respected_and_its_records_stay(run: RunDir, other: int) -> None:
    hold(run, pid=other)
    before = run.state.read_text()
    with pytest.raises(UserError, match=rf"held by process {other} on {HOST}: .*'hpc cancel exp-0000aaaa'"):
        attempt.begin(run, os.getpid())
    assert run.state.read_text() == before and run.last_generation() == 0


@pytest.mark.parametrize("phase", ["stopped", "ended"])
def test_a_holder_that_has_ended_its_attempt_is_none(run: RunDir, other: int, phase: str) -> None:
    hold(run, pid=other, phase=phase)
    assert attempt.begin(run, os.getpid())["HPC_GENERATION"] == "1"


def test_a_dead_holder_is_taken_over_and_a_zombie_is_dead(run: RunDir) -> None:
    dead = subprocess.Popen(["true"])
    while attempt.process_alive(dead.pid):
        time.sleep(0.01)
    assert Path(f"/proc/{dead.pid}").exists(), "not waited for yet: a zombie"
    hold(run, pid=dead.pid)
    attempt.begin(run, os.getpid())
    dead.wait()
    hold(run, pid=dead.pid)
    attempt.begin(run, os.getpid())
    assert read_json(run.state)["pid"] == os.getpid()


@pytest.mark.parametrize("start", ["", None, "another-boot 4711"])
def test_a_holder_whose_number_another_process_has_by_now_is_dead(run: RunDir, other: int, start: str | None) -> None:
    hold(run, pid=other, process_start=start)
    assert attempt.begin(run, os.getpid())["HPC_GENERATION"] == "1"


def test_a_processs_start_outlives_exec_and_tells_it_from_others(other: int) -> None:
    command = 'read -r _; exec -a "odd ) (name" sleep 60'
    shell = subprocess.Popen(["bash", "-c", command], stdin=subprocess.PIPE)
    try:
        before = attempt.process_start(shell.pid)
        assert before and before == attempt.process_start(shell.pid) != attempt.process_start(os.getpid())
        assert shell.stdin is not None
        shell.stdin.write(b"go\n")
        shell.stdin.flush()
        while b"odd" not in Path(f"/proc/{shell.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        assert attempt.same_process(shell.pid, before)
    finally:
        shell.kill()
        shell.wait()
    assert not attempt.same_process(shell.pid, before) and attempt.process_start(shell.pid) == ""


def test_a_holder_on_another_host_counts_while_it_writes(run: RunDir, other: int) -> None:
    hold(run, host="login2", pid=other)
    with pytest.raises(UserError, match="on login2"):
        attempt.begin(run, os.getpid())
    for wrong in (-600, 3600):  # a dead one, and one whose file server has set its clock back since
        os.utime(run.state, (time.time() + wrong, time.time() + wrong))
        assert attempt.begin(run, os.getpid())
        hold(run, host="login2", pid=other)


def test_the_clock_of_a_holder_elsewhere_does_not_matter(run: RunDir) -> None:
    """What counts is when its file changed, by the file server's clock."""
    hold(run, host="login2", time=time.time() - 3600)
    with pytest.raises(UserError, match="on login2"):
        attempt.begin(run, os.getpid())


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING"])
def test_a_holder_on_slurm_is_asked_for(run: RunDir, fake: FakeSlurm, state: str) -> None:
    hold(run, job="55", host="node9")
    fake.job("55", state, node="node9")
    with pytest.raises(UserError, match="held by job 55 on node9"):
        attempt.begin(run, os.getpid())


@pytest.mark.parametrize("state", ["PENDING", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", ""])
def test_a_holder_that_slurm_no_longer_runs_is_taken_over(run: RunDir, fake: FakeSlurm, state: str) -> None:
    hold(run, job="55", host="node9")
    fake.job("56", "RUNNING", comment="another|job, of mine")
    if state:
        fake.job("55", state)
    assert attempt.begin(run, os.getpid())["HPC_GENERATION"] == "1"


def test_where_slurm_does_not_answer_the_holder_counts_while_it_writes(run: RunDir, fake: FakeSlurm) -> None:
    fake.fails("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    hold(run, job="55", host="node9")
    with pytest.raises(UserError, match="held by job 55"):
        attempt.begin(run, os.getpid())
    os.utime(run.state, (1, 1))
    assert attempt.begin(run, os.getpid())


def test_a_controller_that_hangs_is_slurms_error_in_words(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.hangs("squeue")
    monkeypatch.setattr(slurm, "_TIMEOUT_S", 0.2)
    with pytest.raises(slurm.SlurmError, match=r"squeue .*: no answer within 0.2 s"):
        slurm.queue()


def test_a_requeue_takes_its_own_lease_at_once(run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    hold(run, job="55", host="node9")
    fake.job("55", "RUNNING")
    attempt.begin(run, os.getpid())
    state = read_json(run.state)
    assert (state["job"], state["host"]) == ("55", HOST)
    assert run.read_events()[-1]["restart"] == 1 and not fake.calls()


def test_a_task_of_an_array_holds_by_its_own_name(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (("JOB_ID", "57"), ("ARRAY_JOB_ID", "55"), ("ARRAY_TASK_ID", "2")):
        monkeypatch.setenv(f"SLURM_{key}", value)
    attempt.begin(run, os.getpid())
    assert read_json(run.state)["job"] == "55_2"


def test_a_local_step_inside_a_job_is_no_job(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    monkeypatch.setenv("HPC_STEP", "local")
    attempt.begin(run, os.getpid())
    assert read_json(run.state)["job"] is None


def test_a_second_script_in_one_allocation_is_refused_and_a_restart_is_not(
    run: RunDir, other: int, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In salloc both have the same job number."""
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    fake.job("55", "RUNNING", comment=run.name)
    hold(run, job="55", pid=other, restart=1)
    with pytest.raises(UserError, match="is held by job 55"):
        attempt.begin(run, os.getpid())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")  # requeued: of a lost node the old shell may live on
    assert attempt.begin(run, os.getpid())["HPC_GENERATION"] == "1"
    assert read_json(run.state)["restart"] == 2


def test_a_disk_that_is_full_for_a_moment_costs_no_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attempt, "_AGAIN_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["attempt", str(run.path)])
    full = [OSError(28, "No space left on device")] * 2
    write = attempt.write_json
    monkeypatch.setattr(attempt, "write_json", lambda *given: _raise(full.pop()) if full else write(*given))
    assert attempt.main() == 0 and "HPC_GENERATION=3" in capsys.readouterr().out
    monkeypatch.setattr(attempt, "_PATIENCE_S", -1.0)
    monkeypatch.setattr(attempt, "write_json", lambda *given: _raise(OSError(28, "No space left on device")))
    assert attempt.main() == 74
    said = capsys.readouterr().err
    assert said == "this attempt could not begin: [Errno 28] No space left on device\n"


def _raise(error: OSError) -> None:
    raise error
