"""`hpc pipeline`: what is refused before anything queues, that it is whole or nothing, and jobs.step's own checks.

Run to their end, pipelines are rows of tests/scenarios.py.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

from datasets.writer import VolumeWriter
from hpc import ledger, pipeline, yamlfile
from hpc.attempt import same_process
from hpc.errors import UserError
from hpc.preempt import StopFlag
from hpc.rundir import RunDir, all_runs, read_json, write_json, write_text
from hpc.submission import Refused
from jobs import step
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.slurm.cluster import Cluster

PACK = "scans --labels scans/labels.csv"
REQUEST = "cpus: 4, mem: 8GB, time: 30min, account: lab"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: six scans of two kinds, a table, and an experiment without its data file."""
    without_slurm(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    table = ["id,label"]
    for number in range(6):
        nibabel.save(nibabel.Nifti1Image(np.full((4, 4, 4), number, "int16"), np.eye(4)), f"scans/s{number}.nii")
        table.append(f"s{number},{'ab'[number % 2]}")
    Path("scans/labels.csv").write_text("\n".join(table) + "\n")
    experiment("slurm")
    return tmp_path


def experiment(cluster: str, instance: str = "cedia-a100-40gb", request: str = REQUEST) -> None:
    launch = f"{{instance: {instance}, cluster: {cluster}, {request}}}"
    Path("exp.yaml").write_text(f"name: exp\nmodel: {{name: m}}\ndata: {{file: scans.h5}}\nlaunch: {launch}\n")


def make(pack: str | None = PACK, split: str = "test", *overrides: str) -> pipeline.Pipeline:
    return pipeline.make(Path("exp.yaml"), list(overrides), Path("runs").resolve(), pack, "cedia-cpu", split)


def refusals(**given: str | None) -> list[str]:
    """Of the payload alone."""
    return [line for found in pipeline.check(make(**given)).values() for line in found.refusals]  # type: ignore[arg-type]


def test_three_runs_each_with_its_own_request_and_arguments(folder: Path, fake: FakeSlurm) -> None:
    links = make(split="validation", pack=f"{PACK} --split 60/40/0").links
    pack, train, evaluate = (link.plan for link in links)
    assert [plan.experiment.name for plan in (pack, train, evaluate)] == ["exp-pack", "exp", "exp-evaluate"]
    assert links[0].step is not None and links[2].step is not None and links[1].step is None
    assert links[0].step["arguments"][-4:] == ["--split", "60/40/0", "-o", str(folder / "scans.h5")]
    assert links[2].step["arguments"] == [str(train.run.path), "--split", "validation"]
    assert {link.step["folder"] for link in links if link.step} == {str(folder)}
    assert (pack.instance.name, evaluate.instance.name) == ("cedia-cpu", "cedia-a100-40gb")
    assert "#SBATCH --account=lab\n" in pack.script and "--gres" not in pack.script
    assert "#SBATCH --gres=gpu:a100:1\n" in evaluate.script and "#SBATCH --cpus-per-task=4\n" in evaluate.script


def test_evaluation_asks_for_the_share_of_one_task(folder: Path, fake: FakeSlurm) -> None:
    experiment("slurm", "cedia-a100-40gb-nodes", "nodes: 2, gpus: 4, cpus: 8, mem: 64GB, time: 1h")
    launch = make().links[-1].plan.experiment.launch
    assert (launch.nodes, launch.gpus, launch.tasks_per_node, launch.cpus, launch.mem) == (1, 1, 1, 2, 16)


@pytest.mark.parametrize(
    ("pack", "split", "words"),
    [
        (None, "test", "scans.h5 does not exist: say how to make it, --pack 'scans"),
        ("'scans", "test", "No closing quotation; quote it as in a shell"),
        (f"{PACK} -o other.h5", "test", "leave -o out; the file is data.file"),
        (f"{PACK} --output=other.h5", "test", "leave -o out"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    folder: Path, fake: FakeSlurm, pack: str | None, split: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        make(pack, split)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("pack", "split", "words"),
    [
        (["nowhere", "--labels", "scans/labels.csv"], "test", "nowhere does not exist"),
        (["scans", "--labels", "none.csv"], "test", "none.csv"),
        (["scans", "--labels", "few.csv"], "test", "no line names 's1'"),
        (["scans", "--labels", "scans/labels.csv"], "tset", "--split 'tset' is no split; use train, validation, test"),
        (["scans", "--labels", "scans/labels.csv", "--split", "80/20/0"], "test", "its own --split is 80/20/0"),
        (None, "test", "data.h5 has no such samples; it has train, validation"),
        (None, "validation", ""),
        (["scans", "--labels", "scans/labels.csv", "--split", "60/40/0"], "validation", ""),
        (["scans", "--labels", "split.csv", "--split", "60/40/0"], "test", ""),
    ],
)
def test_sources_table_and_split_are_looked_at_first(
    folder: Path, pack: list[str] | None, split: str, words: str
) -> None:
    Path("few.csv").write_text("id,label\ns0,a\n")
    lines = Path("scans/labels.csv").read_text().splitlines()
    Path("split.csv").write_text("\n".join([f"{lines[0]},split", f"{lines[1]},test", *(f"{x}," for x in lines[2:])]))
    data = folder / "data.h5"
    with VolumeWriter(data, shape=(1, 4, 4, 4), dtype="int16", num_samples=4, class_names=("a", "b")) as writer:
        for number, home in enumerate(("train", "train", "validation", "validation")):
            writer.add(np.zeros((1, 4, 4, 4), "int16"), number % 2, id=f"s{number}", split=home, scale=1.0)
    arguments = None if pack is None else [*pack, "-o", "scans.h5"]
    if words:
        with pytest.raises((UserError, ValueError)) as refusal:
            step.check(arguments, str(data), split)
        assert words in str(refusal.value) and "\n" not in str(refusal.value)
    else:
        told = "data.h5 is there: nothing is packed" if pack is None else "6 volumes to pack"
        assert told in step.check(arguments, str(data), split)


def test_the_payload_tells_in_one_line(folder: Path, fake: FakeSlurm) -> None:
    assert refusals(pack=f"{PACK} --labls x") == ["hpc pack: error: unrecognized arguments: --labls x"]
    assert refusals(split="tset") == ["--split 'tset' is no split; use train, validation, test"]
    assert refusals() == []


@pytest.fixture
def here(slurm_cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """This process talks to the cluster, which starts nothing meanwhile."""
    for key, value in slurm_cluster.environment().items():
        monkeypatch.setenv(key, value)
    slurm_cluster.run("scontrol", "update", "PartitionName=gpu", "State=DOWN")
    yield slurm_cluster
    slurm_cluster.run("scancel", "--me")
    slurm_cluster.run("scontrol", "update", "PartitionName=gpu", "State=UP")


@pytest.fixture
def wrapped(here: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script in place of sbatch: $real is the real one, $count how many calls there were before."""

    def wrap(text: str) -> None:
        head = f'#!/bin/sh\nreal={shutil.which("sbatch")}\necho x >> "{folder}/calls"\n'
        count = f'count=$(($(wc -l < "{folder}/calls") - 1))\n'
        (folder / "bin").mkdir()
        (folder / "bin" / "sbatch").write_text(head + count + text)
        (folder / "bin" / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")

    return wrap


def queued(here: Cluster) -> list[str]:
    return here.run("squeue", "--me", "--noheader", "--format=%k %r %E").stdout.splitlines()


@pytest.mark.slurm
def test_on_slurm_three_jobs_in_a_chain_the_first_one_released_last(here: Cluster) -> None:
    pack, train, evaluate = pipeline.submit(make())
    here.wait_for(lambda: here.job_field(pack[1], "Priority") != "0", 10, "the release")
    assert [here.job_field(job, "Comment") for _, job in (pack, train, evaluate)] == [
        run.name for run, _ in (pack, train, evaluate)
    ]
    assert here.job_field(train[1], "Dependency") == f"afterok:{pack[1]}(unfulfilled)"
    assert here.job_field(evaluate[1], "Dependency") == f"afterok:{train[1]}(unfulfilled)"
    assert {status.state for status in ledger.statuses(all_runs(Path("runs")))} == {"pending"}
    ledger.cancel_all([pack[0]])
    here.wait_for(lambda: not queued(here), 60, "the end of those that cannot start any more")


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ('[ $count -lt 2 ] || { echo "sbatch: error: no more" >&2; exit 1; }\nexec $real "$@"\n', "refused .*no more"),
        ('$real "$@"\nfor last; do :; done\n[ $count -lt 1 ] || rm -r "$(dirname "$last")"\n', "not submitted: "),
        ('$real "$@"\n[ $count -lt 1 ] || { kill -INT $PPID; sleep 5; }\n', "interrupted, nothing is submitted"),
    ],
    ids=["refused", "after the submission", "Ctrl-C"],
)
def test_whole_or_nothing(here: Cluster, wrapped: Callable[[str], None], trouble: str, words: str) -> None:
    wrapped(trouble)
    with pytest.raises(Refused, match=words) as refusal:
        pipeline.submit(make())
    assert "\n" not in str(refusal.value)
    assert not queued(here) and not Path("runs").exists()


@pytest.mark.slurm
def test_a_full_disk_leaves_nothing(here: Cluster, folder: Path) -> None:
    Path("runs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "none", "runs"], check=True)
    try:
        with pytest.raises(UserError, match="No space left on device"):
            pipeline.submit(make())
        assert not list(Path("runs").iterdir()) and not queued(here)
    finally:
        subprocess.run(["umount", "runs"], check=True)


def test_here_each_waits_for_the_one_before(folder: Path) -> None:
    experiment("local", "laptop", "cpus: 1, mem: 1GB")
    made = pipeline.submit(make())
    try:
        assert [status.state for status in ledger.statuses([run for run, _ in made])][1:] == ["pending", "pending"]
        waits = Path(f"/proc/{made[2][1]}/environ").read_bytes().decode().split("SUBMITIT_LOCAL_COMMAND=")[1]
        assert f"-m hpc.after {made[1][0].path} -- env bash {made[2][0].script}" in waits
    finally:
        for run, job in made:
            told = read_json(run.submit)
            if same_process(int(job), told["process_start"]):
                os.kill(int(job), signal.SIGTERM)
            os.waitpid(int(job), 0)


class RaisedAfter(StopFlag):
    """Raised once a file is there."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    @property
    def cause(self) -> str | None:
        return "SIGTERM" if self._file.exists() else None


@pytest.fixture
def running(folder: Path) -> Callable[[str], RunDir]:
    """A run whose step is a module of the working folder."""

    def running(text: str) -> RunDir:
        run = RunDir(folder / "runs" / "exp-pack-0000aaaa")
        Path("mine.py").write_text(text)
        write_text(run.step, yamlfile.dump({"module": "mine", "arguments": [3], "folder": str(folder)}))
        write_json(run.state, {"generation": 1, "phase": "starting"})
        return run

    return running


def test_a_step_whose_run_another_attempt_holds_ends_and_writes_nothing(
    running: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "_BEAT_S", 0.0)
    run = running("import time; time.sleep(60)")
    run.event("start", "shell", 2)
    write_json(run.state, {"generation": 2, "phase": "starting"})
    with pytest.raises(UserError, match="is held by generation 2, not by this 1"):
        step.run(run, StopFlag(), 1)
    assert read_json(run.state) == {"generation": 2, "phase": "starting"} and not run.result.exists()


@pytest.mark.parametrize(("code", "left"), [(0, 0), (1, 1), (2, 2), (9, 1)])
def test_a_step_leaves_with_its_commands_word(running: Callable[[str], RunDir], code: int, left: int) -> None:
    run = running(f"import sys; assert sys.argv[1] == '3'; sys.exit({code})")
    assert step.run(run, StopFlag(), 1) == left and run.result.exists() == (code == 0)
    assert read_json(run.state)["phase"] == "mine" and not run.stop.exists()


def test_a_step_is_seen_to_be_alive_as_long_as_its_command_runs(
    running: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "_BEAT_S", 0.0)
    run, began = running("import time; time.sleep(1)"), time.time()
    assert step.run(run, StopFlag(), 1) == 0
    assert read_json(run.state)["time"] > began + 0.5


def test_a_stopped_step_ends_its_command_and_starts_anew(running: Callable[[str], RunDir]) -> None:
    run = running("import time, pathlib; pathlib.Path('began').touch(); time.sleep(60)")
    assert step.run(run, RaisedAfter(Path("began")), 4) == 75
    assert read_json(run.stop) == {"generation": 4, "step": 0, "cause": "SIGTERM"} and not run.result.exists()


def test_a_step_that_ends_well_as_it_is_told_to_stop_is_done(running: Callable[[str], RunDir]) -> None:
    ignoring = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))"
    run = running(f"{ignoring}; pathlib.Path('began').touch(); time.sleep(60)")
    assert step.run(run, RaisedAfter(Path("began")), 1) == 0
    assert run.result.exists() and not run.stop.exists()
