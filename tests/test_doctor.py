"""hpc doctor: what is wrong with a machine, what to do, and no probe that waits for ever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc import doctor, fsprobe
from hpc.preempt import ExitCode
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    without_slurm(monkeypatch)


def only(lines: list[doctor.Line]) -> doctor.Line:
    (line,) = lines
    return line


def found(lines: list[doctor.Line], verdict: str) -> list[str]:
    return [line.words for line in lines if line.verdict == verdict]


def test_the_whole_report_here(tmp_path: Path) -> None:
    """As a user has it, twice: for people and for scripts."""
    environ = {**os.environ, "PATH": str(Path(sys.executable).parent), "HPC_INSTANCES": str(tmp_path)}
    command = [sys.executable, "-m", "hpc.cli", "doctor", "--runs", str(tmp_path / "runs")]
    done = subprocess.run([*command, "--json"], env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = json.loads(done.stdout)
    assert done.returncode == ExitCode.DONE and done.stderr == "", done.stderr
    names = list(dict.fromkeys(line["name"] for line in lines))
    assert names[:6] == ["Python", "packages", "torch", "CUDA", "GPUs", "Slurm"]
    folder = ["runs folder", "space", "speed", "locks", "HDF5"]
    assert names[6:] == [*folder, "instances", "variables", "payload", "limits", "programs"]
    assert all(set(line) == {"name", "verdict", "words", "remedy"} for line in lines)
    assert all(line["remedy"] for line in lines if line["verdict"] != "ok"), "what to do"
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    environ["HPC_ROOT"] = str(tmp_path)
    told = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == ExitCode.CRASH and told.stderr == ""
    assert "bad   payload " in told.stdout and "-> work inside a checkout, or set HPC_ROOT" in told.stdout


# Slurm.


def test_slurm_is_told_with_a_line_for_each_partition(fake: FakeSlurm) -> None:
    fake.configure(partitions=[{}, {"PartitionName": "old", "Default": "NO", "State": "DOWN"}])
    whole, gpu, old = doctor._slurm()
    assert whole.words.startswith("22.05.8, cluster fake, no accounting") and whole.verdict == "ok"
    assert gpu.verdict == "ok" and gpu.words.endswith("; 2 nodes") and "not preempted" in gpu.words
    assert old.verdict == "note" and old.words.endswith("it is DOWN") and old.remedy


def test_a_partition_whose_nodes_are_all_away_is_noted(fake: FakeSlurm) -> None:
    fake.configure(partitions=[{"Default": "NO"}], nodes=[{"State": "DOWN*"}])
    _, default, gpu = doctor._slurm()
    assert default.words == "no default partition" and default.remedy == "name one in launch.partition: gpu"
    assert gpu.verdict == "note" and "1 nodes, 1 of them away" in gpu.words


def test_no_slurm_is_no_fault_and_a_silent_controller_is(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.fails("scontrol", "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)")
    assert found(doctor._slurm(), "bad")[0].startswith("scontrol: slurm_load_ctl_conf error: Unable to contact")
    fake.fails("scontrol", "scontrol: fatal: Could not establish a configuration source")
    assert only(doctor._slurm()).words == "installed here, and part of no cluster"
    monkeypatch.setattr("hpc.slurm._TIMEOUT_S", 0.3)
    fake.hangs("scontrol")
    assert "no answer within 0.3 s" in found(doctor._slurm(), "bad")[0]
    monkeypatch.setenv("PATH", "/nowhere")
    assert only(doctor._slurm()).verdict == "note"


@pytest.mark.slurm
def test_a_real_cluster(slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in slurm_cluster.environment().items():
        monkeypatch.setenv(key, value)
    lines = doctor._slurm()
    assert len(lines) == 4 and found(lines, "bad") == []
    assert "cluster hpctest, no accounting" in lines[0].words and "GraceTime 8 + KillWait 5" in lines[2].words


# The file system.


def test_what_a_folder_can_do_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    facts = fsprobe.probe(tmp_path / "not" / "yet")
    assert facts["folder"] == str(tmp_path) and facts["locks"] is True
    assert facts["small_ms"] > 0 and facts["mb_per_s"] > 0 and facts["free_gb"] > 0
    assert not list(tmp_path.iterdir())


def test_the_longest_mount_that_holds_a_folder_counts(tmp_path: Path) -> None:
    own = tmp_path / "my data"
    own.mkdir()
    table = tmp_path / "mounts"
    table.write_text(f"x / ext4 rw 0 0\nfs:/a {tmp_path}/my\\040data nfs4 rw 0 0\nx {tmp_path}/my xfs rw 0 0\n")
    assert fsprobe.mounted(own, table) == ("nfs4", str(own))
    assert fsprobe.mounted(tmp_path, table) == ("ext4", "/")


def test_a_folder_that_cannot_be_written_is_bad() -> None:
    line = only(doctor._file_system(Path("/proc/self")))
    assert line.verdict == "bad" and "cannot be written" in line.words and "HPC_RUNS" in line.remedy
    assert only(doctor._hdf5(Path("/proc/self"))).verdict == "bad"


def test_a_file_system_that_hangs_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.001)
    line = only(doctor._file_system(tmp_path))
    assert line.verdict == "bad" and "no answer within 0.001 s" in line.words


FACTS = {"folder": "/data/x", "type": "lustre", "mount": "/data", "free_gb": 900, "free_inodes": 10**7}
FACTS |= {"small_ms": 2.0, "mb_per_s": 900.0, "locks": True}


@pytest.mark.parametrize(
    ("changed", "worse"),
    [
        ({}, []),
        ({"free_inodes": None}, []),
        ({"free_gb": 0.2}, [("space", "bad")]),
        ({"free_gb": 12}, [("space", "note")]),
        ({"free_inodes": 200}, [("space", "note")]),
        ({"small_ms": 900.0}, [("speed", "note")]),
        ({"mb_per_s": 3.0}, [("speed", "note")]),
        ({"locks": False}, [("locks", "note")]),
        ({"type": "xfs"}, [("runs folder", "note")]),
        ({"type": "tmpfs"}, [("runs folder", "note")]),
        ({"folder": "/tmp/x"}, [("runs folder", "note")]),
    ],
)
def test_facts_of_a_file_system_are_judged(
    changed: dict[str, object],
    worse: list[tuple[str, str]],
    tmp_path: Path,
    fake: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told by a probe of the same name on PYTHONPATH: no such file systems are here."""
    (tmp_path / "hpc").mkdir()
    (tmp_path / "hpc" / "__init__.py").write_text("")
    (tmp_path / "hpc" / "fsprobe.py").write_text(f"import json; print(json.dumps({FACTS | changed}))")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = doctor._file_system(Path("/data/x"))
    assert [(line.name, line.verdict) for line in lines if line.verdict != "ok"] == worse
    assert len(lines) == 4


