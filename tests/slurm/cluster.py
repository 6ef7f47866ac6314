"""A real SLURM cluster of two nodes with faked A100s on this machine: `sudo python tests/slurm/cluster.py --shell`.

For tests it is the session fixture `slurm_cluster` (tests/conftest.py). By hand, `--shell` prints the line to export
and keeps the cluster until Ctrl-C or the end of its input; `--reap` stops what a killed session left behind.

One slurmctld, two slurmd (`-N node0`, `-N node1`), and a munged of its own unless one answers already. No accounting
database. Everything lives in one temporary folder, on free ports; each daemon leads its own session and is stopped by
its own pid. The nodes' names resolve for jobs (a private mount of /etc/hosts around each slurmd), as on a real cluster.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import Template
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

PREFIX = "slurm-cluster-"
NODES = ("node0", "node1")
CPUS = 12
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "unmunge", "unshare")
CONF = Path(__file__).with_name("slurm.conf.in")
SBIN = "/usr/sbin:/sbin"
# Mounts a hosts file of its own over /etc/hosts, seen by this slurmd and its jobs only, then becomes slurmd.
IN_NODE = ("unshare", "--mount", "--propagation", "slave", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"')


class ClusterError(RuntimeError):
    """The cluster did not do what it was asked; the message ends with the tails of queue and logs."""


def obstacle() -> str | None:
    """Says in a few words why no cluster can be started here and what helps; None when one can be started."""
    if os.geteuid() != 0:
        return "not root; run this as root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"not installed: {', '.join(missing)}; install with: sudo sh tests/slurm/install.sh" if missing else None


class Cluster:
    """A running SLURM of two nodes (12 CPUs, 64000 MB, gpu:a100:1 each), to be used as a context manager.

    Partitions: `gpu` (default; GraceTime 0), `grace` (GraceTime 8) and `high`, whose jobs displace those of both.

    Args:
        job_requeue: slurm.conf's JobRequeue; with 0 a job must ask for `--requeue`.
        preempt_mode: what happens to displaced jobs, "REQUEUE" or "CANCEL".
        kill_wait: seconds between SIGTERM and SIGKILL.
        extra: further lines for slurm.conf; one that repeats a key of the template wins.
    """

    def __init__(
        self, *, job_requeue: int = 1, preempt_mode: str = "REQUEUE", kill_wait: int = 5, extra: Sequence[str] = ()
    ) -> None:
        self.settings = {"job_requeue": job_requeue, "preempt_mode": preempt_mode, "kill_wait": kill_wait}
        self.extra = tuple(extra)
        self.folder = Path()
        self.ports: dict[str, int] = {}
        self.borrowed_munge = False
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.start_seconds = 0.0

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Starts all daemons and returns when both nodes are idle and a job step has answered; cleans up if it fails.

        Raises:
            ClusterError: when it cannot start here, or does not answer in time; with the tails of the logs.
        """
        if reason := obstacle():
            raise ClusterError(f"no SLURM cluster can be started here: {reason}")
        began = time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            (self.folder / "owner").write_text(f"{os.getpid()} {_start_time(os.getpid())}\n")
            self._write_configuration()
            for name in self._commands():
                self.launch(name)
            self.wait_for(self._answers, 30, "two idle nodes and an answer from srun")
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - began
        return self

    def stop(self) -> None:
        """Kills the daemons and every process of their jobs, and removes the folder. A second call does nothing."""
        for process in self.daemons.values():
            _kill_child(process)
        self.daemons.clear()
        if self.folder != Path():
            _sweep(self.folder)
            self.folder = Path()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def launch(self, name: str) -> None:
        """Starts the daemon `munged`, `slurmctld`, `node0` or `node1`; again, if it was killed by a test."""
        if name in self.daemons:
            _kill_child(self.daemons[name])
        with (self.folder / "log" / f"{name}.err").open("ab") as err:
            self.daemons[name] = subprocess.Popen(
                self._commands()[name],
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=err,
                stderr=err,
                start_new_session=True,
            )
        with (self.folder / "pids").open("a") as pids:
            pids.write(f"{self.daemons[name].pid}\n")
        # Slurm's programs sleep a whole second when slurmctld does not listen yet: worth the wait.
        if name == "munged":
            self.wait_for(lambda: _munge_answers(self._own_munge), 10, "munged")
        if name == "slurmctld":
            self.wait_for(lambda: _listens(self.ports["slurmctld_port"]), 10, "slurmctld")

    # -- use --------------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """The environment in which commands reach this cluster and no other: ours without SLURM's, with SLURM_CONF."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SCANCEL_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def run(
        self, *command: str | Path, cwd: Path | None = None, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command against this cluster and returns it with its texts.

        Raises:
            ClusterError: when it fails (unless check is False), with both its outputs.
            subprocess.TimeoutExpired: after `timeout` seconds.
        """
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment(),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise ClusterError(f"{command[0]} left with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def submit(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """Runs sbatch with these arguments and returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd).stdout.strip()

    def job_field(self, job_id: str, name: str) -> str:
        """One field of `scontrol show job`, for example JobState, Restarts, Reason or NodeList.

        Raises:
            ClusterError: when SLURM knows no such job, or the job no such field.
        """
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout
        for word in shown.splitlines()[0].split():
            key, _, value = word.partition("=")
            if key == name:
                return value
        raise ClusterError(f"scontrol shows no {name} of job {job_id}: {shown}")

    def state(self, job_id: str) -> str:
        """The job's state in SLURM's words: PENDING, RUNNING, COMPLETING, COMPLETED, CANCELLED, ..."""
        return self.job_field(job_id, "JobState")

    def wait_for(self, predicate: Callable[[], T], timeout: float, what: str) -> T:
        """Asks `predicate` every 50 ms until it answers something true, and returns that.

        Raises:
            ClusterError: after `timeout` seconds, with squeue and the tails of the daemons' logs.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if answer := predicate():
                return answer
            time.sleep(0.05)
        raise ClusterError(f"waited {timeout} s in vain for {what}\n{self.evidence()}")

    def wait_state(self, job_id: str, state: str, timeout: float = 30) -> None:
        """Waits until the job is in this state."""
        self.wait_for(lambda: self.state(job_id) == state, timeout, f"job {job_id} to be {state}")

    def preempt(self, target: str, seconds: float = 1) -> str:
        """Displaces a running job (or all jobs of a node, by its name) and returns the id of the job that does it.

        The displacing job asks `high` for all CPUs of the target's nodes, and holds them for so many seconds.
        """
        nodes, count = (target, 1)
        if target not in NODES:
            nodes, count = self.job_field(target, "NodeList"), int(self.job_field(target, "NumNodes"))
        whole = (f"--nodes={count}", "--ntasks-per-node=1", f"--cpus-per-task={CPUS}", "--mem=100M")
        names = ("--partition=high", "--job-name=displacer", "--output=/dev/null", f"--wrap=sleep {seconds}")
        return self.submit(*names, *whole, f"--nodelist={nodes}")

    def release(self, job_id: str) -> None:
        """Lets a requeued job, which SLURM makes wait 120 s in BeginTime, start; waits for it to be PENDING first.

        Not at once: a start in the same second as the end of the last run fails with "Job credential revoked",
        and the job is lost (22.05; credentials are compared by whole seconds).
        """
        self.wait_state(job_id, "PENDING")
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+1")

    def evidence(self, lines: int = 25) -> str:
        """What to read when something went wrong: squeue and the ends of all logs."""
        parts = []
        if self.daemons.get("slurmctld"):
            queue = self.run("timeout", "5", "squeue", "--all", "--long", check=False)
            parts.append(f"--- squeue\n{queue.stdout}{queue.stderr}")
        logs = sorted((self.folder / "log").iterdir())
        for log in logs:
            if log.suffix == ".err" and log.with_suffix(".log") in logs:
                continue  # it repeats the log
            if tail := log.read_text(errors="replace").splitlines()[-lines:]:
                parts.append(f"--- {log.name}\n" + "\n".join(tail))
        return "\n".join(parts)

    # -- inside -----------------------------------------------------------------------------------------------------

    @property
    def _own_munge(self) -> Path:
        return self.folder / "run" / "munge.socket"

    def _write_configuration(self) -> None:
        for name in ("state", "run", "log", "spool", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir()
        self.borrowed_munge = _munge_answers()
        self.ports = dict(zip(("slurmctld_port", "node0_port", "node1_port"), _free_ports(3), strict=True))
        host = socket.gethostname().split(".")[0]
        text = Template(CONF.read_text()).substitute(self.settings, folder=self.folder, host=host, **self.ports)
        lines = [] if self.borrowed_munge else [f"AuthInfo=socket={self._own_munge}"]
        (self.folder / "slurm.conf").write_text("\n".join([text, *lines, *self.extra, ""]))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\n")
        (self.folder / "gres.conf").write_text("".join(self._fake_gpu(node) for node in NODES))
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + f"\n127.0.0.1 {' '.join(NODES)}\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _fake_gpu(self, node: str) -> str:
        device = self.folder / f"{node}-gpu0"
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # /dev/null's numbers: SLURM wants a device
        return f"NodeName={node} Name=gpu Type=a100 File={device}\n"

    def _commands(self) -> dict[str, list[str]]:
        """The command of each daemon, in the order of their start."""
        conf = str(self.folder / "slurm.conf")
        run, key = self.folder / "run", self.folder / "munge.key"
        names = {"socket": self._own_munge, "key-file": key, "pid-file": run / "munged.pid"}
        names |= {"seed-file": run / "munged.seed", "log-file": self.folder / "log" / "munged.log"}
        munged = ["munged", "--foreground", "--force", *(f"--{option}={path}" for option, path in names.items())]
        commands = {} if self.borrowed_munge else {"munged": munged}
        commands["slurmctld"] = ["slurmctld", "-D", "-f", conf]
        for node in NODES:
            commands[node] = [*IN_NODE, str(self.folder / "hosts"), "slurmd", "-D", "-f", conf, "-N", node]
        return commands

    def _answers(self) -> bool:
        for name, process in self.daemons.items():
            if process.poll() is not None:
                raise ClusterError(f"{name} ended with {process.returncode} at start\n{self.evidence()}")
        states = self.run("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%t", check=False).stdout.split()
        if states != ["idle"] * len(NODES):
            return False
        return self.run("srun", "--ntasks=1", "true", check=False).returncode == 0


def reap() -> list[Path]:
    """Stops the clusters of sessions that are no more, and returns the folders it removed."""
    found = [folder for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if not _owner_lives(folder)]
    for folder in found:
        _sweep(folder)
    return found


def _owner_lives(folder: Path) -> bool:
    try:
        pid, started = (folder / "owner").read_text().split()
    except (OSError, ValueError):
        # Being made by another session just now, unless it is old.
        return time.time() - folder.stat().st_mtime < 60
    return _start_time(int(pid)) == started


def _sweep(folder: Path) -> None:
    """Kills by pid all that belongs to the cluster in this folder, daemons first, and removes the folder."""
    pids = folder / "pids"
    for line in pids.read_text().splitlines() if pids.exists() else []:
        if str(folder).encode() in _proc(int(line), "cmdline"):
            _kill(int(line))
    while left := list(_descendants(folder)):
        for pid in left:
            _kill(pid)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


def _descendants(folder: Path) -> Iterator[int]:
    """Living processes of the cluster: its daemons' children (by name), and those of its jobs (by SLURM_JOB_ID)."""
    ours = f"SLURM_CONF={folder}/slurm.conf".encode()
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        variables = _proc(pid, "environ").split(b"\0")  # empty for a zombie
        if ours not in variables or pid == os.getpid():
            continue
        if _proc(pid, "comm").startswith(b"slurm") or any(v.startswith(b"SLURM_JOB_ID=") for v in variables):
            yield pid


