"""Runs that come back by themselves, with scripted ranks: here under bash, and on the real cluster by scontrol."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc import attempt, badnodes, ledger, slurm
from hpc.rundir import RunDir, read_json
from tests import scripted
from tests.fakeslurm import without_slurm
from tests.slurm.cluster import Cluster


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch)


def here(folder: Path, *acts: str, **more: Any) -> RunDir:
    return scripted.make(folder, *acts, cluster="local", overrides=("launch.instance=laptop",), **more)


def start(run: RunDir, **environ: str) -> subprocess.Popen[str]:
    own = {**os.environ, "HPC_STEP": "local", **environ}
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", str(run.script)], env=own, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_here_a_run_goes_on_after_a_kill_and_a_stop(tmp_path: Path) -> None:
    run = here(tmp_path, "environment, checkpoint 6, signal SIGKILL", "stop", "done")
    began = time.time()
    shell = start(run)
    said, _ = shell.communicate(timeout=60)
    assert shell.returncode == 0 and scripted.causes(run) == ["crash", "stopped", "finished"], said
    assert f"{run.name}: ended by SIGKILL; restart 1 of 3 since step 6; starting again" in said
    told = read_json(run.path / "environment.json")
    assert 0 <= float(told["HPC_END_TIME"]) - math.floor(began) - 600 < 60 and told["HPC_NOTICE_S"] == ""


def test_what_would_fail_again_is_not_tried_again(tmp_path: Path) -> None:
    run = here(tmp_path, "vain the loss is nan")
    said, _ = start(run).communicate(timeout=60)
    assert "not started again" in said and run.last_generation() == 1
    assert read_json(run.state)["phase"] == "ended"


def test_a_script_that_waits_to_start_again_ends_at_once_when_it_is_told(tmp_path: Path) -> None:
    run = here(tmp_path, "crash")
    shell = start(run)
    wait_for(lambda: "in 60 s" in str(read_json(run.state).get("reason", "")))
    wait_for(lambda: _sleeps(shell.pid))
    shell.send_signal(signal.SIGTERM)
    said, _ = shell.communicate(timeout=20)
    assert shell.returncode == 1 and said.splitlines()[-1].endswith("goes on; not started again"), said
    state = read_json(run.state)
    assert (state["phase"], state["cause"], run.last_generation()) == ("ended", "told", 2)


def _sleeps(shell: int) -> bool:
    children = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
    return any(Path(f"/proc/{child}/comm").read_text() == "sleep\n" for child in children)


def test_a_crash_loop_ends_after_its_budget(tmp_path: Path) -> None:
    run = here(tmp_path, "crash")
    run.experiment.write_text(run.experiment.read_text().replace("crash: 3", "crash: 1"))
    said, _ = start(run).communicate(timeout=60)
    state = read_json(run.state)
    assert scripted.causes(run) == ["crash", "crash"] and state["phase"] == "ended", said
    assert state["reason"].startswith(
        "2 crashes with nothing saved (launch.budgets.crash is 1): failed with exit code 1"
    )


def test_a_cancelled_run_whose_ranks_do_not_answer_is_running_until_it_is_gone(tmp_path: Path) -> None:
    """These are deaf; a second Ctrl-C kills them."""
    run = here(tmp_path, "environment, sleep 60")
    shell = start(run)
    attempt.record_submission(run, "local", str(shell.pid))
    wait_for((run.path / "environment.json").exists)
    ledger.cancel_all([run])
    assert ledger.status(run).state == "running" and ledger.status(run).detail == "being cancelled"
    shell.send_signal(signal.SIGINT)
    time.sleep(1.3)
    assert shell.poll() is None and ledger.status(run).live
    shell.send_signal(signal.SIGINT)
    said, _ = shell.communicate(timeout=20)
    assert (shell.returncode, ledger.status(run).state) == (137, "cancelled"), said


@pytest.mark.parametrize(
    ("acts", "code"), [("code 0", 1), ("vain x, code 0", 1), ("hang n", 76), ("code 2", 2), ("done, code 143", 0)]
)
def test_the_script_leaves_with_0_where_there_is_a_result_and_only_there(tmp_path: Path, acts: str, code: int) -> None:
    """Whatever the ranks have left with: what waits for the run would start."""
    run = here(tmp_path, acts)
    run.experiment.write_text(run.experiment.read_text().replace("crash: 3", "crash: 0").replace("hang: 3", "hang: 0"))
    shell = start(run)
    said, _ = shell.communicate(timeout=60)
    assert shell.returncode == read_json(run.state)["code"] == code, said


def test_a_tail_that_does_not_know_what_follows_leaves_with_no_0(tmp_path: Path) -> None:
    run = here(tmp_path, "code 0")
    (run.code / "hpc" / "requeue.py").write_text("raise OSError")
    shell = start(run)
    shell.communicate(timeout=60)
    assert shell.returncode == 1


# On the real cluster.


@pytest.fixture
def cluster(slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    for key, value in slurm_cluster.environment().items():
        monkeypatch.setenv(key, value)
    yield slurm_cluster
    slurm_cluster.run("scancel", "--me")


def on_slurm(folder: Path, *acts: str, **more: Any) -> RunDir:
    return scripted.make(folder, *acts, overrides=("launch.mem=50MB", "launch.partition=gpu"), **more)


@pytest.mark.slurm
def test_a_requeued_job_comes_back_as_soon_as_it_may_and_keeps_off_a_node_where_it_hung_twice(
    cluster: Cluster, tmp_path: Path
) -> None:
    """SLURM alone would make each restart wait for 121 s."""
    run = on_slurm(tmp_path, "environment, hang node0", "checkpoint 4, hang node0", "done")
    slurm.submit(run.script)
    cluster.wait_for(lambda: len(scripted.causes(run)) == 3, 110, "the end of the third attempt")
    assert scripted.causes(run) == ["hang", "hang", "finished"]
    attempts = [event for event in run.read_events() if event["event"] == "start"]
    assert [event["restart"] for event in attempts] == [0, 1, 2] and attempts[-1]["node"] == "node1"
    assert badnodes.current(run.runs).keys() == {"node0"}
    told = read_json(run.path / "environment.json")
    assert abs(float(told["HPC_END_TIME"]) - attempts[0]["time"] - 600) < 60 and told["HPC_NOTICE_S"] == "5"


@pytest.mark.slurm
def test_what_follows_a_run_whose_ranks_left_with_0_and_without_a_result_does_not_start(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = on_slurm(tmp_path, "code 0")
    run.experiment.write_text(run.experiment.read_text().replace("crash: 3", "crash: 0"))
    job = slurm.submit(run.script)
    cluster.wait_state(job, "FAILED")
    assert read_json(run.state)["code"] == 1


def test_an_attempt_is_not_kept_by_a_silent_controller(tmp_path: Path, fake: Any) -> None:
    run = on_slurm(tmp_path, "done")
    for command in ("squeue", "scontrol"):
        fake.hangs(command)
    environ = {**os.environ, "SLURM_JOB_ID": "55"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "hpc.attempt", str(run.path)], env=environ, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - began < 20 and "HPC_END_TIME='' HPC_NOTICE_S=''" in done.stdout
    assert "not known" in done.stderr and attempt.same_process(os.getpid(), read_json(run.state)["process_start"])
