"""End of an attempt: what is recorded, what SLURM is asked for, and what the script does next here."""

import json
import subprocess
import sys
import time

import pytest

from hpc import requeue, slurm
from hpc.rundir import RunDir, read_json, write_json, write_text
from tests.fakeslurm import FakeSlurm
from tests.tails import changes, hold, in_job, make_row


@pytest.fixture
def stopped(run: RunDir) -> RunDir:
    hold(run, job="55")
    write_json(run.stop, {"generation": 3, "cause": "SIGUSR2", "step": 40})
    return run


def test_here_the_tail_starts_again_by_itself(stopped: RunDir) -> None:
    assert requeue.finish(stopped, 3, 75, False) == "again 0"
    state = read_json(stopped.state)
    assert (state["phase"], state["code"], state["step"]) == ("stopped", 75, 40)
    assert [event["event"] for event in stopped.read_events()] == ["end"]


def test_an_attempt_that_lost_the_run_touches_nothing(stopped: RunDir) -> None:
    hold(stopped, generation=4)
    stopped.event("start", "shell", 4)
    before = stopped.state.read_text()
    assert requeue.finish(stopped, 3, 75, False) == "end 75"
    assert stopped.state.read_text() == before and [event["event"] for event in stopped.read_events()] == ["start"]


@pytest.mark.parametrize("older", [{"generation": 2, "job": "54"}, None], ids=["an older one's", "gone"])
def test_a_state_that_was_written_back_or_removed_keeps_no_run_from_coming_back(
    stopped: RunDir, older: dict[str, object] | None
) -> None:
    stopped.event("start", "shell", 3)
    hold(stopped, **older) if older else stopped.state.unlink()
    assert requeue.finish(stopped, 3, 75, False) == "again 0"
    assert (read_json(stopped.state)["generation"], read_json(stopped.state)["phase"]) == (3, "stopped")


def test_on_slurm_the_tail_asks_scontrol_for_the_task_alone(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake, "55_2")
    assert requeue.finish(stopped, 3, 143, False) == "end 75"
    assert changes(fake) == ["scontrol requeue 55_2", "scontrol update JobId=55_2 StartTime=now+5"]
    assert [event["event"] for event in stopped.read_events()] == ["end", "requeue"]


def test_a_shell_that_was_told_asks_for_nothing(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    fake.job("55", "COMPLETING")
    assert requeue.finish(stopped, 3, 143, True) == "end 75"
    assert not changes(fake) and read_json(stopped.state)["phase"] == "stopped"


@pytest.mark.parametrize("name", ["stop.json", "state.json"])
def test_a_damaged_word_keeps_no_run_from_its_restart(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hold(run, job="55")
    in_job(monkeypatch, fake)
    (run.path / name).write_text('{"gen')
    assert requeue.finish(run, 3, 137, False) == "end 137"
    assert changes(fake)[0] == "scontrol requeue 55"
    assert (run.path / f"{name}.damaged").read_text() == '{"gen'


def test_a_signal_to_the_shell_of_a_job_that_goes_on_takes_no_decision(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    fake.job("55", "RUNNING")
    assert requeue.finish(stopped, 3, 143, True) == "end 75"
    assert changes(fake)[0] == "scontrol requeue 55"
    assert [event["told"] for event in stopped.read_events() if event["event"] == "end"] == [False]


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


def test_of_a_sweep_only_the_task_itself_is_submitted_anew(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = make_row(run)
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
    assert requeue.finish(stopped, 3, 75, False) == "end 75"
    assert [event["event"] for event in stopped.read_events()][-2:] == ["end", "refused"]
    assert "not started again: " in read_json(stopped.state)["reason"]


def test_a_requeue_that_was_heard_after_all_is_one(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What timed out is carried out later: the job waits, and takes its time and its nodes all the same."""
    in_job(monkeypatch, fake)
    monkeypatch.setattr(requeue, "_AGAIN_S", 0.0)

    def silent(job: str) -> None:
        fake.job("55", "PENDING", comment=stopped.name)
        raise slurm.SilentError("scontrol does not answer")

    monkeypatch.setattr(slurm, "requeue", silent)
    assert requeue.finish(stopped, 3, 75, False) == "end 75"
    assert changes(fake) == ["scontrol update JobId=55 StartTime=now+5"]
    assert [event["event"] for event in stopped.read_events()] == ["end", "requeue"]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_job_that_is_cancelled_meanwhile_is_not_submitted_anew(
    stopped: RunDir, fake: FakeSlurm, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    fake.fails("scontrol", DISABLED)
    fake.job("55", state, comment=stopped.name)
    requeue.finish(stopped, 3, 75, False)
    assert fake.jobs() == {"55": state}


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_job_that_is_cancelled_meanwhile_is_not_requeued(
    stopped: RunDir, fake: FakeSlurm, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word of it may reach the script when the tail is under way."""
    in_job(monkeypatch, fake)
    fake.job("55", state, comment=stopped.name)
    requeue.finish(stopped, 3, 75, False)
    assert changes(fake) == [] and "was cancelled meanwhile" in read_json(stopped.state)["reason"]
    assert [event["event"] for event in stopped.read_events()] == ["end", "refused"]


def test_a_shell_that_was_told_at_the_time_limit_says_so(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(run, job="55")
    in_job(monkeypatch, fake)
    fake.job("55", "COMPLETING")
    monkeypatch.setenv("HPC_END_TIME", str(time.time() - 1))
    requeue.finish(run, 3, 143, True)
    assert changes(fake) == [] and read_json(run.state)["reason"].startswith("the time limit came before")


@pytest.mark.parametrize("words", ["Job/step already completing or completed", "Invalid job id specified"])
def test_another_refusal_of_scontrol_submits_nothing(
    stopped: RunDir, fake: FakeSlurm, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    fake.fails("scontrol", words)
    assert requeue.finish(stopped, 3, 75, False) == "end 75"
    assert fake.jobs() == {} and words in capsys.readouterr().err


def test_when_nothing_can_be_submitted_the_way_on_is_named(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    fake.fails("scontrol", DISABLED)
    fake.fails("sbatch", "sbatch: error: invalid account")
    assert requeue.finish(stopped, 3, 75, False) == "end 75"
    said = capsys.readouterr().err
    assert "invalid account" in said and "'hpc resume exp-0000aaaa' goes on from there" in said


def test_the_tail_prints_what_the_script_does_next(stopped: RunDir) -> None:
    command = [sys.executable, "-m", "hpc.requeue", str(stopped.path), "3", "75", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "again 0\n"
    assert done.stderr == "exp-0000aaaa: stopped by SIGUSR2 at step 40; starting again\n"
    assert json.loads(stopped.state.read_text())["phase"] == "stopped"


# Failures.

EXPERIMENT = "name: exp\nmodel: {name: m}\ndata: {file: x.h5}\nlaunch: {budgets: {crash: 2}}\n"


def failed(run: RunDir, *generations: int) -> None:
    for generation in generations:
        run.event("start", "shell", generation, job="55", restart=generation - 1)
        run.event("end", "shell", generation, cause="crash")


@pytest.mark.parametrize(("before", "wait"), [((), 5), ((2,), 60)])
def test_a_crash_comes_back_later_and_later(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, before: tuple[int, ...], wait: int
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    failed(run, *before)
    assert requeue.finish(run, 3, 1, False) == "end 1"
    assert changes(fake) == ["scontrol requeue 55", f"scontrol update JobId=55 StartTime=now+{wait}"]
    state = read_json(run.state)
    assert (state["phase"], state["cause"], state["code"]) == ("stopped", "crash", 1)
    assert [event["event"] for event in run.read_events()][-2:] == ["end", "requeue"]


def test_a_used_up_budget_ends_the_run_with_its_reason(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    write_text(run.experiment, EXPERIMENT)
    run.event("checkpoint", "rank0", 1, step=120)
    failed(run, 1, 2)
    assert requeue.finish(run, 3, 139, False) == "end 139" and changes(fake) == []
    state, said = read_json(run.state), capsys.readouterr().err
    assert state["phase"] == "ended" and state["reason"] in said and said.endswith("; not started again\n")
    assert state["reason"].startswith(
        "3 crashes since step 120 (launch.budgets.crash is 2): ended by SIGSEGV; 'hpc why"
    )


def test_here_the_script_is_told_how_long_to_wait(run: RunDir) -> None:
    hold(run)
    assert requeue.finish(run, 3, 1, False) == "again 0"
    hold(run, generation=4)
    assert requeue.finish(run, 4, 1, False) == "again 60"
    assert requeue.finish(run, 4, 1, True) == "end 1"  # cancelled meanwhile
    state = read_json(run.state)
    assert state["phase"] == "ended" and state["reason"].startswith("cancelled or interrupted")


def test_a_time_limit_that_is_shorter_than_the_start_ends_the_run(run: RunDir) -> None:
    answers = []
    for generation in (1, 2, 3):
        hold(run, generation=generation)
        run.event("start", "shell", generation, job=None, restart=generation - 1)
        run.event("signal", "rank0", generation, cause="SIGUSR2", step=0)
        write_json(run.stop, {"generation": generation, "cause": "SIGUSR2", "step": 0})
        answers.append(requeue.finish(run, generation, 75, False))
    assert answers == ["again 0", "again 0", "end 75"]
    state = read_json(run.state)
    assert (state["phase"], state["cause"]) == ("ended", "no step")
    assert "launch.time is too short for its start; 'hpc resume exp-0000aaaa launch.time=" in state["reason"]


def test_where_requeue_is_refused_a_crash_waits_all_the_same(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, fake)
    hold(run, job="55")
    failed(run, 2)
    fake.fails("scontrol", DISABLED)
    requeue.finish(run, 3, 1, False)
    assert changes(fake)[-1] == f"sbatch --parsable --begin=now+60 {run.script}"
    assert run.read_events()[-2]["event"] == "submit" or run.read_events()[-1]["event"] == "requeue"


def test_a_start_time_that_is_refused_costs_the_wait_and_not_the_run(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_job(monkeypatch, fake)

    def refuse(job: str, **fields: str) -> None:
        raise slurm.SlurmError("scontrol: Access/permission denied")

    monkeypatch.setattr(slurm, "update", refuse)
    requeue.finish(stopped, 3, 75, False)
    assert fake.jobs()["55"] == "PENDING" and stopped.read_events()[-1]["event"] == "requeue"
    assert "it comes back when SLURM lets it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "node", "again"),
    [("RUNNING", "node0", True), ("RUNNING", "node1", False), ("PENDING", "", False), ("RUNNING", "", True)],
)
def test_the_shell_of_a_lost_node_leaves_the_next_attempt_alone(
    stopped: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, state: str, node: str, again: bool
) -> None:
    in_job(monkeypatch, fake)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node0")
    fake.job("55", state, node=node)
    requeue.finish(stopped, 3, 75, False)
    assert bool(changes(fake)) is again
    assert (stopped.read_events()[-1]["event"] == "requeue") is again
