"""The command line as a user types it: bad input is one clear line, exit code 2, and nothing is left half made."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest

from hpc import plan
from hpc.attempt import process_alive
from hpc.rundir import RunDir, write_json, write_text

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = """
name: tiny
model: {name: resnet3d_tiny}
data: {file: scans.h5, batch_size: 4}
launch: {instance: laptop, cluster: local, cpus: 1, mem: 1GB, time: 10min}
"""


@dataclass(frozen=True)
class Row:
    """A command that is refused, and words of the one line that says why."""

    name: str
    command: str
    words: str


REFUSED = [
    Row("missing data", "submit tiny.yaml data.file=no.h5", "no.h5 does not exist; make one with 'hpc pack"),
    Row("half-written HDF5", "submit tiny.yaml data.file=half.h5", "half.h5 is cut short or damaged: copy or pack"),
    Row(
        "unknown model",
        "submit tiny.yaml model.name=resnet3d_tny",
        "'resnet3d_tny' is not known; nearest: resnet3d_tiny",
    ),
    Row("number of classes", "submit tiny.yaml model.num_classes=5", "model.num_classes is 5, but"),
    Row("over the instance", "submit tiny.yaml launch.instance=cedia-a100-40gb launch.mem=65GB", "launch.mem: 65 GB"),
    Row(
        "batch and tasks",
        "submit tiny.yaml data.batch_size=3 launch.tasks_per_node=2 launch.cpus=2",
        "does not divide by 2",
    ),
    Row("unknown key", "submit tiny.yaml train.epoch=3", "train.epoch: no such key; did you mean 'epochs'?"),
    Row("no experiment", "submit away.yaml", "away.yaml: no such file"),
    Row("binary experiment", "plan scans.h5", "scans.h5: cannot be read"),
    Row(
        "not a NIfTI",
        "pack text.nii -o out.h5 --labels labels.csv",
        "labels.csv: no file is given for 's00' and 17 more",
    ),
    Row("label without a file", "pack scans -o out.h5 --labels more.csv", "no file is given for 'stranger'"),
    Row("file without a label", "pack scans -o out.h5 --labels few.csv", "no line names 's17'"),
    Row("no label table", "pack scans -o out.h5 --labels none.csv", "none.csv"),
    Row("no scans", "pack nowhere -o out.h5 --labels labels.csv", "nowhere"),
    Row("inspect a table", "inspect labels.csv", "labels.csv is not an HDF5 file; make one with 'hpc pack"),
    Row("inspect a half", "inspect half.h5", "half.h5 is cut short or damaged"),
    Row("unknown run", "show tiny", "no run 'tiny': "),
    Row("nothing to resume", "resume tiny", "start one with 'hpc submit EXPERIMENT.yaml'"),
]
PLANNED = Row("plan", "plan tiny.yaml data.batch_size=3 launch.tasks_per_node=2 launch.cpus=2", "does not divide by 2")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    made: list[str]
    """What the command left in its folder or in TMPDIR."""


def hpc(folder: Path, command: str, **more: str) -> Done:
    """`hpc COMMAND` in a folder, by the installed entry point."""
    temporary = folder / "tmp"
    before = set(folder.rglob("*"))
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HPC_", "SLURM_"))}
    environ |= {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), **more}
    done = subprocess.run(
        [str(BIN / "hpc"), *command.split()], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    made = sorted(str(path.relative_to(folder)) for path in set(folder.rglob("*")) - before)
    return Done(done.returncode, done.stdout, done.stderr, made)


def make_inputs(folder: Path) -> None:
    """18 small volumes in three classes, packed, and the faulty files of the table."""
    scans = folder / "scans"
    scans.mkdir()
    table = ["id,label"]
    for number in range(18):
        volume = np.random.default_rng(number).normal(100, 20, (8, 8, 8)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), scans / f"s{number:02d}.nii")
        table.append(f"s{number:02d},{'abc'[number % 3]}")
    for name, lines in (("labels", table), ("more", [*table, "stranger,a"]), ("few", table[:-1])):
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (folder / "text.nii").write_text("hello\n")
    (folder / "tiny.yaml").write_text(EXPERIMENT)
    (folder / "tmp").mkdir()
    packed = hpc(folder, "pack scans -o scans.h5 --labels labels.csv --split 50/30/20")
    assert packed.code == 0, packed.err
    whole = (folder / "scans.h5").read_bytes()
    (folder / "half.h5").write_bytes(whole[: len(whole) // 2])


@pytest.fixture(scope="session")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Done]]]:
    """Every row of the table, each in a copy of the folder, two at a time."""
    base = tmp_path_factory.mktemp("cli")
    stage = base / "stage"
    stage.mkdir()
    make_inputs(stage)

    def play(row: Row) -> Done:
        folder = base / row.name.replace(" ", "-")
        shutil.copytree(stage, folder)
        return hpc(folder, row.command)

    with ThreadPoolExecutor(2) as pool:
        yield {row.name: pool.submit(play, row) for row in [PLANNED, *REFUSED]}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("row", REFUSED, ids=[row.name for row in REFUSED])
def test_bad_input_is_one_line_and_exit_code_2_with_nothing_made(row: Row, refused: dict[str, Future[Done]]) -> None:
    done = refused[row.name].result()
    assert done.code == 2, f"hpc {row.command}: exit code {done.code}\n{done.err}"
    assert row.words in done.err and len(done.err.strip().splitlines()) == 1, done.err
    assert done.made == [], f"left behind: {done.made}"
    assert done.out == ""


def test_plan_prints_experiment_and_script_even_of_what_it_refuses(refused: dict[str, Future[Done]]) -> None:
    done = refused["plan"].result()
    assert done.code == 2 and done.made == []
    assert "batch_size: 3" in done.out and "#SBATCH --job-name=tiny\n" in done.out
    assert [line.split()[0] for line in done.err.strip().splitlines()] == ["ok", "refused"]
    assert PLANNED.words in done.err


@pytest.mark.parametrize("command", ["nosuch", "submit", "ls --runs", "pack", "submit a.yaml --nosuch"])
def test_bad_usage_is_exit_code_2_without_a_traceback(command: str, tmp_path: Path) -> None:
    done = hpc(tmp_path, command)
    assert done.code == 2 and done.err and "Traceback" not in done.err


def test_with_no_runs_the_way_on_is_named(tmp_path: Path) -> None:
    listed = hpc(tmp_path, "ls")
    assert (listed.code, listed.err) == (0, "") and "start one with 'hpc submit EXPERIMENT.yaml'" in listed.out
    assert json.loads(hpc(tmp_path, "ls --json").out) == []


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Four runs that have ended, one of them damaged, one with a long name."""
    runs = tmp_path / "runs"
    long = "a-name-of-some-length-for-a-run-that-is-listed-12345678"
    for name in ("tiny-0000aaaa", "tiny-0000bbbb", "tiny-0000cccc", long):
        run = RunDir(runs / name)
        write_text(run.experiment, "name: tiny\nmodel: {name: resnet3d_tiny}\ndata: {file: x.h5}\n")
        best = {"metrics": {"balanced_accuracy": 0.7917}}
        state = {"host": "h", "pid": 1, "phase": "ended", "time": 1.0, "step": 12340, "monitor": "balanced_accuracy"}
        write_json(run.state, {**state, "best": best, "reason": REASON})
    (runs / "tiny-0000bbbb" / "state.json").write_text('{"phase": ')
    return runs


