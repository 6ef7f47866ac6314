"""When a job ends and how much notice it gets: asked of SLURM, in little time, and passed on to the ranks."""

from datetime import datetime

import pytest

from hpc import limits, slurm
from hpc.allocation import Allocation, without_job
from tests.fakeslurm import FakeSlurm, without_slurm

END = datetime(2030, 1, 31, 12, 0, 0)
SHARED = [{"Partitions": "gpu,high"}]


@pytest.fixture
def job(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Job 55 in partition gpu, whose jobs are preempted by those of high; KillWait is 30 s, its grace 60 s."""
    without_slurm(monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "55")
    high = {"PartitionName": "high", "PriorityTier": "2", "Default": "NO"}
    fake.configure(partitions=[{"GraceTime": "60"}, high], nodes=SHARED)
    fake.job("55", "RUNNING", node="node0", more=f"gpu|1|N/A|N/A|{END.isoformat()}|8:00:00|1|(null)")
    return fake


def test_end_and_notice_reach_the_ranks(job: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    told = limits.of_this_job()
    assert told == {"HPC_END_TIME": f"{END.timestamp():.0f}", "HPC_NOTICE_S": "90"}
    assert "scontrol --oneliner --all show node node0" in job.calls(), "not all nodes of the cluster"
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    here = Allocation.current()
    assert (here.end_time, here.notice_s) == (END.timestamp(), 90)
    assert not told.keys() & without_job(told).keys(), "a job submitted from here has times of its own"


def test_no_limit_no_preemption_and_no_slurm_are_empty(job: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    job.configure(partitions=[{}])
    job.job("55", "RUNNING", node="node0", more="gpu|1|N/A|N/A|N/A|UNLIMITED|1|(null)")
    nothing = {"HPC_END_TIME": "", "HPC_NOTICE_S": ""}
    assert limits.of_this_job() == nothing
    asked = len(job.calls())
    monkeypatch.setenv("HPC_STEP", "local")
    assert limits.of_this_job() == nothing and len(job.calls()) == asked
    for key, value in nothing.items():
        monkeypatch.setenv(key, value)
    assert (Allocation.current().end_time, Allocation.current().notice_s) == (None, None)


def test_rank_0_may_ask_again_and_a_changed_limit_counts(job: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_END_TIME", "1000")
    assert limits.end_time() == END.timestamp()
    job.job("55", "RUNNING", more="gpu|1|N/A|N/A|N/A|UNLIMITED|1|(null)")
    assert limits.end_time() is None
    job.fails("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert limits.end_time() == 1000.0, "what was known"
    monkeypatch.setenv("HPC_STEP", "local")
    assert limits.end_time() == 1000.0


def test_all_questions_have_their_time_together(
    job: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "_PATIENCE_S", 0.2)
    job.hangs("squeue")
    job.hangs("scontrol")
    assert set(limits.of_this_job().values()) == {""} and limits.end_time() is None
    assert "end and notice of job 55 are not known: squeue" in capsys.readouterr().err
    with slurm.within(0.0), pytest.raises(slurm.SilentError):
        slurm.config()
    with slurm.within(60.0):
        with slurm.within(0.1), pytest.raises(slurm.SilentError, match=r"no answer within 0\.\d+ s"):
            slurm.config()
        (job.folder / "scontrol.hangs").unlink()
        assert slurm.config()["KillWait"] == "30 sec"
    assert slurm.config()
