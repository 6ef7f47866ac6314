"""SLURM's door: what each command is asked, what its answer becomes, and one line when there is none."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc import allocation, slurm
from hpc.attempt import process_alive
from hpc.errors import UserError
from hpc.rundir import RunDir
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.slurm.cluster import Cluster

SCRIPT = Path("/dev/null")
CALLS: dict[str, Callable[[], object]] = {
    "queue": slurm.queue,
    "submit": lambda: slurm.submit(SCRIPT),
    "test_only": lambda: slurm.test_only(SCRIPT),
    "requeue": lambda: slurm.requeue("5"),
    "cancel": lambda: slurm.cancel("5"),
    "release": lambda: slurm.release("5"),
    "update": lambda: slurm.update("5", StartTime="now+60"),
    "config": slurm.config,
    "partitions": slurm.partitions,
    "nodes": slurm.nodes,
    "accounting": lambda: slurm.accounting(["5"]),
    "version": slurm.version,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_missing_command_is_an_error_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bash = "\n".join(["#!/bin/sh", 'exec /bin/bash "$@"'])
    (tmp_path / "bash").write_text(bash)
    (tmp_path / "bash").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises((slurm.SlurmError, UserError)) as caught:
        CALLS[name]()
    words = str(caught.value)
    assert "\n" not in words and any(part in words for part in ("No such file", "not found")), words
    assert not slurm.available()


@pytest.mark.parametrize("name", CALLS)
def test_a_command_that_hangs_is_an_error_in_one_line_and_is_ended(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's wrapper script, whose child keeps its output open."""
    for command in ("sbatch", "squeue", "scontrol", "scancel", "sacct"):
        path = tmp_path / command
        path.write_text(
            f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/pid.tmp; mv {tmp_path}/pid.tmp {tmp_path}/pid; wait\n"
        )
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_TIMEOUT_S", 0.5)
    with pytest.raises((slurm.SlurmError, UserError), match=r"^[^\n]*: no answer within 0\.5 s$"):
        CALLS[name]()
    child = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10
    while process_alive(child):
        assert time.monotonic() < end, "what it started still runs"


def test_a_script_is_submitted_with_options_that_win_over_its_own(run: RunDir, fake: FakeSlurm) -> None:
    assert slurm.submit(run.script, "--dependency=afterok:7", "--array=0-3") == "101"
    assert fake.calls() == [f"sbatch --parsable --dependency=afterok:7 --array=0-3 {run.script}"]
    sbatch = fake.folder / "bin" / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "123;north"\n')
    assert slurm.submit(run.script) == "123", "of several clusters sbatch names its own"


