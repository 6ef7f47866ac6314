"""`hpc sweep`, `resume` and `cancel` as a user types them: one line per fault, nothing half made, no orphan job."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from datasets.writer import VolumeWriter
from hpc import arrays, cli, slurm, sweep
from hpc.errors import UserError
from hpc.experiment import load
from hpc.plan import Taken
from hpc.rundir import write_json
from hpc.submission import Refused
from hpc.sweepdir import SweepDir
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.slurm.cluster import Cluster

TINY = """
name: tiny
model: {{name: resnet3d_tiny}}
data: {{file: scans.h5, batch_size: 4}}
launch: {{instance: cedia-a100-40gb, cluster: {cluster}, gpus: 0, cpus: 1, mem: 1GB, time: 10min}}
"""
STRANGE = ["a b", 'q"u,o"te', "it's", "\\", '\\",b', "[x,y", "}{", "a,b", "#no", "-x", "--wrap=x", "$(touch x)", "`x`"]
STRANGE += ["two\nlines,", "%j", "a: b", "&x", "*x", "!x", ";touch x", "é", "~", "null"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def told(self) -> list[str]:
        """Without what preflight found."""
        return [line for line in self.err.splitlines() if not line.startswith(("ok  ", "waits  ", "not checked  "))]


Hpc = Callable[..., Done]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with an experiment for here and one for SLURM."""
    without_slurm(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for cluster in ("local", "slurm"):
        (tmp_path / f"{cluster}.yaml").write_text(TINY.format(cluster=cluster))
    return tmp_path


@pytest.fixture
def hpc(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Hpc:
    """The command line's own entry point."""

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["hpc", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return Done(int(left.value.code), out, err)

    return run


QUICK = """import json
print("a word of a model")
print(json.dumps({"passed": ["looked at"], "unchecked": [], "cautions": []}))
"""


@pytest.fixture
def quick(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload that finds no fault, at once: what the real one finds is tested in tests/test_preflight.py."""
    for room in ("jobs", "models3d", "datasets"):
        (folder / "root" / room).mkdir(parents=True)
        (folder / "root" / room / "__init__.py").touch()
    (folder / "root" / "jobs" / "check.py").write_text(QUICK)
    monkeypatch.setenv("HPC_ROOT", str(folder / "root"))


@pytest.fixture
def data(folder: Path) -> None:
    with VolumeWriter(
        folder / "scans.h5", shape=(1, 8, 8, 8), dtype="int16", num_samples=8, class_names="ab"
    ) as writer:
        for number in range(8):
            split = "train" if number < 4 else "validation"
            writer.add(np.full((1, 8, 8, 8), number, "int16"), number % 2, id=f"s{number}", split=split, scale=1.0)


@pytest.fixture
def here(slurm_cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """This process talks to the cluster, which starts nothing meanwhile."""
    for key, value in slurm_cluster.environment().items():
        monkeypatch.setenv(key, value)
    slurm_cluster.run("scontrol", "update", "PartitionName=gpu", "State=DOWN")
    yield slurm_cluster
    slurm_cluster.run("scancel", "--me")
    slurm_cluster.wait_for(lambda: not queued(), 20, "an empty queue")
    slurm_cluster.run("scontrol", "update", "PartitionName=gpu", "State=UP")


def queued() -> dict[str, slurm.JobInfo]:
    return {job: info for job, info in slurm.queue().items() if info.live}


def made(folder: Path, *axes: str, runs: str = "runs", chunk: int | None = None) -> SweepDir:
    """A sweep of three rows on SLURM, not submitted; `chunk` rows in each array."""
    plan = sweep.make(folder / "slurm.yaml", axes or ["train.seed=0:3"], folder / runs)
    folder_ = sweep.create(plan, lambda: None)
    if chunk:
        folder_.write_chunks(sweep.cut(3, chunk, None))
        for number in range(1, len(folder_.chunks())):
            folder_.script(number).write_text(folder_.script(0).read_text().replace("/0\n", f"/{number}\n"))
    return folder_


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train.sede=0:3", "local.yaml: train.sede: no such key; did you mean 'seed'"),
        ("train.seed=", "'train.seed=' has an empty value; write train.seed=1,2,3"),
        ("train.seed=0:1000000", "0:1000000 has 1000000 values; a sweep has at most 100000 rows"),
        ("train.seed=0:1000 train.epochs=1:1001", "1000000 combinations; a sweep has at most 100000 rows"),
        ("train.seed=1,2,1", "rows 0 and 2 are equal (train.seed=1 and train.seed=1): leave one of them out"),
        ("train.seed=1 train.checkpoint_every=300,5min", "rows 0 and 1 are equal"),
        ("train.seed=1 train.seed=2", "an axis stands twice"),
        ("train.seed=0:2 train.epochs=1,2,3 --zip", "these differ: train.seed 2, train.epochs 3"),
        ("launch.mem=1GB,2GB", "launch.mem=2GB: the rows of a sweep share one name and one request"),
        ("train.seed=0:2 --after nobody", "--after nobody: no run 'nobody'"),
        ("train=5", "local.yaml: train: is a section, 'key: value' lines (got 5)"),
        ("train.seed=[0,1", "train.seed=[0,1, line 1: expected ',' or ']'"),
        ("-- --train.seed=1", "'--train.seed=1' is no axis"),
        ("launch.instance=lptop", "launch.instance 'lptop' is not known; did you mean 'laptop'"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(hpc: Hpc, folder: Path, command: str, words: str) -> None:
    done = hpc("sweep", "local.yaml", *command.split(" "))
    assert done.code == 2 and not done.out
    assert len(done.err.splitlines()) == 1 and words in done.err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("name", [name for name in STRANGE if name not in ("é", "null")])
def test_no_strange_name_makes_a_folder_or_runs(hpc: Hpc, folder: Path, name: str) -> None:
    done = hpc("sweep", "local.yaml", "train.seed=0:2", f"name={json.dumps(name)}")
    assert done.code == 2 and done.err.startswith("local.yaml: name: must be 1 to 80 letters")
    assert sorted(path.name for path in folder.iterdir()) == ["local.yaml", "slurm.yaml"]


def test_strange_values_come_through_unchanged(folder: Path) -> None:
    axes = [f"model.note={','.join(map(json.dumps, STRANGE))}", "model.tag=it's,so"]
    plan = sweep.make(folder / "local.yaml", axes, folder / "runs")
    rows = sweep.create(plan, lambda: None).rows()
    found = [load(row.experiment)[0].model.options for row in rows]
    assert found == [{"note": note, "tag": tag} for note in STRANGE for tag in ("it's", "so")]
    assert not (folder / "x").exists()


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only", "full"])
def test_where_no_folder_can_be_made_it_is_one_line_and_nothing_is_left(
    hpc: Hpc, folder: Path, data: None, kind: str
) -> None:
    disk = folder / "disk"
    disk.mkdir()
    options = {"read-only": "ro", "full": "size=600k"}.get(kind)
    if options:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], check=True)
    where = {"a file": "local.yaml", "below a file": "local.yaml/runs"}.get(kind, "disk/runs")
    try:
        done = hpc("sweep", "local.yaml", "train.seed=0:2", "--runs", where)
        words = "no folder for runs, but a file" if kind == "a file" else "no folder for runs can be made ("
        assert done.code == 2 and words in done.err and "--runs" in done.err
        assert len(done.told) == 1 and not list(disk.iterdir())
    finally:
        if options:
            subprocess.run(["umount", str(disk)], check=True)


def test_two_at_once_make_one_sweep(folder: Path) -> None:
    plans = [sweep.make(folder / "local.yaml", ["train.seed=0:2"], folder / "runs") for _ in range(2)]
    first = sweep.create(plans[0], lambda: None)
    with pytest.raises(Taken, match="made by another command just now"):
        sweep.create(plans[1], lambda: None)
    assert [path.name for path in (folder / "runs").iterdir()] == [first.name]


def test_rows_that_are_under_way_or_finished_are_left_out(hpc: Hpc, fake: FakeSlurm, folder: Path) -> None:
    fake.configure({"MaxArraySize": "1001"})
    first = made(folder)
    first.record("slurm", {0: ("70", [0, 1, 2])})
    fake.job("70_0", "RUNNING", comment=f"{first.name}/0")
    fake.job("70_1", "FAILED", comment=f"{first.name}/0")
    write_json(first.rows()[2].result, {"finished": True})
    names = [row.name for row in first.rows()]
    plan = sweep.make(folder / "slurm.yaml", ["train.seed=0:4"], folder / "runs")
    assert plan.left_out == {names[0]: "running", names[2]: "finished"}
    assert [row.overrides for row in plan.rows] == [("train.seed=1",), ("train.seed=3",)]
    done = hpc("sweep", "slurm.yaml", "train.seed=0,2")
    assert done.code == 2 and "nothing to submit: there are equal runs of all rows (1 running, 1 finished)" in done.err


def test_a_cluster_without_arrays_and_one_with_arrays_of_one_task(fake: FakeSlurm, folder: Path) -> None:
    fake.configure({"MaxArraySize": "0"})
    with pytest.raises(UserError, match=r"no job arrays \(MaxArraySize=0\): submit the runs one by one"):
        made(folder)
    fake.configure({"MaxArraySize": "1"})
    folder_ = made(folder)
    assert [(chunk.first, chunk.count) for chunk in folder_.chunks()] == [(0, 1), (1, 1), (2, 1)]
    assert len(set(arrays.submit(folder_, "slurm"))) == 3
    calls = [call for call in fake.calls() if call.startswith("sbatch ")]
    assert len(calls) == 3 and all("--hold" in call for call in calls)
    assert fake.calls()[-1] == "scontrol release 101,102,103"


def test_jobs_that_stay_held_are_told(fake: FakeSlurm, folder: Path) -> None:
    folder_ = made(folder, chunk=2)
    fake.fails("scontrol", "slurm_suspend error: Unable to contact slurm controller")
    with pytest.raises(UserError, match=r"submitted as 101, 102, which are held still .*'scontrol release 101,102'"):
        arrays.submit(folder_, "slurm")
    assert len(folder_.submissions()) == 3, "they are on record"


def test_while_slurm_is_silent_nothing_is_said_to_be_refused(fake: FakeSlurm, folder: Path) -> None:
    """The folder must stay: a job may be in the queue."""
    folder_ = made(folder)
    fake.fails("sbatch", "sbatch: error: Socket timed out on send/recv operation")
    fake.fails("squeue", "slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(UserError, match=f"may have submitted all the same .*'hpc resume {folder_.name}'") as silence:
        arrays.submit(folder_, "slurm")
    assert not isinstance(silence.value, Refused) and "\n" not in str(silence.value)


@pytest.mark.slurm
def test_a_dry_run_shows_rows_and_script_and_makes_nothing(hpc: Hpc, here: Cluster, folder: Path, quick: None) -> None:
    axes = ("train.seed=0:30", "train.optimizer.lr=1e-3,1e-2")
    shown = hpc("sweep", "slurm.yaml", *axes, "--dry-run", "--max-parallel", "99")
    assert shown.code == 0 and not shown.told
    assert "train.seed=0 train.optimizer.lr=1e-3" in shown.out and "40 more" in shown.out
    assert "#SBATCH --array=0-59%99\n" in shown.out and "row 1\n" not in shown.out
    told = json.loads(hpc("sweep", "slurm.yaml", *axes, "--dry-run", "--json").out)
    assert len(told["rows"]) == 60 and told["jobs"] == [] and told["cluster"] == "slurm"
    assert not (folder / "runs").exists() and not queued()


@pytest.mark.slurm
def test_a_sweep_from_its_submission_to_its_end_before_any_row_starts(
    hpc: Hpc, here: Cluster, folder: Path, quick: None
) -> None:
    where = ("--runs", 'it\'s 100% "odd" $(touch x)')
    told = json.loads(hpc("sweep", "slurm.yaml", "train.seed=0:3", "--max-parallel", "2", "--json", *where).out)
    (job,) = told["jobs"]
    assert sorted(queued()) == [f"{job}_{row}" for row in range(3)]
    follower = hpc("sweep", "slurm.yaml", "train.seed=2:5", "--after", job, *where)
    assert follower.code == 0 and f"{told['rows'][2]}  pending already: left out" in follower.out
    follower_job = next(info.job.partition("_")[0] for info in queued().values() if not info.job.startswith(f"{job}_"))
    assert here.job_field(f"{follower_job}_0", "Dependency").count(f"afterok:{job}_") == 3
    row = hpc("cancel", told["rows"][1], *where)
    assert row.out == f"{told['rows'][1]}: cancelled job {job}_1\n"
    refused = hpc("sweep", "slurm.yaml", "train.seed=7", "--after", told["sweep"], *where)
    assert refused.code == 2 and f"{told['rows'][1]} is cancelled, so it will not finish" in refused.err
    both = hpc("cancel", told["sweep"], follower.out.split("\n")[1].split()[0], *where)
    assert both.code == 0 and both.out.count("cancelled job") == 2
    here.wait_for(lambda: not queued(), 20, "an empty queue")
    again = hpc("resume", told["sweep"], *where)
    assert again.code == 0 and f"{told['sweep']}  3 of 3 rows  job " in again.out and len(queued()) == 3
    assert not (folder / "x").exists()


@pytest.fixture
def wrapped(here: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script in place of sbatch: $real is the real one, $count how many calls there were before."""

    def wrap(text: str) -> None:
        bin = folder / "bin"
        bin.mkdir()
        head = f'#!/bin/sh\nreal={shutil.which("sbatch")}\necho x >> "{bin}/calls"\n'
        (bin / "sbatch").write_text(f'{head}count=$(($(wc -l < "{bin}/calls") - 1))\n{text}')
        (bin / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")

    return wrap


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("chunk", "trouble", "words"),
    [
        (None, '$real "$@"\nfor last; do :; done\nrm -r "$(dirname "$last")"\n', "not submitted: "),
        (1, '$real "$@"\n[ $count -lt 1 ] || { kill -INT $PPID; sleep 5; }\n', "interrupted, nothing is submitted"),
    ],
    ids=["after the submission", "Ctrl-C"],
)
def test_what_ends_a_submission_takes_its_jobs_back(
    here: Cluster, folder: Path, wrapped: Callable[[str], None], chunk: int | None, trouble: str, words: str
) -> None:
    folder_ = made(folder, chunk=chunk)
    wrapped(trouble)
    with pytest.raises(Refused, match=words) as refusal:
        arrays.submit(folder_, "slurm")
    assert "\n" not in str(refusal.value)
    here.wait_for(lambda: not queued(), 20, "an empty queue")
    assert not folder_.submit.exists()


@pytest.mark.slurm
def test_ctrl_c_as_sbatch_answers_leaves_no_job_and_no_folder(
    here: Cluster, folder: Path, quick: None, wrapped: Callable[[str], None]
) -> None:
    wrapped(f'case " $* " in *test-only*) exec $real "$@";; esac\n$real "$@"\ntouch {folder}/submitted\nsleep 20\n')
    command = [sys.executable, "-m", "hpc.cli", "sweep", "slurm.yaml", "train.seed=0:3"]
    user = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (folder / "submitted").exists():
        assert time.monotonic() < end and user.poll() is None
        time.sleep(0.02)
    os.killpg(user.pid, signal.SIGINT)
    _, err = user.communicate(timeout=60)
    assert user.returncode == 2 and "interrupted, nothing is submitted" in err and "Traceback" not in err
    assert not (folder / "runs").exists()
    here.wait_for(lambda: not queued(), 20, "an empty queue")
