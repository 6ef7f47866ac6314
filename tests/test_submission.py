"""Submission: what sbatch is given, the token after a failed one, no doubles; and the same script run here."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import UncompletedJobError

from hpc import allocation, slurm, submission
from hpc.attempt import same_process
from hpc.errors import UserError
from hpc.rundir import RunDir, read_json, write_json, write_text
from tests.fakeslurm import FakeSlurm, without_slurm


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    without_slurm(monkeypatch)
    run = RunDir(tmp_path / "it's 100%" / "exp-0000aaaa")
    write_text(run.experiment, "name: exp\n")
    write_text(run.script, "#!/bin/bash\n#SBATCH --comment=exp-0000aaaa\necho told\n")
    return run


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", fake.path)
    return fake


def test_sbatch_is_given_the_runs_own_script(run: RunDir, fake: FakeSlurm) -> None:
    job = submission.submit(run, "slurm")
    assert fake.jobs() == {job.job_id: "PENDING"}
    assert read_json(run.submit)["job"] == job.job_id and read_json(run.submit)["cluster"] == "slurm"
    (call,) = [call for call in fake.calls() if call.startswith("sbatch ")]
    given = Path(call.removeprefix("sbatch "))
    assert given.read_text() == run.script.read_text()
    assert not list(run.path.rglob("*.pkl")), "a run carries no pickle"


def test_a_failed_sbatch_that_did_submit_is_found_by_its_token(run: RunDir, fake: FakeSlurm) -> None:
    fake.job("90", "RUNNING", comment="exp-0000bbbb")
    fake.fails("sbatch", "Socket timed out on send/recv operation")
    job = submission.submit(run, "slurm")
    assert fake.jobs() == {"102": "PENDING", "90": "RUNNING"} and job.job_id == "102"
    assert len([call for call in fake.calls() if call.startswith("sbatch")]) == 1, "asked for once only"


def test_an_old_job_of_the_same_token_is_not_taken_for_it(run: RunDir, fake: FakeSlurm) -> None:
    fake.job("90", "CANCELLED", comment=run.name)
    fake.fails("sbatch", "sbatch: error: Invalid account or account/partition combination specified")
    with pytest.raises(UserError, match=r"sbatch refused .*: .*Invalid account") as caught:
        submission.submit(run, "slurm")
    assert "\n" not in str(caught.value)
    assert not run.submit.exists() and fake.jobs() == {"90": "CANCELLED"}


def test_when_nobody_answers_the_doubt_is_told(run: RunDir, fake: FakeSlurm) -> None:
    fake.fails("sbatch", "Socket timed out on send/recv operation")
    fake.fails("squeue", "Unable to contact slurm controller")
    with pytest.raises(UserError, match=r"may have submitted all the same .*'hpc resume exp-0000aaaa' submits it"):
        submission.submit(run, "slurm")


SLOW = "sbatch: error: Batch job submission failed: timed out"


def test_a_slow_controller_is_given_time_to_show_the_job(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.fails("sbatch", SLOW)
    looked: list[str] = []
    find = slurm.find_by_comment

    def look(token: str) -> str | None:
        looked.append(token)
        if len(looked) == 3:
            fake.job("104", "PENDING", comment=token)
        return find(token)

    monkeypatch.setattr(slurm, "find_by_comment", look)
    monkeypatch.setattr(submission, "_LOOK_S", 0.01)
    assert submission.submit(run, "slurm").job_id == "104" and len(looked) == 3


def test_a_job_that_may_come_yet_is_no_refusal(run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal would remove the run's folder under the job."""
    fake.fails("sbatch", SLOW)
    monkeypatch.setattr(submission, "_LATE_S", 0.0)
    with pytest.raises(UserError, match=r"may have submitted all the same .it is not in the queue yet") as doubt:
        submission.submit(run, "slurm")
    assert not isinstance(doubt.value, submission.Refused)


def test_a_job_submitted_from_a_job_does_not_inherit_it(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = {"SLURM_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2", "SLURM_CONF": "/etc/slurm.conf", "OTHER": "x"}
    assert allocation.without_job(outer) == {"SLURM_CONF": "/etc/slurm.conf", "OTHER": "x"}
    for key, value in outer.items():
        monkeypatch.setenv(key, value)
    sbatch = fake.folder / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("me=", "env > env; me=", 1))
    submission.submit(run, "slurm")
    seen = (fake.folder / "env").read_text()
    assert "SLURM_CONF=/etc/slurm.conf" in seen and "SLURM_JOB_ID" not in seen and "SLURM_ARRAY" not in seen
    assert os.environ["SLURM_JOB_ID"] == "5", "ours is as before"


def test_the_cluster_is_slurm_where_there_is_one(fake: FakeSlurm) -> None:
    assert [submission.choose_cluster(wanted) for wanted in ("auto", "slurm", "local")] == ["slurm", "slurm", "local"]
    fake.fails("sinfo", "sinfo: fatal: Could not establish a configuration source")
    assert submission.choose_cluster("auto") == "local", "installed, and part of no cluster"
    with pytest.raises(UserError, match=r"launch\.cluster is slurm, but there is no SLURM on this machine"):
        submission.choose_cluster("slurm")