# This Python and this shell.


def test_packages_are_compared_with_what_is_asked_for() -> None:
    assert doctor._package_fault("pytest>=1.0") is None
    assert doctor._package_fault('no-such-thing>=1; extra == "jobs"') == "no-such-thing is missing"
    assert "is older than 999.0" in str(doctor._package_fault("pytest>=999.0,<1000"))


def test_gpus_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    smi.write_text("#!/bin/sh\necho '0, NVIDIA A100-SXM4-40GB, 40960, 550.54.15'\n")
    smi.chmod(0o755)
    assert only(doctor._gpus()).words == "0: NVIDIA A100-SXM4-40GB, 40960 MiB, driver 550.54.15"
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n")
    assert found(doctor._gpus(), "bad") == ["Failed to initialize NVML: Driver/library version mismatch"]
    smi.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.3)
    assert found(doctor._gpus(), "bad") == ["nvidia-smi does not answer"]


def test_variables_that_are_mistyped_or_left_from_a_job_are_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"HPC_RUN": "x", "HPC_STEP": "local", "HPC_RUNS": "/r", "HPC_OF_THE_SITE": "1"}.items():
        monkeypatch.setenv(name, value)
    told = {line.words: (line.verdict, line.remedy) for line in doctor._variables() if line.name == "variables"}
    assert told == {
        "HPC_RUN=x is not known": ("note", "did you mean HPC_RUNS?"),
        "HPC_RUNS=/r": ("ok", ""),
        "HPC_STEP=local belongs to a job, not to a shell": ("note", "unset HPC_STEP"),
    }


def test_a_faulty_instance_is_bad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HPC_INSTANCES", str(tmp_path))
    assert only(doctor._instances()).verdict == "ok"
    (tmp_path / "mine.yaml").write_text("cpus: many\nmem_gb: 4\ntime_limit: 1h\n")
    assert "mine.yaml" in found(doctor._instances(), "bad")[0]


@pytest.mark.parametrize(
    ("command", "verdict", "words"),
    [
        ("umask 022; ulimit -n 4096", "ok", "umask 022, 4096 open files"),
        ("umask 077; ulimit -n 4096", "ok", "your group cannot read your runs"),
        ("umask 777; ulimit -n 4096", "bad", "umask 777"),
        ("umask 022; ulimit -n 200", "note", "200 open files"),
    ],
)
def test_limits_of_the_shell(command: str, verdict: str, words: str) -> None:
    code = "from hpc import doctor; (line,) = doctor._limits(); print(line.verdict, line.words)"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exec {sys.executable} -B -c '{code}'"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"{verdict} ") and words in done.stdout


@pytest.mark.parametrize(("present", "verdict"), [(["ssh", "rsync"], "ok"), (["ssh"], "note")])
def test_programs_for_the_sync(
    present: list[str], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in present:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(doctor._programs()).verdict == verdict