REASON = "failed with exit code 1 [/odd] of extraordinary circumstances"


def test_a_damaged_run_is_listed_as_such_in_the_report_too(tmp_path: Path, runs: Path) -> None:
    listed = json.loads(hpc(tmp_path, "ls --json").out)
    assert {one["run"][-8:]: one["state"] for one in listed} == {
        "0000aaaa": "failed",
        "0000bbbb": "damaged",
        "0000cccc": "failed",
        "12345678": "failed",
    }
    done = hpc(tmp_path, "report -o journal")
    assert done.code == 0 and done.out.splitlines() == ["journal/EXPERIMENTS.md", "journal/index.html"]
    assert done.err.startswith("tiny-0000bbbb: state.json: damaged") and done.err.count("\n") == 1
    text = (tmp_path / "journal" / "EXPERIMENTS.md").read_text()
    assert "tiny-0000aaaa" in text and "; damaged |" in text.partition("| tiny-0000bbbb |")[2].partition("\n")[0]
    for command in ("resume 0000bbbb", "cancel 0000bbbb"):
        refused = hpc(tmp_path, command)
        assert refused.code == 2 and "state.json: damaged" in refused.err and "Traceback" not in refused.err
    assert not (runs / "tiny-0000bbbb" / "submit.json").exists()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 99, 100, 120, 200])
def test_the_list_has_a_line_for_each_run_at_any_width_and_whole_words(tmp_path: Path, runs: Path, width: int) -> None:
    head, *lines = hpc(tmp_path, "ls", COLUMNS=str(width)).out.splitlines()
    assert len(lines) == 4 and all(len(line) <= width for line in lines)
    titles = {"attempts", "job", "changed"}
    assert titles <= set(head.split()) if width == 200 else width >= 100 or not titles & set(head.split())
    if width < 40:
        return
    for line, name, state in zip(sorted(lines), sorted(path.name for path in runs.iterdir()), STATES, strict=True):
        assert line.split()[0].endswith(name[-8:]) and line.split()[1] == state
    for line in lines if width >= 80 else []:
        detail = line.rstrip()[line.rindex("failed") :] if "damaged" not in line else REASON
        assert detail == REASON or (detail.endswith("...") and len(detail) > 9 and REASON.startswith(detail[:-3]))
    assert width < 200 or any(line.rstrip().endswith(REASON) for line in lines)


