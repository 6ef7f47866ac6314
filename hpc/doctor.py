"""Is this machine fit for the toolkit? Each probe answers in a line or some: what is found, what is wrong, what to do.

Every probe has a limit of time and what may hang runs in a process of its own; together they take as long as the
slowest, the import of torch.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from hpc import allocation, cluster, instances, nvidia, payload, slurm
from hpc.errors import UserError

_TIMEOUT_S = 15
_DISTRIBUTION = "hpc-batch"
_OLDEST = (3, 11)
_SETTINGS = ("HPC_ROOT", "HPC_RUNS", "HPC_INSTANCES")
_OF_A_JOB = ("HPC_STEP", "HPC_RANK", "HPC_WORLD_SIZE", "HPC_LOCAL_RANK", "HPC_GENERATION", "HPC_ARRAY_TASK_ID")
_OF_ONE_NODE = ("ext", "xfs", "btrfs", "tmpfs", "ramfs", "overlay", "f2fs", "zfs")
_FEW_FILES, _FILES_AT_ONCE = 10_000, 1024
_LOW_GB, _FULL_GB = 20, 1
_SLOW_MS, _SLOW_MB_S = 250, 20


@dataclass(frozen=True)
class Line:
    """One finding; `remedy` says what to do about a note or a fault."""

    name: str
    verdict: Literal["ok", "note", "bad"]
    words: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class _Silent(RuntimeError):
    """A child that gave no answer in time, or none that can be read."""


def examine(runs: Path) -> list[Line]:
    """All probes, side by side; in the order of the report."""
    probes: list[Callable[[], list[Line]]] = [
        _python,
        _packages,
        _torch,
        _gpus,
        _slurm,
        lambda: _file_system(runs),
        lambda: _hdf5(runs),
        _instances,
        _variables,
        _limits,
        _programs,
    ]
    with ThreadPoolExecutor(len(probes)) as pool:
        return [line for lines in pool.map(lambda probe: probe(), probes) for line in lines]


def _python() -> list[Line]:
    version = ".".join(map(str, sys.version_info[:3]))
    where = f"{version}, {sys.executable}"
    if sys.version_info < _OLDEST:
        return [Line("Python", "bad", where, f"make a venv with Python {'.'.join(map(str, _OLDEST))} or newer")]
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        return [Line("Python", "note", f"{where}, in no venv", "a venv keeps its packages from changing under a run")]
    return [Line("Python", "ok", where)]


def _packages() -> list[Line]:
    """What pyproject.toml asks for; a login node can do without what only jobs need."""
    try:
        wanted = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [Line("packages", "note", "hpc runs from a checkout that is not installed", "pip install -e '.[jobs]'")]
    launcher = [line for line in wanted if "extra ==" not in line]
    jobs = [line for line in wanted if '"jobs"' in line]
    bad = list(filter(None, map(_package_fault, launcher)))
    old = list(filter(None, map(_package_fault, jobs)))
    if bad:
        return [Line("packages", "bad", ", ".join(bad + old), "'make setup', or pip install -e '.[jobs]'")]
    if old:
        remedy = "a job needs them where it runs, plan to check models: 'make setup', or pip install -e '.[jobs]'"
        return [Line("packages", "note", ", ".join(old), remedy)]
    return [Line("packages", "ok", f"all {len(launcher + jobs)} that the launcher and jobs need")]


def _package_fault(requirement: str) -> str | None:
    """`torch is missing`, `torch 2.9.0 is older than 2.10`, or None."""
    name = re.split(r"[^\w.-]", requirement)[0]
    least = re.search(r">=([\d.]+)", requirement)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is missing"
    if least and _numbers(version) < _numbers(least[1]):
        return f"{name} {version} is older than {least[1]}"
    return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]


def _torch() -> list[Line]:
    """In a child: hpc imports no torch."""
    try:
        facts = _payload("torch")
    except _Silent as silence:
        remedy = "jobs need it, and plan checks models with it: 'make setup'"
        return [Line("torch", "note" if "No module named 'torch'" in str(silence) else "bad", str(silence), remedy)]
    lines = [Line("torch", "ok", facts["torch"])]
    if facts["cuda"]:
        seen = f"{len(facts['gpus'])} GPUs seen here" if facts["gpus"] else "no GPU seen here"
        lines.append(Line("CUDA", "ok", f"torch is built for CUDA {facts['cuda']} and NCCL {facts['nccl']}; {seen}"))
    else:
        lines.append(Line("CUDA", "note", "this torch is built without CUDA", "a job on a GPU needs a CUDA build"))
    if "error" in facts:
        lines.append(Line("CUDA", "bad", facts["error"], "compare the driver in nvidia-smi with torch's CUDA"))
    return lines


def _gpus() -> list[Line]:
    if not nvidia.available():
        return [Line("GPUs", "ok", "none here: no nvidia-smi (a login node has none)")]
    fields = ("index", "name", "memory.total", "driver_version")
    try:
        found, complaint = nvidia.query("gpu", fields, _TIMEOUT_S)
    except (nvidia.Silent, OSError) as error:
        return [Line("GPUs", "bad", str(error), "the driver of this node hangs: tell its admins")]
    lines = [
        Line("GPUs", "ok", f"{gpu['index']}: {gpu['name']}, {gpu['memory.total']} MiB, driver {gpu['driver_version']}")
        for gpu in found
    ]
    return lines + ([Line("GPUs", "bad", complaint, "nvidia-smi says more")] if complaint or not found else [])


def _slurm() -> list[Line]:
    if shutil.which("sbatch") is None:
        return [Line("Slurm", "note", "no sbatch on PATH", "runs are local here; on a cluster load its slurm module")]
    try:
        live = cluster.Cluster.look()
    except slurm.SlurmError as error:
        if slurm.NOT_SET_UP.search(str(error)):
            words = "installed here, and part of no cluster"
            return [Line("Slurm", "note", words, "runs are local here; for a cluster its slurm.conf must be found")]
        return [Line("Slurm", "bad", str(error), "'scontrol ping' tells which controller is asked")]
    settings = live.settings
    accounting = "accounting" if settings.accounting else "no accounting (why and ls ask squeue and the run folder)"
    array = f"arrays of {settings.max_array_size}"
    lines = [Line("Slurm", "ok", f"{settings.version}, cluster {settings.name}, {accounting}, {array}")]
    if not live.default:
        names = ", ".join(live.partitions)
        lines.append(Line("Slurm", "note", "no default partition", f"name one in launch.partition: {names}"))
    return lines + [_partition(live, name) for name, one in live.partitions.items() if not one.hidden]


def _partition(live: cluster.Cluster, name: str) -> Line:
    nodes = live.nodes_of(name)
    away = sum(node.away is not None for node in nodes)
    words = live.preemption(name) + f"; {len(nodes)} nodes" + (f", {away} of them away" if away else "")
    state = live.partitions[name].state
    if state != "UP" or (nodes and away == len(nodes)):
        return Line("Slurm", "note", f"{words}; it is {state}", "'sinfo -R' tells why nodes are away")
    return Line("Slurm", "ok", words)


def _file_system(runs: Path) -> list[Line]:
    name, elsewhere = "runs folder", "choose another with --runs or HPC_RUNS"
    try:
        facts = _child(["-m", "hpc.fsprobe", str(runs)], dict(os.environ))
    except _Silent as silence:
        return [Line(name, "bad", f"{runs}: {silence}", f"its file server hangs; wait, or {elsewhere}")]
    where = f"{runs}: {facts['type']} at {facts['mount']}"
    if "error" in facts:
        return [Line(name, "bad", f"{where}: cannot be written ({facts['error']})", elsewhere)]
    lines = [_space(facts), _speed(facts)]
    if not facts["locks"]:
        remedy = "two jobs that start on one run at once are told apart less surely; mount it with flock"
        lines.append(Line("locks", "note", "this file system has no locks between processes", remedy))
    else:
        lines.append(Line("locks", "ok", "a lock keeps a second process out"))
    return [_place(facts, where, elsewhere), *lines]


def _place(facts: dict[str, Any], where: str, elsewhere: str) -> Line:
    """Whether compute nodes would see the folder; only a guess by type."""
    temporary = facts["type"] in ("tmpfs", "ramfs") or Path(facts["folder"]).is_relative_to("/tmp")
    if temporary:
        return Line("runs folder", "note", f"{where}: what is temporary is lost", elsewhere)
    if shutil.which("sbatch") and facts["type"].startswith(_OF_ONE_NODE):
        remedy = f"compute nodes must see the same folder: {elsewhere}"
        return Line("runs folder", "note", f"{where}: looks like a disk of this node alone", remedy)
    return Line("runs folder", "ok", where)


def _space(facts: dict[str, Any]) -> Line:
    free, files = facts["free_gb"], facts["free_inodes"]
    words = f"{free:.0f} GB free" + (f", {files:,} files" if files is not None else "")
    if free < _FULL_GB:
        return Line("space", "bad", words, "remove checkpoints of old runs")
    if free < _LOW_GB or (files is not None and files < _FEW_FILES):
        return Line("space", "note", words, "remove checkpoints of old runs; a quota may allow less still")
    return Line("space", "ok", words)


def _speed(facts: dict[str, Any]) -> Line:
    words = f"a small file is safe in {facts['small_ms']:g} ms, a large one at {facts['mb_per_s']:g} MB/s"
    if facts["small_ms"] > _SLOW_MS or facts["mb_per_s"] < _SLOW_MB_S:
        return Line("speed", "note", words, "checkpoints will be slow: try the scratch file system")
    return Line("speed", "ok", words)


def _hdf5(runs: Path) -> list[Line]:
    there = next(path for path in (runs, *runs.parents) if path.is_dir())
    try:
        facts = _payload("hdf5", str(there))
    except _Silent as silence:
        remedy = "jobs read their data with it: 'make setup'"
        return [Line("HDF5", "note" if "No module named 'h5py'" in str(silence) else "bad", str(silence), remedy)]
    words = f"{facts['hdf5']} (h5py {facts['h5py']})"
    if "error" in facts:
        return [
            Line("HDF5", "bad", f"{words}: {facts['error']}", "export HDF5_USE_FILE_LOCKING=FALSE, or another folder")
        ]
    return [Line("HDF5", "ok", f"{words} writes and reads there")]


def _instances() -> list[Line]:
    known, faults = instances.names(), []
    for name in known:
        try:
            instances.find(name)
        except UserError as error:
            faults += str(error).splitlines()
    own = instances.folders()[0]
    mine = sum(path.parent == own for path in known.values())
    words = f"{len(known)}, {mine} of them your own in {own}"
    remedy = "'hpc instances --discover' describes this cluster's"
    bad = [Line("instances", "bad", fault, "correct the file, or move it away") for fault in faults]
    return bad or [Line("instances", "ok", words) if mine else Line("instances", "ok", words, remedy)]


def _variables() -> list[Line]:
    lines = []
    for name, value in sorted(os.environ.items()):
        near = get_close_matches(name, _SETTINGS, 1, 0.8)
        if name in _OF_A_JOB and allocation.job_id() is None:
            lines.append(Line("variables", "note", f"{name}={value} belongs to a job, not to a shell", f"unset {name}"))
        elif name not in _SETTINGS and near:
            lines.append(Line("variables", "note", f"{name}={value} is not known", f"did you mean {near[0]}?"))
        elif name in _SETTINGS:
            lines.append(Line("variables", "ok", f"{name}={value}"))
    try:
        lines.append(Line("payload", "ok", f"jobs, models3d and datasets come from {payload.root()}"))
    except UserError as error:
        lines.append(Line("payload", "bad", str(error), "work inside a checkout, or set HPC_ROOT to one"))
    return lines


def _limits() -> list[Line]:
    shown = re.search(r"Umask:\s*(\d+)", Path("/proc/self/status").read_text())
    mask = int(shown[1], 8) if shown else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = f"umask {mask:03o}, {soft} open files at once (ulimit -n)"
    if mask & 0o700:
        return [Line("limits", "bad", words, "you could not read what you write: umask 022")]
    if soft < _FILES_AT_ONCE and soft != resource.RLIM_INFINITY:
        return [Line("limits", "note", words, f"ulimit -n {min(hard, 4096) if hard > 0 else 4096}: loaders open many")]
    if mask & 0o070 == 0o070:
        return [Line("limits", "ok", f"{words}; your group cannot read your runs")]
    return [Line("limits", "ok", words)]


def _programs() -> list[Line]:
    """What brings logs home."""
    missing = [name for name in ("ssh", "rsync") if shutil.which(name) is None]
    if missing:
        remedy = "they bring logs home; install them, or fetch the runs from the other end"
        return [Line("programs", "note", f"no {' and no '.join(missing)} on PATH", remedy)]
    return [Line("programs", "ok", "ssh and rsync are here, to bring logs home")]


def _payload(*arguments: str) -> dict[str, Any]:
    """Facts of jobs.machine. Raises _Silent."""
    try:
        root = payload.root()
    except UserError as error:
        raise _Silent(str(error)) from None
    return _child(["-m", "jobs.machine", *arguments], payload.environment(root))


def _child(arguments: Sequence[str], environ: dict[str, str]) -> dict[str, Any]:
    """The JSON that a Python of ours prints. Raises _Silent; one that hangs in the kernel is left behind."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    try:
        out, err = process.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise _Silent(f"no answer within {_TIMEOUT_S} s") from None
    if process.returncode:
        raise _Silent((err.strip().splitlines() or [f"left with exit code {process.returncode}"])[-1])
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts
