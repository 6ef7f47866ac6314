"""`hpc resume RUN launch.KEY=VALUE`: a run goes on with another request, whole or not at all, and is the same run."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from hpc import ledger, plan, resumption, rundir, stepledger, submission, sweep, trust
from hpc.commands.run import app
from hpc.errors import UserError
from hpc.experiment import load
from hpc.preflight import Findings
from hpc.rundir import RunDir, all_runs, find_run, locked, write_json, write_text
from tests import scripted
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.faults import layouts
from tests.test_comeback import wait_for
from tests.tiny_run import in_child, make_data
from tests.tiny_run import train as train_here

OTHER = ("launch.tasks_per_node=2", "launch.cpus=2", "launch.time=5min", "launch.budgets.crash=1")


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch)


@pytest.fixture
def old(tmp_path: Path, fake: FakeSlurm) -> RunDir:
    """A run of one task that has stopped on SLURM: a pipeline's step, of which neither data nor model are looked at."""
    run = scripted.make(tmp_path, "done", overrides=("train.seed=3",))
    with trust.private():
        write_text(run.step, "module: none\n")
    stopped(run)
    os.utime(run.experiment, (1e9, 1e9))
    return run


def stopped(run: RunDir) -> None:
    write_json(run.submit, {"cluster": "slurm", "job": "60", "time": time.time() - 20})
    common = {"generation": 1, "job": "60", "host": "away", "node": "n", "pid": 1, "step": 40, "epoch": 2}
    ended = {"phase": "stopped", "reason": "stopped by SIGTERM at step 40"}
    write_json(run.state, {**common, **ended, "started": time.time() - 9, "time": time.time()})
    run.event("submit", "login", cluster="slurm", job="60")


def resume(run: RunDir, *overrides: str) -> str:
    return "\n".join(resumption.named([run.name], run.runs, overrides=overrides))


def refusal(run: RunDir, *overrides: str) -> str:
    with pytest.raises(UserError) as fault:
        resume(run, *overrides)
    return str(fault.value)


def files(run: RunDir) -> list[tuple[bytes, float]]:
    return [(path.read_bytes(), run.experiment.stat().st_mtime) for path in (run.experiment, run.delta, run.script)]


def events(run: RunDir) -> list[dict[str, Any]]:
    return [event for event in run.read_events() if event["event"] in ("request", "withdrawn")]


def submitted(fake: FakeSlurm) -> int:
    return len([call for call in fake.calls() if call.startswith("sbatch ") and "--test-only" not in call])


def check_is_other(run: RunDir) -> None:
    """All three files say what OTHER asks for, and nothing else has changed."""
    launch = load(run.experiment)[0].launch
    assert (launch.tasks_per_node, launch.cpus, launch.time, launch.budgets.crash) == (2, 2, 300, 1)
    delta = {"launch.budgets.crash": 1, "launch.cpus": 2, "launch.tasks_per_node": 2, "launch.time": 300}
    assert yaml.safe_load(run.delta.read_text()) == {**delta, "train.seed": 3}
    rendered, changes = plan.anew(run, [])
    assert not changes and run.script.read_text() == rendered.script
    assert "#SBATCH --ntasks-per-node=2\n" in rendered.script and "#SBATCH --time=5:00\n" in rendered.script


def test_another_request_is_checked_rendered_recorded_and_submitted(old: RunDir, fake: FakeSlurm) -> None:
    found: list[Findings] = []
    (line,) = resumption.named([old.name], old.runs, overrides=OTHER, report=found.append)
    assert line == f"{old.name}  job 101 (slurm)  from the start: it has no checkpoint yet"
    assert "fits cedia-a100-40gb: 1 x (2 cores, 0.1 GB, 0 GPUs), 2 tasks per node" in found[0].passed
    assert any(line.startswith("sbatch --test-only: accepted") for line in found[0].passed)
    check_is_other(old)
    (event,) = events(old)
    assert (event["event"], event["generation"]) == ("request", 0)
    assert event["changes"] == {
        "launch.tasks_per_node": [None, 2],
        "launch.cpus": [1, 2],
        "launch.time": [600, 300],
        "launch.budgets.crash": [3, 1],
    }
    assert ledger.status(old).state == "requeued" and find_run(old.runs, old.name).path == old.path
    assert old.experiment.stat().st_mtime == 1e9, "its place in 'hpc ls' is that of its age"
    assert not any(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for path in (old.experiment, old.script))