def test_the_queue_tells_what_a_job_waits_for(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.job(
        "55_3",
        "PENDING",
        "Dependency",
        comment="a|b|c",
        more="gpu|2|2030-01-31T12:00:00|2030-02-01T12:00:00|N/A|1-02:00:00|4294901758|afterok:9(unfulfilled)",
    )
    fake.job(
        "56", "RUNNING", node="node0", more="long|1|2030-01-31T12:00:00|2030-01-31T12:00:05|N/A|UNLIMITED|0|(null)"
    )
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    squeue = fake.folder / "bin" / "squeue"
    squeue.write_text(squeue.read_text().replace("me=", '[ -z "$SQUEUE_PARTITION" ] || exit 0; me=', 1))
    jobs = slurm.queue()
    noon = time.mktime((2030, 1, 31, 12, 0, 0, 0, 0, -1))
    assert jobs["55_3"] == slurm.JobInfo(
        job="55_3",
        state="PENDING",
        reason="Dependency",
        node="",
        comment="a|b|c",
        partition="gpu",
        nodes=2,
        submitted=noon,
        start=noon + 86400,
        end=None,
        time_limit_s=26 * 3600,
        priority=4294901758,
        dependency="afterok:9(unfulfilled)",
    )
    assert (jobs["56"].start, jobs["56"].time_limit_s, jobs["56"].dependency) == (noon + 5, None, "")
    assert len(fake.calls()) == 1 and "--all" in fake.calls()[0], "hidden partitions too"


def test_what_is_no_whole_line_is_left_out(fake: FakeSlurm) -> None:
    """A user's own comment may hold line breaks of any kind, in squeue's, sacct's and scontrol's answers."""
    fake.job("55", "RUNNING", comment="a\nb|c\n56|RUNNING\n\nd")
    fake.job("57", "RUNNING", comment="a\u2028b\x0cc")
    squeue = fake.folder / "bin" / "squeue"
    squeue.write_text(
        squeue.read_text().replace("read -r more || more=", "more=").replace("$comment", "$comment\nb|c\n")
    )
    fake.accounted(*SACCT.splitlines(), comment="a\nb|c\n77|FAILED|0:0")
    fake.configure(config={"Odd": "1\nno pair"}, nodes=[{"Reason": "a\nb=c NodeName=x"}])
    assert {job: info.comment for job, info in slurm.queue().items()} == {"55": "a", "57": "a\u2028b\x0cc"}
    assert slurm.accounting(["2", "77"]).keys() == {"2"}
    assert [node["NodeName"] for node in slurm.nodes()] == ["node0"] and slurm.config()["Odd"] == "1"


def test_few_jobs_are_picked_out_by_squeue_itself(fake: FakeSlurm) -> None:
    for job in ("55", "7_0", "7_1", "8_0"):
        fake.job(job, "RUNNING")
    assert slurm.queue(["7_1", "55"]).keys() == {"7_1", "55"} and slurm.queue(["7"]).keys() == {"7_0", "7_1"}
    assert [call.rpartition(" ")[2] for call in fake.calls()] == ["--jobs=7_1,55", "--jobs=7"]
    assert slurm.queue([str(number) for number in range(30, 60)]).keys() == {"55"}
    assert "--jobs" not in fake.calls()[-1]
    fake.fails("squeue", "slurm_load_jobs error: Invalid job id specified")
    assert slurm.queue(["9"]) == {}
    with pytest.raises(slurm.SlurmError):
        slurm.queue()


def test_many_jobs_are_cancelled_by_one_command(fake: FakeSlurm) -> None:
    slurm.cancel(*(f"7_{row}" for row in range(5)))
    assert fake.calls() == ["scancel 7_0 7_1 7_2 7_3 7_4"]
    fake.fails("scancel", "scancel: error: Kill job error on job id 7_0: Access/permission denied")
    with pytest.raises(UserError, match=r"^scancel 7_0 7_1 7_2 \.\.\.: Kill job error on job id 7_0: Access"):
        slurm.cancel(*(f"7_{row}" for row in range(5)))


def test_release_and_update_are_asked_as_scontrol_has_them(fake: FakeSlurm) -> None:
    slurm.release("7", "8_1")
    slurm.update("7", StartTime="now+60", ExcNodeList="node0")
    assert fake.calls() == ["scontrol release 7,8_1", "scontrol update JobId=7 StartTime=now+60 ExcNodeList=node0"]


def test_no_verdict_of_sbatch_is_told_from_a_refusal(fake: FakeSlurm) -> None:
    fake.fails("sbatch", "allocation failure: Requested node configuration is not available")
    assert slurm.test_only(SCRIPT) == (False, "Requested node configuration is not available")
    fake.fails("sbatch", "sbatch: error: x\nallocation failure: Unable to contact slurm controller (connect failure)")
    with pytest.raises(slurm.SlurmError, match=r"^sbatch: x; allocation failure: Unable to contact"):
        slurm.test_only(SCRIPT)


def test_values_with_blanks_and_equals_signs_are_read_whole(fake: FakeSlurm) -> None:
    fake.configure(nodes=[{"OS": "Linux 6.1 #1 SMP (2030-01-01)", "AllocTRES": "", "Reason": "bad gpu [root@x]"}])
    (node,) = slurm.nodes()
    assert (node["OS"], node["AllocTRES"]) == ("Linux 6.1 #1 SMP (2030-01-01)", "")
    assert (node["Reason"], node["Gres"]) == ("bad gpu [root@x]", "gpu:a100:1")
    assert slurm.partitions()["gpu"]["Nodes"] == "node[0-1]"
    assert slurm.config()["KillWait"] == "30 sec" and slurm.version() == "22.05.8"


# What SLURM 22.05 printed: preempted, requeued, then cancelled; an array; a job that is held.
SACCT = """\
2|PREEMPTED|0:0|3|2030-01-01T04:48:54|2030-01-01T04:48:57|00:10:00|300M||node0|None
2.batch|COMPLETED|0:0|3|2030-01-01T04:48:54|2030-01-01T04:48:57|||512000K|node0|
4|PENDING|0:0|0|Unknown|Unknown|UNLIMITED|62.50G||None assigned|JobHeldUser
3_0|FAILED|3:0|2|2030-01-01T04:48:54|2030-01-01T04:48:56|1-00:10:00|300Mn||node0|None
3_0.batch|OUT_OF_MEMORY|0:125|2|2030-01-01T04:48:54|2030-01-01T04:48:56|||12036K|node0|
3_0.0|COMPLETED|0:0|2|2030-01-01T04:48:54|2030-01-01T04:48:56|||2G|node0|
3_[1-2]|PENDING|0:0|0|Unknown|Unknown|00:10:00|500Mc||None assigned|Resources
2|REQUEUED|0:0|2|2030-01-01T04:48:58|2030-01-01T04:49:00|00:10:00|300M||node1|BeginTime
2.batch|CANCELLED|0:15|2|2030-01-01T04:48:58|2030-01-01T04:49:00|||12384K|node1|
2|CANCELLED by 0|0:15|61|2030-01-01T04:49:01|2030-01-01T04:50:02|00:10:00|300M||node0|None
2.batch|CANCELLED|0:15|61|2030-01-01T04:49:01|2030-01-01T04:50:02|||1000K|node0|
2.0|CANCELLED|0:15|61|2030-01-01T04:49:01|2030-01-01T04:50:02|||102400K|node0|"""


def test_accounting_is_the_last_attempt_and_how_the_others_ended(fake: FakeSlurm) -> None:
    fake.accounted(*SACCT.splitlines())
    told = slurm.accounting(["2", "3_0", "4", "77"])
    assert list(told) == ["2", "4", "3_0"]
    job, held, row = told["2"], told["4"], told["3_0"]
    assert (job.state, job.signal, job.elapsed_s, job.nodes, job.reason) == ("CANCELLED", 15, 61, "node0", "")
    assert job.earlier == ("PREEMPTED", "REQUEUED") and job.steps == ("CANCELLED", "CANCELLED")
    assert job.max_rss_gb == pytest.approx(0.1), "of the last attempt only"
    assert job.start is not None and job.end is not None and job.end - job.start == 61
    assert (held.start, held.time_limit_s, held.nodes, held.reason) == (None, None, "", "JobHeldUser")
    assert (held.req_mem_gb, held.max_rss_gb) == (64, None), "the GB of a request"
    assert (row.exit_code, row.time_limit_s, row.req_mem_gb) == (3, 87000, 0.3)
    assert row.steps == ("OUT_OF_MEMORY", "COMPLETED") and row.max_rss_gb == pytest.approx(2.048)
    assert len(fake.calls()) == 1 and "--jobs=2,3_0,4,77" in fake.calls()[0]


def test_attempts_before_a_jobs_submission_are_of_another_of_its_number(fake: FakeSlurm) -> None:
    fake.accounted(*SACCT.splitlines(), submitted="2030-01-01T04:48:50", comment="exp-1")
    submitted = time.mktime((2030, 1, 1, 4, 48, 50, 0, 0, -1))
    (told,) = slurm.accounting(["2"], {"2": submitted - 1}).values()
    assert (told.submitted, told.cluster, told.comment, len(told.earlier)) == (submitted, "fake", "exp-1", 2)
    assert slurm.accounting(["2"], {"2": submitted + 1}) == {}


def test_any_number_of_jobs_is_one_call_of_sacct(fake: FakeSlurm) -> None:
    fake.accounted(*SACCT.splitlines())
    assert list(slurm.accounting([f"3_{row}" for row in range(5000)])) == ["3_0"]
    assert [call.rpartition(" ")[2] for call in fake.calls()] == ["--jobs=3"]
    assert slurm.accounting([]) == {} and len(fake.calls()) == 1


def test_a_cluster_without_accounting_says_so(fake: FakeSlurm) -> None:
    with pytest.raises(slurm.SlurmError, match=r"^sacct: Slurm accounting storage is disabled$"):
        slurm.accounting(["5"])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5:00", 300), ("1:02:03", 3723), ("2-00:00:00", 172800), ("UNLIMITED", None), ("NONE", None), ("", None)],
)
def test_durations(text: str, seconds: int | None) -> None:
    assert slurm.duration(text) == seconds