STATES = ["failed", "failed", "damaged", "failed"]


def test_what_the_terminals_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    listed = hpc(tmp_path, "ls --runs ünruns", PYTHONIOENCODING="ascii")
    assert (listed.code, listed.err) == (0, "") and "\\xfcnruns; start one with" in listed.out


def test_resume_says_from_where_it_goes_on(tmp_path: Path, runs: Path) -> None:
    run = RunDir(runs / "tiny-0000aaaa")
    text = EXPERIMENT.replace("scans.h5", str(tmp_path / "scans.h5"))
    write_text(run.experiment, text)
    write_text(run.script, "exit 0\n")
    done = hpc(tmp_path, "resume 0000aaaa")
    assert done.code == 0 and done.out.endswith("(local)  from the start: it has no checkpoint yet\n"), done.err
    (run.checkpoints / "g001-s00000040").mkdir(parents=True)
    submitted = int(json.loads(run.submit.read_text())["job"])
    while process_alive(submitted):
        time.sleep(0.02)
    done = hpc(tmp_path, "resume 0000aaaa")
    assert done.code == 0 and done.out.endswith("(local)  goes on from checkpoint g001-s00000040\n"), done.err


# The run folder.


@pytest.fixture
def planned(tmp_path: Path) -> plan.Plan:
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    return plan.make(tmp_path / "tiny.yaml", [], tmp_path / "new" / "runs")


def test_equal_submissions_at_once_get_a_run_each(planned: plan.Plan) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(plan.create_next, planned).result()
    second, third = plan.create_next(planned), plan.create_next(planned)
    assert len({first.path, second.path, third.path}) == 3 and first.path == planned.run.path
    for run in (first, second, third):
        assert f"--comment={run.name}" in run.script.read_text()
    assert len(list(first.path.parent.iterdir())) == 3


def test_a_run_name_that_is_always_taken_ends_after_three_tries(
    planned: plan.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.create(planned)
    asked: list[Path] = []

    def late(runs: Path, name: str, resolved: object) -> RunDir:
        asked.append(runs)
        return planned.run

    monkeypatch.setattr(plan, "next_run", late)
    with pytest.raises(plan.Taken, match="made by another command just now"):
        plan.create_next(planned)
    assert len(asked) == 2 and [path.name for path in planned.run.path.parent.iterdir()] == [planned.run.name]


CREATE = """
import resource, sys
from pathlib import Path
from hpc import plan
from hpc.errors import UserError
planned = plan.make(Path("tiny.yaml"), [], Path(sys.argv[1]).absolute())
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    plan.create(planned)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(("folder", "limit"), [("new/runs", 5000), ("new/runs", 20), ("/proc", -1)])
def test_a_folder_that_takes_no_run_is_refused_in_one_line_with_nothing_left(
    tmp_path: Path, folder: str, limit: int
) -> None:
    """A limit of file sizes stops the copies as a full disk does; /proc takes no folder, not even of root."""
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    command = [sys.executable, "-c", CREATE, folder, str(limit)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(str(tmp_path / folder) + ": ") and done.stdout.count("\n") == 1
    assert ("File too large" if limit > 0 else "No such file") in done.stdout
    assert "choose one with --runs or HPC_RUNS" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_instances_lists_what_can_be_asked_for(tmp_path: Path) -> None:
    found = {one["name"]: one for one in json.loads(hpc(tmp_path, "instances --json").out)}
    cedia = found["cedia-a100-40gb"]
    assert (cedia["cpus"], cedia["mem_gb"], cedia["gpus"], cedia["gpu_mem_gb"]) == (12, 64, 1, 40)
    assert Path(cedia["file"]).is_file() and "laptop" in hpc(tmp_path, "instances").out


def test_env_prints_a_line_that_makes_the_rooms_importable(tmp_path: Path) -> None:
    line = hpc(tmp_path, "env").out
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = f'{line}\n"$0" -P -c "import datasets; print(datasets.__file__)"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(ROOT / "datasets" / "__init__.py")


def cpu_seconds(*command: str) -> float:
    pid = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_help_costs_little_more_than_the_library_that_prints_it() -> None:
    """A command of Typer that does nothing is the measure, so that a slow machine is slow for both."""
    bare = "import typer; app = typer.Typer(); app.command()(lambda: None); app(['--help'])"
    pairs = [(cpu_seconds(str(BIN / "hpc"), "--help"), cpu_seconds(sys.executable, "-c", bare)) for _ in range(4)]
    ours, theirs = (min(times) for times in zip(*pairs, strict=True))
    assert ours < 2 * theirs, f"hpc --help takes {ours:.2f} s of CPU, a bare one {theirs:.2f} s"
