"""What the machine refuses is one line and exit code 1; commands on results take what every other takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.rundir import RunDir, write_json, write_text
from hpc.sweepdir import Chunk, SweepDir
from tests.test_cli import Done, hpc

EXPERIMENT = "name: exp\nmodel: {name: resnet3d_tiny}\ndata: {file: x.h5}\n"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run and a sweep of two rows, all finished."""
    (tmp_path / "tmp").mkdir()
    sweep = SweepDir(tmp_path / "runs" / "exp-sweep-0123abcd")
    names = ["exp-00000001", "exp-00000002"]
    for path in (tmp_path / "runs" / "exp-0000aaaa", *(sweep.path / name for name in names)):
        write_text(RunDir(path).experiment, EXPERIMENT)
        write_json(RunDir(path).result, {"monitor": "loss", "direction": "min", "best": {"metrics": {"loss": 0.5}}})
    sweep.rows_file.write_text("\n".join(names))
    sweep.write_chunks([Chunk(0, 0, 2)], axes={"train.seed": ["1", "2"]})
    return tmp_path


def one_line(done: Done, code: int, words: str) -> None:
    assert done.code == code and words in done.err and len(done.err.splitlines()) == 1, done.err


def test_what_the_machine_refuses_is_one_line(folder: Path) -> None:
    (folder / "file").touch()
    one_line(
        hpc(folder, "report -o file/x"), 2, "file/x/EXPERIMENTS.md: Not a directory; choose another folder with -o"
    )


def test_a_silent_slurm_is_one_line(folder: Path) -> None:
    code = "import hpc.cli as cli; from hpc.slurm import SlurmError\n"
    code += "def call(): raise SlurmError('squeue: no answer')\nraise SystemExit(cli._quiet(call)())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    one_line(Done(done.returncode, done.stdout, done.stderr, []), 1, "squeue: no answer (HPC_DEBUG=1 shows where)")
    done = subprocess.run(
        [sys.executable, "-c", code.replace("SlurmError('", "RuntimeError('")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1 and "Traceback" in done.stderr, "a fault of ours is not hidden"
    asked = {**os.environ, "HPC_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=asked)
    assert done.returncode == 1 and "Traceback" in done.stderr and "in call" in done.stderr, "on demand"


@pytest.mark.parametrize("command", ["show", "why", "evaluate", "fsck", "cancel"])
def test_a_name_of_300_letters_is_a_users_mistake(folder: Path, command: str) -> None:
    one_line(hpc(folder, f"{command} {'x' * 300}"), 2, "no run 'xxx")


def test_a_report_of_a_sweep_is_one_of_its_rows(folder: Path) -> None:
    done = hpc(folder, "report 0123abcd -o out")
    assert done.code == 0, done.err
    text = (folder / "out" / "EXPERIMENTS.md").read_text()
    assert "exp-00000001" in text and "exp-00000002" in text and "exp-0000aaaa" not in text


def test_what_concerns_one_run_says_so_of_a_sweep(folder: Path) -> None:
    one_line(hpc(folder, "fsck exp-sweep"), 2, "exp-sweep-0123abcd is a sweep: name one of its rows")


PREDICTIONS = {
    "predict scans -o out": "'scans' is no file, and no run either: no run 'scans' in",
    "predict exp-0000aaaa -o out": "which files does exp-0000aaaa predict?",
    "predict runs/exp-0000aaaa exp-sweep -o out": "which files does exp-0000aaaa predict?",
    "predict exp-0000aaaa x*.nii.gz -o out": "'x*.nii.gz' is no file, and no run either: no run",
    "predict here.nii.gz -o out": "which run predicts here.nii.gz? name it first",
}


def test_the_first_word_is_the_run_where_a_folder_has_its_name_too(folder: Path) -> None:
    (folder / "exp-0000aaaa").mkdir()
    one_line(hpc(folder, "predict exp-0000aaaa -o out"), 2, "which files does exp-0000aaaa predict?")


@pytest.mark.parametrize("command", PREDICTIONS)
def test_runs_and_files_are_told_apart(folder: Path, command: str) -> None:
    (folder / "here.nii.gz").touch()
    one_line(hpc(folder, command), 2, PREDICTIONS[command])


def test_a_damaged_sweep_hides_no_run_from_ls(folder: Path) -> None:
    (folder / "runs" / "exp-sweep-0123abcd" / "sweep.yaml").unlink()
    done = hpc(folder, "ls")
    assert done.code == 0 and "exp-0000aaaa" in done.out and "2 damaged" in done.out and done.err == ""
    done = hpc(folder, "ls exp-sweep", COLUMNS="200")
    assert done.code == 0 and done.out.count("sweep.yaml: no such file") == 2
    one_line(hpc(folder, "show exp-sweep"), 2, "sweep.yaml: no such file")


def test_the_benchmark_of_the_ledger_still_runs(tmp_path: Path) -> None:
    """Its stand-in for squeue speaks as the real one: the runs are seen in all three states."""
    code = (
        "import sys; from pathlib import Path; from tests.bench import ledger; ledger.make_runs(Path(sys.argv[1]), 12)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    (tmp_path / "tmp").mkdir()
    done = hpc(tmp_path, "ls --all", PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert done.code == 0 and done.err == "" and "lost" not in done.out
    for state in ("finished", "running", "pending"):
        assert done.out.count(state) == 4, done.out


def test_the_benchmark_of_loading_still_runs() -> None:
    command = [sys.executable, "-m", "tests.bench.data", "--small", "--rounds=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count("goal") >= 8, done.stderr