# On the real cluster.


@pytest.fixture
def here(slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    without_slurm(monkeypatch)
    for key, value in slurm_cluster.environment().items():
        monkeypatch.setenv(key, value)
    yield slurm_cluster
    slurm_cluster.run("scancel", "--user=root")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "it's a script.sh"
    path.write_text("#!/bin/bash\n#SBATCH --comment=a|b --mem=100M --time=5 --output=/dev/null\nexec sleep 60\n")
    return path


@pytest.mark.slurm
def test_jobs_are_held_released_updated_and_cancelled(here: Cluster, script: Path) -> None:
    array = slurm.submit(script, "--hold", "--array=0-2")
    after = slurm.submit(script, f"--dependency=afterok:{array}")
    jobs = slurm.queue([f"{array}_{row}" for row in range(3)])
    assert {(info.state, info.reason, info.priority) for info in jobs.values()} == {("PENDING", "JobHeldUser", 0)}
    info = slurm.queue()[after]
    assert info.dependency.startswith(f"afterok:{array}") and info.comment == "a|b" and info.partition == "gpu"
    assert info.time_limit_s == 300 and info.submitted is not None and info.submitted <= time.time()
    slurm.update(after, StartTime="now+600", ExcNodeList="node1")
    assert here.job_field(after, "ExcNodeList") == "node1"
    slurm.release(array)
    here.wait_for(lambda: slurm.queue()[f"{array}_2"].state == "RUNNING", 30, "the array to run")
    slurm.cancel(array, after)
    here.wait_for(lambda: not any(info.live for info in slurm.queue([f"{array}_0", after]).values()), 30, "the end")
    slurm.cancel(after)  # one that has ended is no fault


@pytest.mark.slurm
def test_comments_of_any_kind_and_single_jobs_are_told(here: Cluster, script: Path) -> None:
    broken = slurm.submit(script, "--hold", "--comment=a\nb|c\n\n987654|RUNNING\x0cd")
    array = slurm.submit(script, "--hold", "--array=0-3%2")
    tasks = {f"{array}_{row}" for row in range(4)}
    assert slurm.queue().keys() >= {broken, *tasks} and "987654" not in slurm.queue()
    assert slurm.queue([broken])[broken].comment == "a"
    assert slurm.queue([f"{array}_2"]).keys() == {f"{array}_2"} and slurm.queue([array]).keys() == tasks
    assert slurm.queue([f"{array}_2", "999999"]).keys() == {f"{array}_2"}
    assert slurm.queue(["999999"]) == slurm.queue(["999999_1"]) == {}


@pytest.mark.slurm
def test_a_job_knows_the_name_of_its_cluster(here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    (tmp_path / "script.sh").write_text(f"#!/bin/bash\nenv > {told}.new; mv {told}.new {told}\n")
    slurm.submit(tmp_path / "script.sh", "--mem=50M", "--output=/dev/null")
    here.wait_for(told.exists, 20, "the job")
    environ = dict(line.partition("=")[::2] for line in told.read_text().splitlines())
    assert allocation.cluster_name(environ) == slurm.cluster_name() != ""


@pytest.mark.slurm
def test_refusals_keep_slurms_own_words(here: Cluster, script: Path) -> None:
    with pytest.raises(slurm.SlurmError, match=r"^sbatch: .*[Ii]nvalid partition"):
        slurm.submit(script, "--partition=nope")
    assert slurm.test_only(script, "--nodes=9") == (False, "Requested node configuration is not available")
    accepted, words = slurm.test_only(script, "--array=0-3")
    assert accepted and words.startswith("Job ") and " to start at " in words
    for refused in (lambda: slurm.release("999999"), lambda: slurm.update("999999", StartTime="now+9")):
        with pytest.raises(slurm.SlurmError, match=r"^scontrol: .*Invalid job id"):
            refused()
    with pytest.raises(slurm.SlurmError, match="accounting storage is disabled"):
        slurm.accounting(["1"])


@pytest.mark.slurm
def test_accounting_follows_a_job_across_its_requeue(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch)
    with Cluster(accounting=True, kill_wait=1) as cluster:
        for key, value in cluster.environment().items():
            monkeypatch.setenv(key, value)
        job = slurm.submit(script, "--requeue")
        cluster.wait_state(job, "RUNNING")
        cluster.preempt(job)
        cluster.release(job)
        cluster.wait_state(job, "RUNNING")
        slurm.cancel(job)

        def ended() -> slurm.Accounted | None:
            told = slurm.accounting([job, "999999"])
            return told.get(job) if job in told and told[job].state == "CANCELLED" else None

        told = cluster.wait_for(ended, 30, "sacct to tell the end")
        assert told.earlier == ("PREEMPTED",) and told.req_mem_gb == 0.1 and told.time_limit_s == 300
