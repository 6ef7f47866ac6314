"""`hpc why`: the best cause of what the files, the logs and SLURM say, and what to type next."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from hpc import after, evidence, ledger, pending, slurm, why
from hpc.rundir import RunDir, write_json, write_text
from hpc.sweepdir import Chunk, SweepDir
from tests.ended import EXPERIMENT, HEAD, LINE, LOST, ended, log, make_run, words
from tests.fakeslurm import FakeSlurm
from tests.slurm.cluster import Cluster


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    return make_run(tmp_path, monkeypatch)


# Runs that have ended.


def test_the_first_rank_that_failed_is_named_not_those_that_lost_it(run: RunDir, fake: FakeSlurm) -> None:
    ended(run)
    log(run, HEAD + LOST)
    log(run, re.sub("^", "[rank2]: ", HEAD + "ValueError: sample 7 is empty", flags=re.M) + "\n", rank=2)
    log(run, HEAD + LOST, rank=1, age_s=9)
    answer = why.explain(run)
    assert (answer.state, answer.cause) == ("failed", "exception: ValueError: sample 7 is empty")
    assert answer.lines[0] == "Rank 2 failed first; 2 more ended with it: ValueError: sample 7 is empty"
    assert answer.quote[0] == "Traceback (most recent call last):" and answer.source == "exp-0000aaaa/logs/55_2_log.err"
    assert answer.commands == ["hpc logs exp-0000aaaa --tail 100 --rank 2", "hpc resume exp-0000aaaa"]


@pytest.mark.parametrize(("by_srun", "first"), [(True, 1), (False, 0)])
def test_of_two_own_failures_sruns_word_counts_before_the_clock(
    run: RunDir, fake: FakeSlurm, by_srun: bool, first: int
) -> None:
    ended(run)
    log(run, HEAD + "ValueError: of 0\n" + "srun: error: node1: task 1: Exited with exit code 1\n" * by_srun, age_s=5)
    log(run, HEAD + "ValueError: of 1\n", rank=1)
    assert why.explain(run).lines[0].endswith(f"ValueError: of {first}")


def test_a_traceback_of_an_earlier_attempt_or_job_is_not_the_cause(run: RunDir, fake: FakeSlurm) -> None:
    ended(run, code=2, reason="bad input: it would fail again")
    before = HEAD + "OSError: old\n" + f"{run.name}: stopped by SIGTERM at step 3; starting again\n"
    last = "x.h5: no such file\n" + f"{run.name}: bad input: it would fail again; not started again\n"
    log(run, before + last + "slurmstepd: error: a word after the end\n")
    log(run, HEAD + "KeyError: of another job\n", job="54")
    log(run, HEAD + "KeyError: of last week\n", rank=3, age_s=9999)
    answer = why.explain(run)
    assert answer.cause == "bad input: x.h5: no such file" and answer.quote == ["x.h5: no such file"]


CANCELLED = "slurmstepd: error: *** STEP 55.0 ON node1 CANCELLED AT 2027-01-15T09:00:00 DUE TO "
OOM = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=55.0. Some of your processes may have been killed.\n"


@pytest.mark.parametrize("known_by", ["sacct", "log", "usage"])
def test_out_of_memory_tells_the_peak_and_what_to_ask_for(run: RunDir, fake: FakeSlurm, known_by: str) -> None:
    ended(run, code=137)
    peak = "62.5"
    log(run, HEAD + "RuntimeError: DataLoader worker was killed\n" + OOM * (known_by == "log"))
    if known_by == "sacct":
        job, step = (LINE.format(state="OUT_OF_MEMORY", code="0:125", rss=rss) for rss in ("", "62500M"))
        fake.accounted(job, step.replace("55", "55.0", 1))
    elif known_by == "usage":
        usage_of(run, 62.5)
    answer = why.explain(run)
    assert answer.cause == "out of memory" and "memory of 64 GB a node that it had asked for" in answer.lines[0]
    assert (peak in answer.lines[0]) == (known_by != "log")
    assert answer.commands == [f"sbatch --mem=96000M {run.script}"]
    assert "cedia-a100-40gb offers 64 GB a node" in words(answer)


def test_out_of_a_part_of_the_nodes_memory_more_is_asked_for_by_resume(run: RunDir, fake: FakeSlurm) -> None:
    write_text(run.experiment, EXPERIMENT.replace("cedia-a100-40gb", "cedia-a100-40gb, mem: 20GB"))
    ended(run, code=137)
    log(run, HEAD + OOM)
    answer = why.explain(run)
    assert answer.cause == "out of memory" and answer.commands == ["hpc resume exp-0000aaaa launch.mem=30GB"]


def usage_of(run: RunDir, peak_gb: float) -> None:
    """What the sampler leaves of a node."""
    common = {"generation": 1, "node": "node1", "seconds": 90.0, "cpu_seconds": 9.0, "busiest_cores": 1.0, "gpus": []}
    memory = {"memory_peak_gb": peak_gb, "memory_limit_gb": 64.0, "asked": {}}
    write_json(run.usage / "001-node1.json", {**common, **memory})


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."])
def test_gpu_memory_has_remedies(run: RunDir, fake: FakeSlurm, error: str) -> None:
    write_text(run.experiment, EXPERIMENT + "train: {accumulate: 2}\n")
    ended(run)
    log(run, HEAD + error + "\n")
    answer = why.explain(run)
    assert answer.cause == "GPU out of memory" and "Tried to allocate 2.00 GiB" in words(answer)
    assert answer.commands == [f"hpc submit {run.experiment} train.accumulate=4"]


@pytest.mark.parametrize(("state", "cause"), [("PREEMPTED", "preempted"), ("TIMEOUT", "time limit")])
def test_the_users_signal_is_no_time_limit_where_slurm_knows_better(
    run: RunDir, fake: FakeSlurm, state: str, cause: str
) -> None:
    """preempt_send_user_signal"""
    ended(run, phase="stopped", code=75, reason="stopped by SIGUSR2 at step 40")
    run.event("signal", "rank0", 1, cause="SIGUSR2", step=40)
    fake.accounted(LINE.format(state=state, code="0:0", rss=""))
    assert why.explain(run).cause == cause


@pytest.mark.parametrize(
    ("state", "cause", "sentence", "command"),
    [
        ("TIMEOUT", "time limit", "Its time limit of 08:00:00 was reached at step 40.", "hpc resume exp-0000aaaa"),
        ("NODE_FAIL", "node failure", "node1 failed while it ran (its node failed).", "hpc resume exp-0000aaaa"),
        ("PREEMPTED", "preempted", "A job of higher priority took its place", "hpc resume --all"),
        ("CANCELLED", "cancelled", "It was cancelled with scancel", "hpc resume exp-0000aaaa"),
        ("COMPLETED", "the job ended without a word while training", "Neither its files nor SLURM", "hpc logs"),
    ],
)
def test_what_sacct_says_of_a_run_that_said_nothing(
    run: RunDir, fake: FakeSlurm, state: str, cause: str, sentence: str, command: str
) -> None:
    ended(run, phase="training")
    (run.checkpoints / "g001-s00000030").mkdir(parents=True)
    fake.accounted(LINE.format(state=state, code="0:0", rss=""))
    answer = why.explain(run)
    assert answer.cause == cause and sentence in words(answer) and answer.commands[0].startswith(command)
    assert "It goes on from checkpoint g001-s00000030." in answer.lines


def test_a_notice_of_the_time_limit_is_one_without_accounting_too(run: RunDir, fake: FakeSlurm) -> None:
    write_text(run.experiment, EXPERIMENT.replace("cedia-a100-40gb", "cedia-a100-40gb, time: 8h"))
    ended(run, phase="stopped", code=75, reason="stopped by SIGUSR2 at step 40")
    run.event("signal", "rank0", 1, cause="SIGUSR2", step=40)
    answer = why.explain(run)
    assert answer.state == "stopped" and answer.cause == "time limit"
    assert answer.commands == ["hpc resume exp-0000aaaa", "hpc resume exp-0000aaaa launch.time=12:00:00"]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (CANCELLED + "TIME LIMIT ***", "time limit"),
        (CANCELLED + "NODE FAILURE ***", "node failure"),
        (CANCELLED + "PREEMPTION ***", "preempted"),
        ("slurmstepd: error: Job 55 exceeded memory limit (70000 > 65536), being killed", "out of memory"),
        ("slurmstepd-node1: error: StepId=55.0 exceeded memory limit (7 > 6), being killed", "out of memory"),
        ("INFO my own words: DUE TO TIME LIMIT", "ended by SIGKILL"),
    ],
)
def test_the_words_of_slurms_daemons_count_where_nobody_else_knows(
    run: RunDir, fake: FakeSlurm, line: str, cause: str
) -> None:
    ended(run, code=137)
    log(run, line + "\n")
    assert why.explain(run).cause == cause


@pytest.mark.parametrize(
    ("code", "text", "cause"),
    [
        (74, "OSError: [Errno 28] No space left on device: 'model.safetensors'\n", "storage"),
        (1, HEAD + "OSError: [Errno 122] Disk quota exceeded\n", "storage"),
        (139, "", "ended by SIGSEGV"),
        (1, "the loss is nan at step 5: lower train.optimizer.lr\n", "failed with exit code 1"),
    ],
)
def test_other_ends(run: RunDir, fake: FakeSlurm, code: int, text: str, cause: str) -> None:
    ended(run, code=code)
    log(run, text)
    answer = why.explain(run)
    assert answer.cause == cause and answer.commands
    assert not text or text.splitlines()[-1].split(": ", 1)[-1] in " ".join(answer.quote)


def test_a_bad_node_is_named(run: RunDir, fake: FakeSlurm) -> None:
    ended(run, code=77, reason="bad node node1: no scratch; without node1 there are not enough nodes for it")
    run.event("bad-node", "node1", 1, node="node1", reason="/scratch is not there")
    answer = why.explain(run)
    assert answer.cause == "bad node" and "It met a bad node: node1: /scratch is not there." in answer.lines


def test_an_attempt_that_was_refused_says_why(run: RunDir, fake: FakeSlurm) -> None:
    fake.job("55", "FAILED", "NonZeroExitCode")
    log(run, "exp-0000aaaa is held by job 12 on node3: end that first ('hpc cancel exp-0000aaaa')\n")
    answer = why.explain(run)
    assert answer.cause == "no attempt began" and "is held by job 12 on node3" in answer.quote[0]


@pytest.mark.parametrize(
    ("code", "words"), [("3:0", "left with exit code 3 before that"), ("0:9", "was ended by SIGKILL before that")]
)
def test_a_prologue_that_failed_tells_its_code_and_its_last_words(
    run: RunDir, fake: FakeSlurm, code: str, words: str
) -> None:
    fake.accounted(LINE.format(state="FAILED", code=code, rss=""))
    run.output("55", "0", "out").write_text("module: cuda/99 is not there\n")
    answer = why.explain(run)
    assert answer.cause == "no attempt began" and f"the batch script {words}" in answer.lines[0]
    assert answer.quote == ["module: cuda/99 is not there"] and answer.source == "exp-0000aaaa/logs/55_0_log.out"


@pytest.mark.parametrize("known_by", ["squeue", "sacct"])
def test_a_node_that_could_not_open_the_output_is_named(run: RunDir, fake: FakeSlurm, known_by: str) -> None:
    if known_by == "squeue":
        fake.job("55", "FAILED", "JobLaunchFailure", "node1")
    else:
        fake.accounted(LINE.format(state="FAILED", code="0:53", rss=""))
    answer = why.explain(run)
    assert answer.cause == "its node could not open its output"
    assert answer.lines[0].startswith("SLURM could not start its script on node1: mostly that node does not see")
    assert answer.lines[0].endswith(f"output, {run.logs}.")
    assert answer.commands == [f"srun --nodelist=node1 ls -ld {run.logs}", "hpc resume exp-0000aaaa"]


def test_a_killed_batch_shell_is_no_missing_folder(run: RunDir, fake: FakeSlurm) -> None:
    """SLURM gives JobLaunchFailure of both."""
    fake.job("55", "FAILED", "JobLaunchFailure", "node1")
    run.output("55", "0", "out").touch()
    assert why.explain(run).cause == "no attempt began"


@pytest.mark.parametrize("leader", ["pack-11112222", "grid-sweep-0123abcd"])
def test_a_follower_that_slurm_ended_tells_what_it_was_to_follow(run: RunDir, fake: FakeSlurm, leader: str) -> None:
    comment = f"{leader}/0" if "sweep" in leader else leader
    fake.job("12", "FAILED", "NonZeroExitCode", comment=comment)
    fake.job("13", "RUNNING", comment="other-33334444")
    waits = "gpu|1|N/A|N/A|N/A|8:00:00|1|afterok:12(failed),afterok:13(unfulfilled)"
    fake.job("55", "CANCELLED", "DependencyNeverSatisfied", more=waits)
    answer = why.explain(run)
    assert answer.lines[0].startswith(f"What it was to follow ({leader}) did not finish")
    assert answer.commands == [f"hpc resume {leader}", f"hpc resume exp-0000aaaa --after {leader}"]
    (fake.folder / "jobs" / "55").unlink()
    fake.accounted(LINE.format(state="CANCELLED", code="0:0", rss="").replace("None", "Dependency"))
    assert "did not finish, or it was cancelled with scancel" in why.explain(run).lines[0]


def test_a_cancelled_run_says_when_and_by_what(run: RunDir, fake: FakeSlurm) -> None:
    ended(run, phase="stopped")
    write_json(run.submit, {"cluster": "slurm", "job": "55", "time": time.time() - 100, "cancelled": time.time()})
    assert "It was cancelled with 'hpc cancel' at " in why.explain(run).lines[0]


def test_a_huge_log_is_read_at_its_end(run: RunDir, fake: FakeSlurm) -> None:
    ended(run)
    path = run.output("55", "0", "err")
    with path.open("wb") as file:
        file.truncate(1 << 31)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + (HEAD + "ValueError: at the end\n").encode())
    assert why.explain(run).cause == "exception: ValueError: at the end"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (HEAD + "ValueError: a\n\nDuring handling of that:\n\n" + HEAD + "KeyError: b\n", "KeyError: b"),
        (HEAD + "my.module.Odd\nmore output\n", "my.module.Odd"),
        (HEAD + "ValueError: whole\n" + HEAD[:60], "ValueError: whole"),
        ("no traceback: here\n", None),
    ],
)
def test_the_last_whole_traceback_is_found(text: str, error: str | None) -> None:
    found = evidence.last_traceback(text.splitlines())
    assert (found[-1] if found else None) == error


@pytest.mark.slurm
def test_a_real_cluster_says_what_ended_jobs_before_their_attempt(
    run: RunDir, slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in slurm_cluster.environment().items():
        monkeypatch.setenv(key, value)
    log = run.output("%j", "0")
    heads = {"prologue": log, "unseen": "/not/there/%j.out", "killed": log, "follower": log}
    bodies = {"prologue": "echo no module >&2; exit 3", "killed": "kill -9 $$"}
    jobs: dict[str, str] = {}
    for name, output in heads.items():
        write_text(run.script, f"#!/bin/bash\n#SBATCH --comment={run.name} --output={output}\n{bodies.get(name, '')}\n")
        options = after.dependency([jobs["prologue"]]) if name == "follower" else []
        jobs[name] = slurm.submit(run.script, *options)
    slurm_cluster.wait_for(lambda: not any(job.live for job in slurm.queue().values()), 30, "the ends of the jobs")
    found = {}
    for name, job in jobs.items():
        write_json(run.submit, {"cluster": "slurm", "job": job, "time": time.time()})
        found[name] = why.explain(run)
    assert found["prologue"].quote == ["no module"] and "ended by itself before that" in found["prologue"].lines[0]
    assert found["unseen"].cause == "its node could not open its output"
    assert found["killed"].cause == "no attempt began"
    assert found["follower"].cause == "what it was to follow did not finish"


# Runs that wait or run.


@pytest.mark.parametrize(
    ("reason", "part", "hopeless"),
    [
        ("Priority", "jobs of higher priority are ahead of it", False),
        ("QOSMaxGRESPerUser", "you have reached the limit of the QOS on GPUs", False),
        ("AssocGrpCPUMinutesLimit", "the account has used up its budget of cores", False),
        ("QOSGrpNodeLimit", "all jobs of the QOS together", False),
        ("QOSMaxWallDurationPerJobLimit", "may not have so much: time", True),
        ("AssocMaxJobsLimit", "the limit of the account on running jobs", False),
        ("QOSMinCpuNotSatisfied", "less than the QOS demands of cores", True),
        ("ReqNodeNotAvail, UnavailableNodes:node[3-4]", "reserved (node[3-4])", False),
        ("(launch failed requeued held)", "SLURM holds it now", False),
        ("DependencyNeverSatisfied", "did not succeed", True),
        ("SomethingNew", "SLURM says 'SomethingNew'", False),
        ("None", "SLURM has not looked at it yet", False),
        ("", "SLURM has not looked at it yet", False),
    ],
)
def test_reasons_of_the_queue_in_words(reason: str, part: str, hopeless: bool) -> None:
    assert part in pending.in_words(reason).words and pending.in_words(reason).remedy
    assert pending.hopeless(reason) is hopeless


def stamp(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(when))


def test_a_pending_run_tells_reason_estimate_and_what_it_follows(run: RunDir, fake: FakeSlurm) -> None:
    soon = stamp(time.time() + 7200)
    fake.job("12", "RUNNING", comment="pack-11112222")
    fake.job("55", "PENDING", "Dependency", more=f"gpu|1|N/A|{soon}|N/A|8:00:00|1|afterok:12(unfulfilled)")
    answer = why.explain(run)
    assert answer.lines[0] == (
        "Job 55 waits in partition gpu: it waits for another job: afterok 12 (pack-11112222, running)."
    )
    assert answer.lines[1].startswith("SLURM expects it to start at ") and answer.lines[1].endswith("(in 2.0 h).")
    fake.job("55", "PENDING", "None")
    assert why.explain(run).cause == "pending"
    fake.job("55", "PENDING", "PartitionTimeLimit")
    answer = why.explain(run)
    assert answer.lines[-1].startswith("It will never start like this") and "estimate" not in words(answer)
    assert answer.commands == ["hpc cancel exp-0000aaaa", "hpc resume exp-0000aaaa"]


def test_a_requeued_run_tells_of_its_attempts(run: RunDir, fake: FakeSlurm) -> None:
    ended(run, phase="stopped", generation=3)
    for number, node in ((1, "node0"), (2, "node1"), (3, "node1")):
        run.event("start", "shell", number, job="55", node=node, restart=0)
        run.event("end", "shell", number, code=75, reason=f"stopped by SIGTERM at step {40 * number}")
    fake.job("55", "PENDING", "BeginTime")
    answer = why.explain(run)
    assert answer.state == "requeued"
    assert answer.lines[-1] == "It has had 3 attempts. It had saved nothing yet: it starts afresh."
    assert [line.partition("node")[2] for line in answer.attempts] == [
        "0: stopped by SIGTERM at step 40",
        "1: stopped by SIGTERM at step 80",
        "1: stopped by SIGTERM at step 120",
    ]


def test_a_run_requeued_by_a_bad_node_at_first_names_it_and_promises_no_checkpoint(
    run: RunDir, fake: FakeSlurm
) -> None:
    ended(run, phase="stopped")
    run.event("bad-node", "node7", 1, node="node7", reason="/scratch is not there")
    run.event("end", "shell", 1, code=77, reason="bad node node7: /scratch is not there; the job keeps off node7")
    fake.job("55", "PENDING", "BeginTime")
    answer = why.explain(run)
    assert answer.state == "requeued" and answer.attempts[0].endswith("bad node node7: /scratch is not there")
    assert answer.lines[-1] == "It has had one attempt. It had saved nothing yet: it starts afresh."
    (run.checkpoints / "g001-s00000030").mkdir(parents=True)
    assert why.explain(run).lines[-1] == "It has had one attempt. It goes on from checkpoint g001-s00000030."
    run.event("checkpoint", "rank0", 1, step=30)
    (run.checkpoints / "g001-s00000030").rmdir()
    assert "Its checkpoints are gone from" in why.explain(run).lines[-1], "nothing starts afresh then"


def test_a_healthy_run_tells_what_it_does_and_a_silent_one_that_it_may_hang(run: RunDir, fake: FakeSlurm) -> None:
    fake.job("55", "RUNNING")
    ended(run, phase="training", steps=160, monitor="accuracy", best={"metrics": {"accuracy": 0.75}})
    answer = why.explain(run)
    assert answer.lines[0].startswith("Nothing is wrong: it is training on node1, attempt 1 since ")
    assert answer.lines[1:] == ["Step 40 of 160 (25 %), epoch 2.", "Best so far: accuracy 0.7500."]
    ended(run, phase="training", time=time.time() - 3600)
    assert why.explain(run).lines[0] == "It has written nothing for 60 min: it may hang."


def test_planned_finished_and_damaged_runs_have_an_answer(run: RunDir, fake: FakeSlurm) -> None:
    run.submit.unlink()
    assert why.explain(run).commands == ["hpc resume exp-0000aaaa"]
    write_json(run.result, {"monitor": "loss", "best": {"epoch": 3, "metrics": {"loss": 0.25}}})
    assert why.explain(run).lines[-1] == "Best loss 0.2500 at epoch 3."
    early = {"metric": "accuracy", "epochs_without_gain": 2, "planned_epochs": 9}
    result = {"monitor": "loss", "epochs": 5, "best": {"epoch": 3, "metrics": {"loss": 0.25}}, "stopped_early": early}
    write_json(run.result, result)
    said = "stopped early, after 5 of 9 epochs: accuracy got no better for 2"
    assert why.explain(run).lines[-1] == f"It {said}." and ledger.status(run).detail == said
    write_json(run.result, {**result, "stopped_early": None})
    assert why.explain(run).lines[-1].startswith("Best") and ledger.status(run).detail == ""
    run.state.write_text("{")
    answer = why.explain(run)
    assert answer.cause == "damaged" and "state.json: damaged" in answer.lines[0]


# Sweeps.


def test_the_rows_of_a_sweep_are_grouped_by_their_cause(tmp_path: Path, fake: FakeSlurm) -> None:
    sweep = SweepDir(tmp_path / "runs" / "exp-sweep-0123abcd")
    names = [f"exp-{number:08x}" for number in range(6)]
    for name in names:
        row = RunDir(sweep.path / name)
        write_text(row.experiment, EXPERIMENT)
        row.logs.mkdir()
    sweep.rows_file.write_text("".join(f"{name}\n" for name in names))
    sweep.write_chunks([Chunk(0, 0, 6)])
    sweep.record("slurm", {0: ("70", list(range(6)))})
    for number in (0, 1, 3):
        row = sweep.rows()[number]
        error = "ValueError: lr is too large" if number != 1 else "KeyError: 'x'"
        ended(row, job=f"70_{number}", started=time.time() + 1)
        log(row, HEAD + error + "\n", job=f"70_{number}", age_s=-2)
    fake.job("70_2", "PENDING", "JobArrayTaskLimit", comment=sweep.token(0))
    fake.job("70_4", "PENDING", "JobArrayTaskLimit", comment=sweep.token(0))
    write_json(sweep.rows()[5].result, {"best": {}})
    groups = why.explain_sweep(sweep)
    assert [(group.rows, group.answer.state, group.answer.cause) for group in groups] == [
        ([0, 3], "failed", "exception: ValueError: lr is too large"),
        ([1], "failed", "exception: KeyError: 'x'"),
        ([2, 4], "pending", "JobArrayTaskLimit"),
        ([5], "finished", "finished"),
    ]
    assert why.rows_in_words([0, 1, 3]) == "3 rows (0-1,3)"
    assert json.dumps([group.as_dict() for group in groups])


def test_rows_whose_controller_died_before_their_turn_are_told_from_one_whose_script_failed(tmp_path: Path) -> None:
    sweep = SweepDir(tmp_path / "runs" / "exp-sweep-0123abcd")
    names = [f"exp-{number:08x}" for number in range(3)]
    for name in names:
        write_text(RunDir(sweep.path / name).experiment, EXPERIMENT.replace("cedia-a100-40gb", "laptop"))
    sweep.rows_file.write_text("".join(f"{name}\n" for name in names))
    sweep.write_chunks([Chunk(0, 0, 3)])
    gone = str(1 << 22)
    sweep.record("local", {0: (gone, [0, 1, 2])}, process_start="0 0")
    for row in sweep.rows()[:2]:
        row.logs.mkdir()
    sweep.rows()[0].output(gone, "0").write_text("module: cuda/99 is not there\n")
    ended(sweep.rows()[1], job=None, time=time.time() - 100)  # by an earlier submission
    refused = why.explain(sweep.rows()[0])
    assert refused.cause == "no attempt began" and refused.quote == ["module: cuda/99 is not there"]
    for row in sweep.rows()[1:]:
        answer = why.explain(row)
        assert answer.cause == "its sweep's controller ended before its turn" and not answer.quote
        assert answer.commands == ["hpc resume exp-sweep-0123abcd"]
    sweep.logs.mkdir()
    (sweep.logs / f"{gone}_0_log.err").write_text("not started: pack-1, which it was to follow, is failed\n")
    assert "which it was to follow" in why.explain(sweep.rows()[2]).quote[0]