@pytest.mark.parametrize("wanted", ["auto", "slurm"])
@pytest.mark.parametrize("trouble", ["fails", "hangs"])
def test_a_silent_controller_is_no_reason_to_train_on_its_login_node(
    fake: FakeSlurm, wanted: str, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "hangs":
        fake.hangs("sinfo")
        answer = slurm._run
        monkeypatch.setattr(slurm, "_run", lambda *command, timeout=None: answer(*command, timeout=0.2))
    else:
        fake.fails("sinfo", "slurm_load_partitions: Unable to contact slurm controller (connect failure)")
    with pytest.raises(UserError, match=r"does not answer \(sinfo.*: try again, or run on this machine"):
        submission.choose_cluster(wanted)
    assert submission.choose_cluster("local") == "local"


def test_the_users_own_variables_do_not_overrule_the_script(
    run: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"PARTITION": "high", "ACCOUNT": "lab", "ARRAY_INX": "0-2", "NO_REQUEUE": "1", "TIMELIMIT": "1"}
    for key, value in given.items():
        monkeypatch.setenv(f"SBATCH_{key}", value)
    write_text(run.script, "#SBATCH --partition=gpu\n")
    sbatch = fake.folder / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace("me=", "env > env; me=", 1))
    submission.submit(run, "slurm")
    seen = [line for line in (fake.folder / "env").read_text().splitlines() if line.startswith("SBATCH_")]
    assert seen == ["SBATCH_ACCOUNT=lab"], "what a site sets counts where the script says nothing"
    assert slurm.inherited("#SBATCH --account=x\n") == {"SBATCH_PARTITION": "high"}


def test_a_run_that_was_moved_is_not_started_where_it_was(run: RunDir, tmp_path: Path) -> None:
    place = tmp_path / "of a 100%"
    output = shlex.quote(str(place / run.name / "logs" / "%j_0_log.out")).replace("100%", "100%%")
    write_text(run.script, f"#SBATCH --output={output}\n")
    words = "exp-0000aaaa was moved or copied, and job.sbatch still runs where it was made"
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        submission.submit(run, "local")
    place.mkdir()
    run.path.rename(place / run.name)
    submission.submit(RunDir(place / run.name), "local").wait()


def test_squeue_is_asked_for_whole_fields(fake: FakeSlurm) -> None:
    fake.job("55_3", "PENDING", "Resources", "", "a|b|c")
    assert slurm.queue()["55_3"] == slurm.JobInfo("55_3", "PENDING", "Resources", "", "a|b|c")
    assert slurm.queue(["7"]) == {}
    call = fake.calls()[0]
    assert "--me" in call and "--array" in call and "--states=all" in call


# Here.


def wait(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_here_the_same_script_runs_under_bash_and_its_result_is_result_json(run: RunDir) -> None:
    write_text(run.script, 'echo "told $HPC_STEP"; echo \'{"best": 1}\' > "$(dirname "$0")/result.json"\n')
    job = submission.submit(run, "local")
    assert job.result() == {"best": 1}
    assert "told local" in run.output(job.job_id, "0").read_text()
    assert read_json(run.submit)["job"] == job.job_id and not list(run.path.rglob("*.pkl"))


def test_a_local_job_is_recorded_with_the_start_of_its_process(run: RunDir) -> None:
    write_text(run.script, "exec sleep 60\n")
    job = submission.submit(run, "local")
    start = read_json(run.submit)["process_start"]
    assert start and same_process(int(job.job_id), start)
    job.cancel()
    job.wait()
    assert not same_process(int(job.job_id), start)


def test_training_in_the_foreground_records_its_process_too(run: RunDir) -> None:
    """The script sees its own record: its pid with its start."""
    text = (
        "import sys; from pathlib import Path; from hpc.attempt import same_process; from hpc.rundir import read_json"
    )
    text += "; told = read_json(Path(sys.argv[1])); sys.exit(not same_process(int(told['job']), told['process_start']))"
    script = f"while [ ! -e {run.name} ]; do sleep 0.05; cp {run.submit.name} {run.name} 2>/dev/null; done\n"
    check = shlex.join([sys.executable, "-c", text, run.submit.name])
    write_text(run.script, f'cd "$(dirname "$0")"\n{script}{check}\n')
    run.logs.mkdir()
    command = "import sys; from hpc import foreground; from hpc.rundir import RunDir"
    command += "; sys.exit(foreground.train(RunDir(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", command, str(run.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_without_a_result_says_where_its_output_is(run: RunDir) -> None:
    write_text(run.script, "exit 3\n")
    with pytest.raises(UncompletedJobError, match="exp-0000aaaa left no result; its output is in"):
        submission.submit(run, "local").result()


def test_the_submitting_command_ends_at_once_and_leaves_no_pipe_open(run: RunDir, tmp_path: Path) -> None:
    """Whoever reads its output must not wait for the run."""
    flag = tmp_path / "go"
    write_text(run.script, f'while [ ! -e {flag} ]; do sleep 0.05; done; echo done > "$(dirname "$0")/result.json"\n')
    text = "import sys; from hpc import rundir, submission; submission.submit(rundir.RunDir(sys.argv[1]), 'local')"
    done = subprocess.run(
        [sys.executable, "-c", text, str(run.path)], capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stdout == "" and not run.result.exists()
    flag.touch()
    wait(run.result.exists)


def test_the_result_of_a_finished_run_can_be_asked_for_on_slurm(run: RunDir, fake: FakeSlurm) -> None:
    job = submission.submit(run, "slurm")
    write_json(run.result, {"best": 2})
    fake.job(job.job_id, "COMPLETED")
    assert job.result() == {"best": 2}
