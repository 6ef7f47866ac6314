"""End of an attempt: what follows a stop, a failure and a bad node, and what SLURM is asked for."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpc import badnodes, requeue, slurm
from hpc.rundir import ROWS, RunDir, read_json, write_json, write_text
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


def bad(run: RunDir, generation: int = 3, node: str = "node0", reason: str = "GPU 0 is lost", rank: int = 0) -> None:
    run.event("bad-node", f"rank{rank}", generation, node=node, reason=reason)


def changes(fake: FakeSlurm) -> list[str]:
    """What SLURM was asked to do."""
    asked = [call for call in fake.calls() if not call.startswith("squeue") and " show " not in call]
    return [call for call in asked if "--test-only" not in call]


TOLD = "the batch shell was told to end"
TABLE = [
    # stop.json's generation, exit code, told, finished -> again, why
    (3, 75, False, False, True, "stopped by SIGTERM at step 40"),
    (3, 143, False, False, True, "stopped by SIGTERM at step 40"),
    (3, 137, False, False, True, "stopped by SIGTERM at step 40"),
    (3, 0, False, False, True, "stopped by SIGTERM at step 40"),
    (3, 75, True, False, False, TOLD),
    (3, 143, True, False, False, TOLD),
    (2, 75, False, False, False, "failed with exit code 75"),
    (2, 143, True, False, False, TOLD),
    (None, 1, False, False, False, "failed with exit code 1"),
    (None, 2, False, False, False, "bad input"),
    (None, 77, False, False, False, "failed with exit code 77"),
    (None, 137, False, False, False, "failed with exit code 137"),
    (None, 143, True, False, False, TOLD),
    (None, 0, False, True, False, "finished"),
    (3, 75, False, True, False, "finished"),
    (None, 143, True, True, False, "finished"),
]


@pytest.mark.parametrize(("stopped", "code", "told", "finished", "again", "why"), TABLE)
def test_what_follows_an_end(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    stopped: int | None,
    code: int,
    told: bool,
    finished: bool,
    again: bool,
    why: str,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if stopped:
        write_json(run.stop, {"generation": stopped, "cause": "SIGTERM", "step": 40})
    if finished:
        write_json(run.result, {"finished": True})
    decision, reason = requeue.decide(run, 3, code, told)
    assert decision is again and reason.startswith(why)
    monkeypatch.delenv("SLURM_JOB_ID")
    local = "cancelled or interrupted; 'hpc resume" if why is TOLD else why
    decision, reason = requeue.decide(run, 3, code, told)
    assert decision is again and reason.startswith(local)


@pytest.fixture
def stopped(run: RunDir) -> RunDir:
    hold(run, job="55")
    write_json(run.stop, {"generation": 3, "cause": "SIGUSR2", "step": 40})
    return run


def test_here_the_tail_starts_again_by_itself(stopped: RunDir) -> None:
    assert requeue.finish(stopped, 3, 75, False) == "again"
    state = read_json(stopped.state)
    assert (state["phase"], state["code"], state["step"]) == ("stopped", 75, 40)
    assert [event["event"] for event in stopped.read_events()] == ["end"]


def test_an_attempt_that_lost_the_run_touches_nothing(stopped: RunDir) -> None:
    hold(stopped, generation=4)
    before = stopped.state.read_text()
    assert requeue.finish(stopped, 3, 75, False) == "end"
    assert stopped.state.read_text() == before and not stopped.events.exists()


def test_on_slurm_the_tail_asks_scontrol_for_the_task_alone(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake, "55_2")
    assert requeue.finish(stopped, 3, 143, False) == "end"
    assert fake.calls() == ["scontrol requeue 55_2"]
    assert [event["event"] for event in stopped.read_events()] == ["end", "requeue"]


def test_a_shell_that_was_told_asks_for_nothing(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    assert requeue.finish(stopped, 3, 143, True) == "end"
    assert not fake.calls() and read_json(stopped.state)["phase"] == "stopped"


# Where requeue is refused.

DISABLED = "Requested operation is presently disabled for job 55"


def test_where_requeue_is_refused_the_script_is_submitted_once(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "54")  # of an array that the job's own sbatch was started from
    fake.fails("scontrol", DISABLED)
    fake.job("55", "RUNNING", comment=stopped.name)
    requeue.finish(stopped, 3, 75, False)
    assert fake.jobs() == {"102": "PENDING", "55": "RUNNING"}
    submitted = read_json(stopped.submit)
    assert (submitted["job"], submitted["cluster"]) == ("102", "slurm") and submitted["time"] > time.time() - 60
    requeue.finish(stopped, 3, 75, False)
    assert len(fake.jobs()) == 2, "one that waits under the same token is not submitted twice"


@pytest.fixture
def row(run: RunDir) -> RunDir:
    """Row 4 of a sweep of two chunks of three rows."""
    sweep = SweepDir(run.path.parent / "exp-sweep-0000bbbb")
    sweep.path.mkdir()
    (sweep.path / ROWS).write_text("".join(f"exp-0000000{number}\n" for number in range(6)))
    sweep.write_chunks([Chunk(0, 0, 3), Chunk(1, 3, 3, parallel=2)])
    for number in range(2):
        write_text(sweep.script(number), f"#!/bin/bash\n#SBATCH --comment={sweep.token(number)}\n#SBATCH --array=0-2\n")
    row = sweep.rows()[4]
    hold(row, job="54_1")
    return row


def test_of_a_sweep_only_the_task_itself_is_submitted_anew(
    row: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake, "54_1")
    fake.job("54_2", "PENDING", comment="exp-sweep-0000bbbb/1")
    fake.fails("scontrol", DISABLED)
    write_json(row.stop, {"generation": 3, "cause": "SIGUSR2", "step": 40})
    requeue.finish(row, 3, 75, False)
    (call,) = [call for call in fake.calls() if call.startswith("sbatch")]
    assert "--array=1 " in call and call.endswith("exp-sweep-0000bbbb/job-1.sbatch")
    assert read_json(row.submit)["job"] == "103_1"


@pytest.mark.parametrize("words", ["Unexpected message received for job 55", "Socket timed out on send/recv operation"])
def test_a_controller_that_is_silent_for_a_moment_is_asked_again(
    stopped: RunDir, fake: FakeSlurm, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    fake.job("55", "RUNNING", comment=stopped.name)
    fake.fails("scontrol", words)
    asked: list[str] = []
    requeue_once = slurm.requeue

    def ask(job: str) -> None:
        asked.append(job)
        if len(asked) == 3:
            (fake.folder / "scontrol.fails").unlink()
        requeue_once(job)

    monkeypatch.setattr(slurm, "requeue", ask)
    monkeypatch.setattr(requeue, "_AGAIN_S", 0.01)
    requeue.finish(stopped, 3, 75, False)
    assert len(asked) == 3 and fake.jobs() == {"55": "PENDING"}
    assert stopped.read_events()[-1]["event"] == "requeue"


def test_a_requeue_that_was_never_heard_is_not_recorded_as_one(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    fake.fails("scontrol", "Unexpected message received for job 55")
    monkeypatch.setattr(requeue, "_PATIENCE_S", -1.0)
    assert requeue.finish(stopped, 3, 75, False) == "end"
    assert [event["event"] for event in stopped.read_events()][-1] == "end"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_job_that_is_cancelled_meanwhile_is_not_submitted_anew(
    stopped: RunDir, fake: FakeSlurm, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    fake.fails("scontrol", DISABLED)
    fake.job("55", state, comment=stopped.name)
    requeue.finish(stopped, 3, 75, False)
    assert fake.jobs() == {"55": state}


@pytest.mark.parametrize("words", ["Job/step already completing or completed", "Invalid job id specified"])
def test_another_refusal_of_scontrol_submits_nothing(
    stopped: RunDir, fake: FakeSlurm, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    fake.fails("scontrol", words)
    assert requeue.finish(stopped, 3, 75, False) == "end"
    assert fake.jobs() == {} and words in capsys.readouterr().err


def test_when_nothing_can_be_submitted_the_way_on_is_named(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    fake.fails("scontrol", DISABLED)
    fake.fails("sbatch", "sbatch: error: invalid account")
    assert requeue.finish(stopped, 3, 75, False) == "end"
    said = capsys.readouterr().err
    assert "invalid account" in said and "'hpc resume exp-0000aaaa' goes on from there" in said


def test_the_tail_prints_one_word(stopped: RunDir) -> None:
    command = [sys.executable, "-m", "hpc.requeue", str(stopped.path), "3", "75", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "again\n"
    assert done.stderr == "exp-0000aaaa: stopped by SIGUSR2 at step 40; starting again\n"
    assert json.loads(stopped.state.read_text())["phase"] == "stopped"


# Bad nodes.


@pytest.mark.parametrize("code", [77, 137, 143])
def test_a_bad_node_is_left_out_by_the_job_and_remembered_for_others(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    badnodes.remember(run.runs, "fake", "another", {"node9": "no scratch space"})
    bad(run)
    bad(run, rank=1)
    assert requeue.finish(run, 3, code, False) == "end"
    assert changes(fake) == ["scontrol requeue 55", "scontrol update JobId=55 ExcNodeList=node0,node9"]
    assert badnodes.current(run.runs) == {"node9": "no scratch space", "node0": "GPU 0 is lost"}
    state = read_json(run.state)
    assert (state["phase"], state["code"], state["step"]) == ("stopped", 77, 40)
    assert state["reason"] == "bad node node0: GPU 0 is lost; the job keeps off node0, node9"


def test_the_bad_node_of_an_earlier_attempt_is_no_word_on_this_one(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    bad(run, generation=2)
    requeue.finish(run, 3, 143, False)
    assert not fake.calls() and read_json(run.state)["reason"] == "failed with exit code 143"


def test_a_row_leaves_the_node_out_for_itself_alone(
    row: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake, "54_1")
    bad(row)
    requeue.finish(row, 3, 77, False)
    assert changes(fake) == ["scontrol requeue 54_1", "scontrol update JobId=54_1 ExcNodeList=node0"]
    assert badnodes.current(row.path.parent.parent) == {"node0": "GPU 0 is lost"}


def test_where_requeue_is_refused_the_new_job_leaves_the_node_out(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    bad(run)
    monkeypatch.setattr(slurm, "cluster_name", lambda: "fake")  # the fake scontrol fails in all it is asked
    fake.fails("scontrol", DISABLED)
    requeue.finish(run, 3, 77, False)
    assert changes(fake)[-1] == f"sbatch --parsable --exclude=node0 {run.script}"


def test_here_a_bad_machine_ends_the_run_and_is_not_remembered(run: RunDir) -> None:
    hold(run)
    bad(run, node="laptop")
    assert requeue.finish(run, 3, 77, False) == "end"
    reason = read_json(run.state)["reason"]
    assert reason == "bad node laptop: GPU 0 is lost; once that is mended, 'hpc resume exp-0000aaaa' goes on"
    assert not badnodes.file(run.runs).exists()


def test_a_cancelled_job_stays_so_and_its_bad_node_is_remembered(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    bad(run)
    requeue.finish(run, 3, 143, True)
    assert changes(fake) == [] and badnodes.current(run.runs) == {"node0": "GPU 0 is lost"}


def test_a_run_meets_a_node_once_a_day(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_job(monkeypatch, fake)
    run.event("requeue", "shell", 2, job="55", out=["node0"])
    run.event("checkpoint", "rank0", 2, step=40)
    hold(run, job="55")
    bad(run)
    requeue.finish(run, 3, 77, False)
    assert changes(fake) == []
    assert "the run was to keep off node0 and came there again; not started again" in capsys.readouterr().err


def test_bad_nodes_in_a_row_without_progress_end_the_run(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    for generation, node in ((1, "node7"), (2, "node8"), (3, "node9")):
        run.event("requeue", "shell", generation, job="55", out=[node])
    bad(run, generation=4)
    again, reason = requeue.decide(run, 4, 77, False, {"node0": "GPU 0 is lost"}, ["node0"])
    assert not again and reason.endswith("4 attempts in a row ended so: is it the nodes, or the run itself?")
    run.event("checkpoint", "rank0", 3, step=40)
    assert requeue.decide(run, 4, 77, False, {"node0": "GPU 0 is lost"}, ["node0"])[0]


GONE = "scratch space /scrach: No such file or directory"
NAMED = ("scratch space /s/node7/x: No such file or directory", "scratch space /s/node0/x: No such file or directory")


@pytest.mark.parametrize(
    ("before", "now", "wrong"),
    [
        (GONE, GONE, True),
        (*NAMED, True),
        (GONE, "scratch space /other: No such file or directory", False),
        (*["scratch space /scrach: Input/output error"] * 2, False),
        (*["scratch space /scrach has not answered for 20 s"] * 2, False),
        (*["GPU 0 is lost"] * 2, False),
    ],
)
def test_a_scratch_folder_that_no_node_has_is_no_nodes_fault(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, before: str, now: str, wrong: bool
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    run.event("requeue", "shell", 2, job="55", out=["node7"])
    badnodes.remember(run.runs, "fake", run.name, {"node7": before, "lost": "GPU 0 is lost"})
    bad(run, 2, "node7", before)
    bad(run, 3, "node0", now)
    assert requeue.finish(run, 3, 77, False) == "end"
    state, known = read_json(run.state), set(badnodes.known(run.runs, "fake"))
    if wrong:
        words = f"bad input: {now}, on two nodes in a row: it is named wrongly; correct the instance's 'scratch'"
        assert state["code"] == 2 and state["reason"].startswith(words)
        assert known == {"lost"} and changes(fake) == []
    else:
        assert state["code"] == 77 and known == {"node7", "node0", "lost"}
        assert changes(fake)[0] == "scontrol requeue 55"


def test_one_node_that_lacks_the_folder_twice_is_its_own_fault(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    bad(run, 2, "node0", GONE)
    bad(run, 3, "node0", GONE)
    requeue.finish(run, 3, 77, False)
    assert read_json(run.state)["code"] == 77 and set(badnodes.known(run.runs, "fake")) == {"node0"}


IMPOSSIBLE = "allocation failure: Requested node configuration is not available"


@pytest.mark.parametrize(
    ("words", "nodes", "states", "again"),
    [
        (IMPOSSIBLE, 1, ["IDLE"], False),  # there is another, and it does not have what the job needs
        (IMPOSSIBLE, 1, ["DOWN*"], True),
        (IMPOSSIBLE, 1, ["IDLE+DRAIN"], True),
        (IMPOSSIBLE, 2, ["DOWN*"], False),
        (IMPOSSIBLE, 1, [], False),
        ("allocation failure: Job violates accounting/QOS policy", 1, [], True),
        ("Unable to contact slurm controller", 1, [], True),
    ],
)
def test_a_job_that_no_other_node_can_run_ends(
    run: RunDir,
    fake: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    nodes: int,
    states: list[str],
    again: bool,
) -> None:
    in_job(monkeypatch, fake, nodes=nodes)
    hold(run, job="55")
    bad(run)
    fake.fails("sbatch", words)
    others = [{"NodeName": f"node{number}", "State": state} for number, state in enumerate(states, 1)]
    fake.configure(nodes=[{}, *others, {"NodeName": "far", "Partitions": "other,more", "State": "DOWN"}])
    requeue.finish(run, 3, 77, False)
    assert bool(changes(fake)) is again
    (asked,) = [call for call in fake.calls() if "--test-only" in call]
    assert asked == f"sbatch --test-only --exclude=node0 --partition=gpu --nodes={nodes} {run.script}"
    if not again:
        state = read_json(run.state)
        assert state["phase"] == "ended" and "without node0 no nodes are left that could run it" in state["reason"]


def test_bad_nodes_that_cannot_be_written_down_are_left_out_all_the_same(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    bad(run)
    Path(run.runs / ".bad-nodes.lock").mkdir()
    requeue.finish(run, 3, 77, False)
    assert changes(fake)[-1] == "scontrol update JobId=55 ExcNodeList=node0"
    assert "not remembered for other runs" in capsys.readouterr().err
