"""The command line as a user types it: bad input is one clear line, exit code 2, and nothing is left half made."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest

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
    Row("not a NIfTI", "pack text.nii -o out.h5 --labels labels.csv", "text.nii is not a NIfTI file"),
    Row("one of many is no NIfTI", "pack mixed -o out.h5 --labels labels.csv", "mixed/s00.nii is not a NIfTI file"),
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


def hpc(folder: Path, command: str) -> Done:
    """`hpc COMMAND` in a folder, by the installed entry point."""
    temporary = folder / "tmp"
    before = set(folder.rglob("*"))
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HPC_", "SLURM_"))}
    environ |= {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
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
    shutil.copytree(scans, folder / "mixed")
    (folder / "mixed" / "s00.nii").write_text("hello\n")
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