def _proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _start_time(pid: int) -> str:
    """Field 22 of /proc/PID/stat: with the pid it names a process for good. Empty when there is none."""
    fields = _proc(pid, "stat").rpartition(b")")[2].split()
    return fields[19].decode() if fields else ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _kill_child(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _munge_answers(own: Path | None = None) -> bool:
    """Whether a munged (the system's, or the one at this socket) makes and reads credentials."""
    at = f"--socket={own}" if own else ""
    command = f"munge -n {at} | unmunge {at}"
    return subprocess.run(["sh", "-c", command], capture_output=True, env={"PATH": _path()}).returncode == 0


def _free_ports(count: int) -> list[int]:
    """Ports on which nobody listens, below the range that the kernel gives to outgoing connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(17000, 32000), 1000):
        if not _listens(port):
            found.append(port)
        if len(found) == count:
            return found
    raise ClusterError("no free ports between 17000 and 32000")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _path() -> str:
    """PATH with the folders of the daemons, which are root's and not always in it."""
    return f"{os.environ.get('PATH', os.defpath)}:{SBIN}"


def _shell() -> None:
    with Cluster() as cluster:
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf")
        print(f"Up in {cluster.start_seconds:.1f} s; Ctrl-C or the end of the input stops it.", flush=True)
        sys.stdin.read()


def main() -> int:
    """The developer's commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--shell", action="store_true", help="start a cluster and keep it until Ctrl-C")
    action.add_argument("--reap", action="store_true", help="stop what killed sessions left behind")
    if parser.parse_args().reap:
        print("\n".join(f"stopped and removed {folder}" for folder in reap()) or "nothing was left behind")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _shell()
    except KeyboardInterrupt:
        return 0
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
