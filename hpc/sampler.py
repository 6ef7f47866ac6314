"""What the job's processes on this node use, sampled by a thread of the training: usage/<generation>-<node>.json.

Cores and memory come from the job's cgroup where SLURM made one, else from the processes of the attempt. Memory is
what cannot be given back: anonymous and shared pages, not the page cache; in GB as a request has them (1000 of
SLURM's megabytes), of a GPU as it is sold (1024). A sample takes less than a thousandth of the time to the next one.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc import nvidia
from hpc.allocation import Allocation, node_name
from hpc.rundir import RunDir, write_json

WRITE_S = 30.0
"""Between two writes, and the span over which the busiest time is taken."""
_LEAST_S, _MOST_S = 2.0, 60.0
_GPU_S = 10.0
_COST = 1e-3
_NEAR = 0.9
"""Of the memory limit: from here on each new peak is written at once, for it may be the last word."""
_CLOSE_S = 2.0
_GB, _KB_PER_GB, _GPU_MB_PER_GB = 1000 * 2**20, 1000 * 2**10, 1024
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_GPU_FIELDS = ("index", "uuid", "utilization.gpu", "memory.used", "memory.total")

_LOG = logging.getLogger(__name__)


class Cgroup:
    """The cgroup of a SLURM job on this node (version 2, or 1 with its folder per controller)."""

    def __init__(self, cpu: Path, memory: Path) -> None:
        self._cpu, self._memory = cpu, memory
        self._v2 = (cpu / "cpu.stat").exists() and cpu == memory

    @staticmethod
    def of_job(own: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Cgroup | None:
        """The one that this process is in; None where the job has none, or not for both cores and memory."""
        paths: dict[str, str] = {}
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if job := re.match(r".*/job_\d+(?=/|$)", path):
                paths |= {name: job[0].lstrip("/") for name in controllers.split(",")}
        for cpu, memory in (
            (mount / "cpuacct" / paths.get("cpuacct", "?"), mount / "memory" / paths.get("memory", "?")),
            (mount / paths.get("", "?"),) * 2,
        ):
            group = Cgroup(cpu, memory)
            try:
                group.sample()
            except (OSError, KeyError, ValueError):
                continue
            return group
        return None

    def sample(self) -> tuple[float, float]:
        """CPU seconds since the job began, and GB in use now."""
        memory = _pairs(self._memory / "memory.stat")
        if self._v2:
            used = memory["anon"] + memory["shmem"]
            return _pairs(self._cpu / "cpu.stat")["usage_usec"] / 1e6, used / _GB
        used = memory["total_rss"] + memory.get("total_shmem", 0)
        return int((self._cpu / "cpuacct.usage").read_text()) / 1e9, used / _GB

    def limit_gb(self) -> float | None:
        """What the kernel kills the job at; None: no limit."""
        text = (self._memory / ("memory.max" if self._v2 else "memory.limit_in_bytes")).read_text().strip()
        return int(text) / _GB if text.isdecimal() and int(text) < 1 << 60 else None


def _pairs(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}


class Processes:
    """All processes on this node that carry this attempt's generation and port in their environment, and ourselves."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._mark = _mark(environ)
        self._ours: dict[int, bool] = {os.getpid(): True}
        self._last = self._seconds = 0.0

    def sample(self) -> tuple[float, float]:
        """CPU seconds, growing only, and GB in use now; pages that processes share count once in each."""
        there = {int(name) for name in os.listdir("/proc") if name.isdecimal()}  # noqa: PTH208  ten times faster
        self._ours = {pid: self._ours[pid] if pid in self._ours else self._is_ours(pid) for pid in there}
        seconds = memory = 0.0
        for pid in [pid for pid, ours in self._ours.items() if ours]:
            try:
                seconds += _cpu_seconds(pid)
                memory += _resident_gb(pid)
            except (OSError, ValueError, IndexError):  # it has just ended
                continue
        self._seconds += max(seconds - self._last, 0.0)  # less: a process has gone that nobody waited for
        self._last = seconds
        return self._seconds, memory

    def limit_gb(self) -> float | None:
        return None

    def _is_ours(self, pid: int) -> bool:
        try:
            text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        except OSError:
            return False
        environ = dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)
        return None not in self._mark and self._mark == _mark(environ)


def _mark(environ: Mapping[str, str]) -> tuple[str | None, ...]:
    """What the processes of an attempt have in common; several nodes may be one machine, and two attempts one node."""
    return environ.get("HPC_GENERATION"), environ.get("HPC_MASTER_PORT"), node_name(environ)


