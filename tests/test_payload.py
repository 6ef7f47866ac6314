"""The carried payload: which root is taken, what a child sees of it, and what a run's snapshot holds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpc import payload, plan
from hpc.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def checkout(folder: Path) -> Path:
    """A folder that has the three carried rooms."""
    for room in ("jobs", "models3d", "datasets"):
        (folder / room).mkdir(parents=True)
        (folder / room / "__init__.py").write_text("")
    return folder


@pytest.fixture(autouse=True)
def _no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPC_ROOT", raising=False)


def test_the_root_is_the_variable_then_the_nearest_parent_then_the_folder_beside_hpc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = checkout(tmp_path / "outer")
    inner = checkout(outer / "deep" / "inner")
    named = checkout(tmp_path / "named")
    work = inner / "experiments" / "mine"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    assert payload.root() == inner
    monkeypatch.chdir(outer / "deep")
    assert payload.root() == outer
    monkeypatch.setenv("HPC_ROOT", str(named))
    assert payload.root() == named
    monkeypatch.delenv("HPC_ROOT")
    monkeypatch.chdir("/")
    assert payload.root() == ROOT


def test_a_root_that_was_named_is_never_replaced_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=f"no jobs/__init__.py in HPC_ROOT={tmp_path}: work inside a checkout"):
        payload.root()


def test_a_folder_called_jobs_alone_is_no_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert payload.root() == ROOT


def test_a_child_imports_from_the_root_not_from_where_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    (work / "datasets").mkdir(parents=True)
    (work / "datasets" / "__init__.py").write_text("raise ImportError('not this one')")
    root = checkout(tmp_path / "root")
    (root / "jobs" / "tell.py").write_text(
        "import sys, datasets, jobs\nprint(datasets.__file__, sys.argv[1:], sys.stdin.read())\nsys.exit(5)\n"
    )
    monkeypatch.chdir(work)
    monkeypatch.setenv("HPC_ROOT", str(root))
    monkeypatch.setenv("PYTHONPATH", str(work))
    answer = payload.ask("jobs.tell", ["a b", "--x"], "text")
    assert answer.returncode == 5
    assert answer.stdout.strip() == f"{root}/datasets/__init__.py ['a b', '--x'] text"
    assert payload.child("jobs.tell", [], "") == 5


def test_a_child_that_was_killed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkout(tmp_path / "root")
    (root / "jobs" / "die.py").write_text("import os, sys\nos.kill(os.getpid(), int(sys.argv[1]))\n")
    monkeypatch.setenv("HPC_ROOT", str(root))
    assert payload.child("jobs.die", ["9"], "") == 137
    assert "jobs.die was killed by SIGKILL: most often the memory" in capsys.readouterr().err
    assert payload.child("jobs.die", ["15"], "") == 143


@pytest.mark.parametrize(("number", "group"), [("SIGINT", True), ("SIGTERM", False), ("SIGKILL", False)])
def test_a_stop_reaches_the_child_which_ends_its_own_work(tmp_path: Path, number: str, group: bool) -> None:
    root = checkout(tmp_path / "root")
    (root / "jobs" / "slow.py").write_text(
        "import signal, sys, time\n"
        "def end(*_): time.sleep(0.5); print('ended well', flush=True); sys.exit(7)\n"
        "signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    call = "import sys; from hpc import payload; sys.exit(payload.child('jobs.slow', []))"
    environ = {**os.environ, "HPC_ROOT": str(root), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", call]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (os.killpg if group else os.kill)(process.pid, signal.Signals[number])
        assert process.communicate(timeout=30)[0] == "ended well\n"
    code = {"SIGINT": -signal.SIGINT, "SIGTERM": 7, "SIGKILL": -signal.SIGKILL}[number]
    assert process.returncode == code  # SIGINT: a KeyboardInterrupt, which the command line answers


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_snapshot_holds_five_rooms_the_versions_the_commit_and_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkout(tmp_path / "root")
    cache = root / "jobs" / "__pycache__"
    cache.mkdir()
    (cache / "x.pyc").write_text("")
    (root / "jobs" / ".swp").write_text("")
    (root / "models3d" / "net.py").write_bytes(b"# caf\xc3\xa9\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "models3d" / "net.py").write_bytes(b"# caf\xe9\nchanged = True\n")
    monkeypatch.setenv("HPC_ROOT", str(root))
    target = tmp_path / "run" / "code"
    payload.snapshot(target)
    rooms = {"hpc", "slurm_templates", "jobs", "models3d", "datasets"}
    assert {path.name for path in target.iterdir()} == rooms | {"requirements.txt", "commit.txt", "changes.diff"}
    assert (target / "models3d" / "net.py").read_bytes() == b"# caf\xe9\nchanged = True\n"
    assert (target / "commit.txt").read_text() == git(root, "rev-parse", "HEAD")
    assert b"+# caf\xe9\n+changed = True" in (target / "changes.diff").read_bytes()
    assert "submitit==" in (target / "requirements.txt").read_text()
    assert (target / "slurm_templates" / "job.sbatch.j2").is_file() and (target / "hpc" / "logs").is_dir()
    assert not list(target.rglob("__pycache__")) and not list(target.rglob(".*"))


def test_without_git_a_snapshot_is_made_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_ROOT", str(checkout(tmp_path / "root")))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    payload.snapshot(tmp_path / "code")
    assert not (tmp_path / "code" / "commit.txt").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    payload.snapshot(tmp_path / "code2")
    assert (tmp_path / "code2" / "jobs").is_dir()


def test_a_snapshot_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this checkout, first on PYTHONPATH: the rooms come from the snapshot, hpc too."""
    monkeypatch.setenv("HPC_ROOT", str(ROOT))
    payload.snapshot(tmp_path / "code")
    rooms = ["hpc", "slurm_templates", "jobs", "models3d", "datasets"]
    text = f"import hpc.cli, importlib.util as u; print([u.find_spec(name).origin for name in {rooms}])"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "code")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", text], env=environ, capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.count(str(tmp_path / "code")) == 5


def test_a_model_of_ones_own_runs_from_its_copy(tmp_path: Path) -> None:
    nets = tmp_path / "my nets"
    nets.mkdir()
    (nets / "mine.py").write_text("from parts import width\n\n\nclass Net: ...\n")
    (nets / "parts.py").write_text("width = 2\n")
    text = "name: own\nmodel: {name: 'file:mine.py:Net', hidden: 4}\ndata: {file: scans.h5}\n"
    (nets / "own.yaml").write_text(text)
    run = plan.create(plan.make(nets / "own.yaml", [], tmp_path / "runs"))
    (nets / "mine.py").write_text("changed\n")
    experiment, _ = plan.reopen(run)
    assert experiment.model.source == (run.code / "own" / "mine.py", "Net")
    assert experiment.model.options == {"hidden": 4}
    assert "class Net" in (run.code / "own" / "mine.py").read_text()
    assert (run.code / "own" / "parts.py").exists()


def test_ctrl_c_while_a_command_imports_is_one_line(tmp_path: Path) -> None:
    """The first second of `hpc pack` is numpy and h5py; no traceback through them."""
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(payload.root())])}
    command = [sys.executable, "-m", "jobs.pack", "scans", "-o", "scans.h5"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "interrupted\n")