def test_what_was_asked_for_goes_on_being_asked_for(old: RunDir, fake: FakeSlurm) -> None:
    resume(old, *OTHER)
    fake.job("101", "FAILED", comment=old.name)
    before = files(old)
    resume(old)
    assert files(old) == before and len(events(old)) == 1 and submitted(fake) == 2
    fake.job("102", "FAILED", comment=old.name)
    resume(old, "launch.time=5min")
    assert files(old) == before and len(events(old)) == 1 and submitted(fake) == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epochs=9"], "train.epochs: a run goes on with another launch.* alone"),
        (["launch.nodes=2", "name=x"], "name: a run goes on with another launch.* alone"),
        (["launch={nodes: 2}"], "launch: a run goes on with another launch.* alone"),
        (["launch.node=2"], "launch.node: no such key; did you mean 'nodes'?"),
        (["launch.time=99d"], "launch.time: 99-00:00:00 asked, but cedia-a100-40gb ends a job after"),
        (["launch.tasks_per_node=3", "launch.cpus=3"], "data.batch_size 8 does not divide by 3 tasks"),
        (["launch.partition=none"], "partition 'none' is not on this cluster; valid: gpu"),
        (["launch.instance=none"], "launch.instance 'none' is not known"),
        (["launch.nodes=2"], "launch.nodes: 2 asked, but cedia-a100-40gb has 1; ask for 1 or less"),
    ],
)
def test_a_request_that_cannot_be_is_refused_in_one_line_and_leaves_all_as_it_was(
    old: RunDir, fake: FakeSlurm, overrides: list[str], words: str
) -> None:
    before = files(old)
    told = refusal(old, *overrides)
    assert words in told and len(told.splitlines()) == 1, told
    assert files(old) == before and not events(old) and not submitted(fake)


def test_a_setting_of_the_training_belongs_to_a_new_run_and_the_command_is_there(old: RunDir) -> None:
    assert f"'hpc submit {old.experiment} train.epochs=9'" in refusal(old, "train.epochs=9")


def test_virtual_ranks_divide_by_the_tasks_of_another_request(tmp_path: Path, fake: FakeSlurm) -> None:
    run = scripted.make(tmp_path, "done", overrides=("train.deterministic=layout", "data.batch_size=12"))
    told = refusal(run, "launch.tasks_per_node=3", "launch.cpus=3")
    assert told.startswith(f"{run.name}: train.virtual_ranks 4 does not divide by 3 tasks")


def test_only_single_runs_that_are_named_and_not_under_way(old: RunDir, fake: FakeSlurm, tmp_path: Path) -> None:
    folder = sweep.create(sweep.make(tmp_path / "scripted.yaml", ["train.seed=0:2"], old.runs), lambda: None)
    row = folder.rows()[0]
    assert f"{row.name} is a row of {folder.name}, whose rows share one request" in refusal(row, *OTHER)
    with pytest.raises(UserError, match=f"{folder.name} is a sweep, whose rows share one request"):
        resumption.named([old.name, folder.name], old.runs, overrides=OTHER)
    told = CliRunner().invoke(app, ["resume", "--all", "launch.nodes=2", "--runs", str(old.runs)])
    assert str(told.exception) == "launch.nodes=2 is for single runs that you name: 'hpc resume RUN launch.nodes=2'"
    fake.job("60", "RUNNING", comment=old.name)
    assert refusal(old, *OTHER).endswith(f"before it can ask for anything else, 'hpc cancel {old.name}'")
    assert not submitted(fake) and not events(old)


def test_what_sbatch_refuses_leaves_the_run_as_it_was(old: RunDir, fake: FakeSlurm) -> None:
    before, executable = files(old), fake.folder / "bin" / "sbatch"
    accepting = executable.read_text()
    executable.write_text(accepting.replace('--test-only "*) fail;', '--test-only "*)'))
    fake.fails("sbatch", "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy")
    assert "Job violates accounting/QOS policy" in refusal(old, *OTHER)
    assert files(old) == before and [event["event"] for event in events(old)] == ["request", "withdrawn"]
    (fake.folder / "sbatch.fails").unlink()
    resume(old)
    assert files(old) == before and len(events(old)) == 2 and submitted(fake) == 2


@pytest.mark.parametrize("writes", range(4), ids=["before the first file", "after one", "after two", "after all"])
def test_a_command_killed_in_between_is_completed_by_the_next(
    old: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    with monkeypatch.context() as killed:
        left = iter(range(writes))

        def write(path: Path, text: str) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            rundir.write_text(path, text)

        def submit(*_: object) -> None:
            raise KeyboardInterrupt

        killed.setattr(plan, "write_text", write)
        killed.setattr(submission, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            resume(old, *OTHER)
    assert ledger.status(old).state == "stopped" and load(old.experiment) and not submitted(fake)
    assert [run.name for run in all_runs(old.runs)] == [old.name]
    resume(old, "launch.mem=200MB")
    check_script = old.script.read_text()
    assert "#SBATCH --mem=200M\n" in check_script and "#SBATCH --ntasks-per-node=2\n" in check_script
    last = events(old)[-1]["changes"]
    assert last["launch.cpus"] == [1, 2] and last["launch.mem"] == [0.1, 0.2] and submitted(fake) == 1
    fake.job("101", "FAILED", comment=old.name)
    resume(old, "launch.mem=100MB")
    delta = yaml.safe_load(old.delta.read_text())
    assert delta.pop("launch.mem") == 0.1
    with trust.private():
        write_text(old.delta, yaml.safe_dump(delta))
    check_is_other(old)


def test_no_attempt_begins_and_no_other_command_resumes_in_between(
    old: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, seen = submission.submit, []

    def look(run: RunDir, *arguments: Any) -> Any:
        check_is_other(run)
        with locked(run.lease, wait=False) as free:
            seen.append(free)
        return submit(run, *arguments)

    monkeypatch.setattr(submission, "submit", look)
    resume(old, *OTHER)
    with locked(old.lease, wait=False) as free:
        assert (seen, free) == ([False], True)


def test_a_run_of_another_version_keeps_its_own_batch_script(old: RunDir, fake: FakeSlurm) -> None:
    text = old.code / "slurm_templates" / "job.sbatch.j2"
    text.write_text(f"{text.read_text()}# of another version\n")
    told = refusal(old, *OTHER)
    assert f"PYTHONPATH={old.code} hpc resume" in told and not events(old) and len(told.splitlines()) == 1
    resume(old)


# For real, from the command line.

_SLOW = """
import time
from pathlib import Path
from torch import nn

class Slow(nn.Sequential):
    def __init__(self, in_channels, num_classes, slow):
        conv, norm = nn.Conv3d(in_channels, 8, 3, stride=2), nn.BatchNorm3d(8)
        super().__init__(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 27, num_classes))
        self.slow = Path(slow)

    def forward(self, x):
        time.sleep(0.2 if self.training and self.slow.exists() else 0)
        return super().forward(x)
"""
_TINY = """
name: tiny
model: {name: file:slow.py:Slow, slow: FOLDER/slow}
data: {file: scans.h5, batch_size: 12, threads: 1, augment: {flip: [0, 1, 2], noise: 0.1}}
train: {epochs: 2, deterministic: layout, device: cpu, ledger: true}
launch: {cluster: local, tasks_per_node: 2, cpus: 2, mem: 1GB, time: 30min}
"""


class Desk:
    """A folder as a user has it, and commands there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_data(folder, {"train": 121, "validation": 6, "test": 2})
        (folder / "slow.py").write_text(_SLOW)
        (folder / "tiny.yaml").write_text(_TINY.replace("FOLDER", str(folder)))

    def start(self, *words: str) -> "subprocess.Popen[str]":
        command = [str(Path(sys.executable).with_name("hpc")), *words]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=self.folder, text=True, **pipe)  # type: ignore[call-overload, no-any-return]

    @property
    def run(self) -> RunDir:
        (run,) = all_runs(self.folder / "runs")
        return run


@pytest.fixture
def desk(tmp_path: Path, alive_jobs: list[int]) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def alive_jobs() -> Iterator[list[int]]:
    """Processes that a failed test leaves are ended."""
    jobs: list[int] = []
    yield jobs
    for job in jobs:
        if (Path("/proc") / str(job)).exists():
            os.kill(job, signal.SIGTERM)


def undisturbed(run: RunDir) -> RunDir:
    """The same experiment from its start to its end, on one rank."""
    golden = RunDir(run.path.parent.parent / "golden")
    golden.path.mkdir()
    golden.experiment.write_text(run.experiment.read_text())
    assert in_child(train_here, golden) == 0
    return golden


def ends(process: "subprocess.Popen[str]", code: int) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code, said
    return said


def test_stopped_on_two_ranks_and_resumed_on_one_it_ends_bit_identical(desk: Desk, alive_jobs: list[int]) -> None:
    (desk.folder / "slow").touch()
    train = desk.start("train", "tiny.yaml")
    alive_jobs.append(train.pid)
    steps = "runs/tiny-*/ledger/001-rank0.jsonl"
    wait_for(lambda: any(file.read_text().count("\n") > 2 for file in desk.folder.glob(steps)), 120)
    train.send_signal(signal.SIGINT)
    said, _ = train.communicate(timeout=120)
    (desk.folder / "slow").unlink()
    run = desk.run
    assert ledger.status(run).state in ("stopped", "failed"), said
    told = ends(desk.start("resume", "tiny", "launch.tasks_per_node=1", "launch.cpus=1"), 0)
    assert f"goes on from checkpoint {run.newest_checkpoint()}" in told and "bit for bit" not in told
    alive_jobs.append(int(rundir.read_json(run.submit)["job"]))
    golden = undisturbed(run)
    wait_for(lambda: run.result.exists() and not ledger.status(run).live, 120)
    assert sorted({path.name for path in run.ledger.glob("002-*")}) == ["002-rank0.jsonl"]
    assert stepledger.read(run).last == 20
    layouts.check_steps(run, golden, same_ranks=False)
    layouts.check_weights_on_the_way(run, golden)
    layouts.check_bits(run, golden)
    shown = ends(desk.start("show", "tiny"), 0)
    assert "request" in shown and "'launch.tasks_per_node': [2, 1]" in shown


def test_where_bits_depend_on_the_ranks_one_line_says_so(tmp_path: Path) -> None:
    run = scripted.make(tmp_path, "done", overrides=OTHER)
    old, fewer = load(run.experiment)[0], plan.anew(run, ["launch.tasks_per_node=1"])[0]
    assert not list(resumption.note(fewer, old, 1)), "it begins on them"
    (run.checkpoints / "g001-s00000040").mkdir(parents=True)
    (note,) = resumption.note(fewer, old, 1)
    assert note.startswith(f"{run.name}: 1 rank instead of 2: the same samples and pixels, but weights no longer")
    assert not list(resumption.note(fewer, fewer.experiment, 1))
    run.experiment.write_text(run.experiment.read_text().replace("deterministic: auto", "deterministic: layout"))
    assert not list(resumption.note(plan.anew(run, ["launch.tasks_per_node=1"])[0], old, 1))


def test_a_request_that_was_killed_and_is_then_refused_stays_unfinished(
    old: RunDir, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise submission.Refused("sbatch refused it")

    with monkeypatch.context() as killed:
        killed.setattr(rundir, "fsync_folder", _interrupt)  # the first file is in its place, the others are not
        with pytest.raises(KeyboardInterrupt):
            resume(old, *OTHER)
    with monkeypatch.context() as refused:
        refused.setattr(submission, "submit", refuse)
        assert refusal(old) == "sbatch refused it"
    resume(old)
    check_is_other(old)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_whose_instance_is_gone_goes_on_as_another(old: RunDir, fake: FakeSlurm) -> None:
    write_text(old.experiment, old.experiment.read_text().replace("cedia-a100-40gb", "gone"))
    resume(old, "launch.instance=cedia-a100-40gb")
    assert submitted(fake) == 1 and events(old)[0]["changes"] == {"launch.instance": ["gone", "cedia-a100-40gb"]}