def _cpu_seconds(pid: int) -> float:
    """Its own and those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) * _TICK_S


def _resident_gb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    return sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", text, re.M))) / _KB_PER_GB


class Gpus:
    """Use of the job's GPUs on this node, asked of nvidia-smi."""

    def __init__(self) -> None:
        self._names = nvidia.visible()
        self._found: dict[str, dict[str, float]] = {}

    def sample(self) -> bool:
        """Whether there is something to sample. Raises nvidia.Silent."""
        rows = nvidia.pick(nvidia.query("gpu", _GPU_FIELDS, _MOST_S)[0], self._names)
        for row in rows:
            busy, used, total = (nvidia.number(row[key]) for key in _GPU_FIELDS[2:])
            entry = self._found.setdefault(row["index"], {"samples": 0, "busy_sum": 0.0, "peak_gb": 0.0})
            if busy is None or used is None or total is None:
                continue
            entry["samples"] += 1
            entry["busy_sum"] += busy / 100
            entry["peak_gb"] = max(entry["peak_gb"], round(used / _GPU_MB_PER_GB, 3))
            entry["total_gb"] = round(total / _GPU_MB_PER_GB, 3)
        return bool(rows)

    def told(self) -> list[dict[str, Any]]:
        """For each GPU: index, samples, busy (a share of the time), peak_gb, total_gb."""
        found = [(index, dict(entry)) for index, entry in list(self._found.items()) if entry["samples"]]
        return [
            {"gpu": index, "busy": round(entry.pop("busy_sum") / entry["samples"], 4), **entry}
            for index, entry in sorted(found)
        ]


class Sampler:
    """Samples from `start` to `close`; never stops the training, nor holds up its end by more than two seconds."""

    def __init__(self, run: RunDir, allocation: Allocation, asked: Mapping[str, float]) -> None:
        """`asked`: the request of the job, each node's share of it, as hpc.instances.Request names it."""
        self._path = run.usage / f"{allocation.generation:03d}-{allocation.node}.json"
        self._facts = {"generation": allocation.generation, "node": allocation.node, "asked": dict(asked)}
        self._source: Cgroup | Processes = Cgroup.of_job() or Processes()
        self._limit_gb = self._source.limit_gb() or asked.get("mem_gb")
        self._gpus = Gpus()
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._loop, daemon=True)]
        if asked.get("gpus") and nvidia.available():
            self._threads.append(threading.Thread(target=self._gpu_loop, daemon=True))
        self._refused = False
        self._samples, self._busiest, self._memory, self._peak, self._written_peak = 0, 0.0, 0.0, 0.0, 0.0

    def start(self) -> Sampler:
        self._cpu_before, self._memory = self._source.sample()
        self._started = self._window_start = self._written = time.monotonic()
        self._cpu = self._window_cpu = self._cpu_before
        for thread in self._threads:
            thread.start()
        return self

    def update(self) -> None:
        """Take a sample and write it."""
        with self._lock:
            self._sample()
            self._write(time.monotonic())

    def close(self) -> None:
        """The same for the last time."""
        self._closing.set()
        self._threads[0].join(_CLOSE_S)

    def _loop(self) -> None:
        pause = _LEAST_S
        while not self._closing.wait(pause):
            before, now = time.thread_time(), time.monotonic()
            with self._lock:
                self._sample()
                near = self._limit_gb and self._peak > max(self._written_peak, _NEAR * self._limit_gb)
                if near or self._samples == 1 or now - self._written >= WRITE_S:
                    self._write(now)
            pause = _pause(_LEAST_S, time.thread_time() - before)
        self.update()

    def _sample(self) -> None:
        try:
            self._cpu, self._memory = self._source.sample()
        except (OSError, KeyError, ValueError):  # the job's cgroup is being taken down
            return
        now = time.monotonic()
        self._samples += 1
        self._peak = max(self._peak, self._memory)
        if now - self._window_start >= WRITE_S:
            self._busiest = max(self._busiest, (self._cpu - self._window_cpu) / (now - self._window_start))
            self._window_start, self._window_cpu = now, self._cpu

    def _write(self, now: float) -> None:
        used = {
            "time": round(time.time(), 3),
            "seconds": round(now - self._started, 3),
            "samples": self._samples,
            "cpu_seconds": round(self._cpu - self._cpu_before, 3),
            "busiest_cores": round(self._busiest, 3) or None,
            "memory_gb": round(self._memory, 4),
            "memory_peak_gb": round(self._peak, 4),
            "memory_limit_gb": self._limit_gb,
            "gpus": self._gpus.told(),
        }
        self._written, self._written_peak = now, self._peak
        try:
            write_json(self._path, {**self._facts, **used})
            self._refused = False
        except OSError as error:
            if not self._refused:
                _LOG.warning("the use of this node is not recorded for now: %s", error)
            self._refused = True

    def _gpu_loop(self) -> None:
        pause = _LEAST_S
        while not self._closing.wait(pause):
            before = _children_s()
            try:
                if not self._gpus.sample():
                    return
            except (nvidia.Silent, OSError) as silence:
                _LOG.warning("the use of the GPUs is not sampled any more: %s", silence)
                return
            pause = _pause(_GPU_S, _children_s() - before)


def _pause(least_s: float, cost_s: float) -> float:
    """Seconds to the next sample, so that sampling takes its small share of a core."""
    return min(max(least_s, cost_s / _COST), _MOST_S)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
