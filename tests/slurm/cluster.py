"""A real SLURM cluster with faked A100s on this machine: for tests, and for a shell.

For tests it is the session fixture `slurm_cluster` (tests/conftest.py), or a `Cluster(...)` of their own; several may
run side by side. By hand: `sudo .venv/bin/python -m tests.slurm --shell`.

One slurmctld, one slurmd per node (`-N node0`, ...), a munged of its own unless one answers already and, when asked, an
accounting database. Everything lives in one temporary folder, on free ports; each daemon leads its own session and is
stopped by its own pid. The nodes' names resolve for jobs (a private mount of /etc/hosts around each slurmd), as on a
real cluster.
"""

import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from types import TracebackType
from typing import Self, TypeVar

from tests.slurm import accounting as database
from tests.slurm import memory
from tests.slurm.processes import (
    ClusterError,
    free_ports,
    kill_child,
    kill_mount_namespace,
    listens,
    munge_answers,
    new_folder,
    reap,
    search_path,
    sweep,
)

__all__ = ["Cluster", "ClusterError", "obstacle", "reap"]

T = TypeVar("T")

CPUS = 12
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "unmunge", "unshare")
CONF = Path(__file__).with_name("slurm.conf.in")
# What a node mounts is seen by its slurmd and their jobs only.
IN_NODE = ("unshare", "--mount", "--propagation", "slave", "sh", "-c")
TAKEN = "Address already in use"
"""Somebody took a port between our look at it and the daemon's; of hundreds of clusters it happens to one."""
MEASURED = ("JobAcctGatherType=jobacct_gather/linux", "JobAcctGatherFrequency=1")
USER_SIGNAL = ("SlurmctldParameters=preempt_send_user_signal",)


def obstacle(*, accounting: bool = False, memory_limit: str = "") -> str | None:
    """Says in a few words why no (such) cluster can be started here and what helps; None when one can be started."""
    if os.geteuid() != 0:
        return "not root; run this as root"
    wanted = PROGRAMS + (database.PROGRAMS if accounting else ())
    missing = [name for name in wanted if shutil.which(name, path=search_path()) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; install with: sudo sh tests/install.sh"
    return memory.obstacle(memory_limit)


class Cluster:
    """A running SLURM whose nodes have 12 CPUs, 64000 MB and gpu:a100:1 each, to be used as a context manager.

    Partitions: `gpu` (default; GraceTime 0), `grace` (GraceTime 8) and `high`, whose jobs displace those of both.

    Args:
        nodes: how many; they are called node0, node1, ...
        accounting: with slurmdbd, so that sacct answers; the memory of jobs is measured each second.
        job_requeue: slurm.conf's JobRequeue; with 0 a job must ask for `--requeue`.
        preempt_mode: what happens to displaced jobs, "REQUEUE" or "CANCEL".
        user_signal: jobs that are displaced get the signal of their `--signal` first.
        kill_wait: seconds between SIGTERM and SIGKILL.
        max_array_size: one more than the highest index that an array may have.
        memory_limit: who kills what uses more memory than the job asked for: "kernel" (at once, and SLURM says
            OUT_OF_MEMORY, as on real clusters) or "sampled" (SLURM itself looks each second); "": nobody.
        node_timeout: after so many seconds without an answer (3 at least, and some more) a node is down.
        message_timeout: after so many seconds a client, or slurmctld asking a node, no longer waits for an answer.
        extra: further lines for slurm.conf; one that repeats a key of the template wins.
    """

    def __init__(
        self,
        *,
        nodes: int = 2,
        accounting: bool = False,
        job_requeue: int = 1,
        preempt_mode: str = "REQUEUE",
        user_signal: bool = False,
        kill_wait: int = 5,
        max_array_size: int = 1001,
        memory_limit: str = "",
        node_timeout: int = 30,
        message_timeout: int = 10,
        extra: Sequence[str] = (),
    ) -> None:
        self.nodes = tuple(f"node{number}" for number in range(nodes))
        self.accounting, self.memory_limit = accounting, memory_limit
        self.settings = {"job_requeue": job_requeue, "preempt_mode": preempt_mode, "kill_wait": kill_wait}
        self.settings |= {"max_array_size": max_array_size, "node_timeout": node_timeout}
        self.settings |= {"message_timeout": message_timeout}
        self.extra = (*(MEASURED if accounting or memory_limit else ()), *(USER_SIGNAL if user_signal else ()), *extra)
        self.folder = Path()
        self.ports: dict[str, int] = {}
        self.borrowed_munge = False
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.start_seconds = 0.0

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Starts all daemons and returns when all nodes are idle and a job step has answered; cleans up if it fails.

        Raises:
            ClusterError: when it cannot start here, or does not answer in time; with the tails of the logs.
        """
        if reason := obstacle(accounting=self.accounting, memory_limit=self.memory_limit):
            raise ClusterError(f"no SLURM cluster can be started here: {reason}")
        began = time.monotonic()
        for last in (False, False, True):
            try:
                self._start()
                break
            except ClusterError as error:
                if last or TAKEN not in str(error):
                    raise
        self.start_seconds = time.monotonic() - began
        return self

    def _start(self) -> None:
        self.folder = new_folder()
        try:
            self._write_configuration()
            if self.accounting:
                database.make(self.folder)
            for name in self._commands():
                self.launch(name)
            self.wait_for(self._answers, 30, "idle nodes and an answer from srun")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kills the daemons and every process of their jobs, and removes the folder. A second call does nothing."""
        for process in self.daemons.values():
            kill_child(process)
        self.daemons.clear()
        if self.folder != Path():
            sweep(self.folder)
            self.folder = Path()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def launch(self, name: str) -> None:
        """Starts the daemon `munged`, `mariadbd`, `slurmdbd`, `slurmctld` or `node0`, ...; again, if it was killed."""
        if name in self.daemons:
            kill_child(self.daemons[name])
        with (self.folder / "log" / f"{name}.err").open("ab") as err:
            self.daemons[name] = subprocess.Popen(
                self._commands()[name],
                env=self.environment() | database.environment(self.folder),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=err,
                stderr=err,
                start_new_session=True,
            )
        with (self.folder / "pids").open("a") as pids:
            pids.write(f"{self.daemons[name].pid}\n")
        # Slurm's programs sleep a whole second when their server does not listen yet: worth the wait.
        if name == "munged":
            self.wait_for(lambda: munge_answers(self._own_munge), 10, name)
        elif name not in self.nodes:
            address = database.socket(self.folder) if name == "mariadbd" else self.ports[name]
            self.wait_for(lambda: listens(address), 10, name)

    # -- use --------------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """The environment in which commands reach this cluster and no other: ours without SLURM's, with SLURM_CONF."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SCANCEL_", "SACCT_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": search_path()}

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

    def array_states(self, job_id: str) -> dict[int, str]:
        """The state of every index of an array, in SLURM's words, by one call of squeue."""
        shown = self.run("squeue", "--noheader", "--array", "--states=all", f"--jobs={job_id}", "--format=%K %T").stdout
        return dict(sorted((int(index), state) for index, state in map(str.split, shown.splitlines())))

    def node_state(self, name: str) -> str:
        """The node's state in sinfo's words: idle, mixed, allocated, down, drained, ...; `down*`: it is silent."""
        return self.run("sinfo", "--noheader", "--partition=gpu", f"--nodes={name}", "--format=%T").stdout.strip()

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
        """Displaces a running job (`12`), one task of an array (`12_4`) or all jobs of a node (`node0`).

        The displacing job asks `high` for all CPUs of the target's nodes, and holds them for so many seconds. SLURM
        cannot be told which of several jobs on one node to displace: all of them go. To displace exactly one task of
        an array, let each task ask for a whole node (12 CPUs, as a job for the A100 does), on a cluster of as many
        nodes as tasks shall run at once.

        Returns:
            The id of the displacing job.

        Raises:
            ClusterError: when the target is not running.
        """
        nodes, count = (target, 1)
        if target not in self.nodes:
            if (state := self.state(target)) != "RUNNING":
                raise ClusterError(f"job {target} is {state}: only a running job can be displaced")
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

    # -- harm -------------------------------------------------------------------------------------------------------

    def stop_controller(self, *, clean: bool = True) -> None:
        """Ends slurmctld; jobs run on, and clients fail within `message_timeout` until `start_controller`.

        Args:
            clean: by SIGTERM, which saves the state; else by SIGKILL, which loses what it was told in the last 5 s or
                so: a job that sbatch has reported is forgotten, and its id given to another.
        """
        self.daemons["slurmctld"].send_signal(signal.SIGTERM if clean else signal.SIGKILL)
        self.daemons["slurmctld"].wait(30)

    def start_controller(self) -> None:
        """Starts slurmctld again, from its saved state, and returns when it answers; idle nodes follow in 5 s."""
        self.launch("slurmctld")
        self.wait_for(lambda: self._nodes("%t"), 30, "an answer from slurmctld")

    def pause_controller(self) -> None:
        """Stops slurmctld in its tracks: clients give up after `message_timeout`.

        What they asked is done on `resume_controller`: an sbatch that fails may have submitted.
        """
        self.daemons["slurmctld"].send_signal(signal.SIGSTOP)

    def resume_controller(self) -> None:
        """Lets a paused slurmctld go on, with all that it was asked meanwhile."""
        self.daemons["slurmctld"].send_signal(signal.SIGCONT)

    def node_down(self, name: str) -> None:
        """Says to SLURM that the node is down, as an administrator does: its jobs end or are requeued at once.

        Its slurmd lives and would bring it back within a second: so it is drained too.
        """
        for state in ("DRAIN", "DOWN"):
            self.run("scontrol", "update", f"NodeName={name}", f"State={state}", "Reason=test")

    def cut_power(self, name: str) -> None:
        """Kills slurmd and every process on the node; SLURM notices after about `node_timeout + message_timeout`."""
        kill_mount_namespace(self.daemons[name])

    def node_up(self, name: str) -> None:
        """Brings a node back after either of these, and returns when it takes jobs."""
        if self.daemons[name].poll() is not None:
            self.launch(name)
        # Refused when the new slurmd was faster: a node that was silent comes back by itself.
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        self.wait_for(lambda: self.node_state(name) in ("idle", "mixed", "allocated"), 30, f"{name} to be up")

    # -- inside -----------------------------------------------------------------------------------------------------

    @property
    def _own_munge(self) -> Path:
        return self.folder / "run" / "munge.socket"

    def _write_configuration(self) -> None:
        for name in ("state", "run", "log", "spool", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        self.borrowed_munge = munge_answers()
        names = ("slurmctld", "slurmdbd", *self.nodes)
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        host = socket.gethostname().split(".")[0]
        text = Template(CONF.read_text()).substitute(
            self.settings, folder=self.folder, host=host, slurmctld_port=self.ports["slurmctld"]
        )
        at = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={CPUS} RealMemory=64000 Gres=gpu:a100:1"
        lines = [f"NodeName={node} Port={self.ports[node]} {at}" for node in self.nodes]
        lines += [] if self.borrowed_munge else [f"AuthInfo=socket={self._own_munge}"]
        if self.accounting:
            munge = None if self.borrowed_munge else self._own_munge
            lines += database.configure(self.folder, self.ports["slurmdbd"], munge)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\n")
        lines += memory.configure(self.memory_limit, self.folder, self.nodes)
        (self.folder / "slurm.conf").write_text("\n".join([text, *lines, *self.extra, ""]))
        (self.folder / "gres.conf").write_text("".join(self._fake_gpu(node) for node in self.nodes))
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + f"\n127.0.0.1 {' '.join(self.nodes)}\n")
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
        commands |= database.commands(self.folder) if self.accounting else {}
        commands["slurmctld"] = ["slurmctld", "-D", "-f", conf]
        for node in self.nodes:
            mounts = {Path("/etc/hosts"): self.folder / "hosts"} | memory.mounts(self.memory_limit, self.folder, node)
            steps = [shlex.join(["mount", "--bind", str(real), str(seen)]) for seen, real in mounts.items()]
            script = " && ".join([*steps, 'exec "$@"'])
            commands[node] = [*IN_NODE, script, "sh", "slurmd", "-D", "-f", conf, "-N", node]
        return commands

    def _answers(self) -> bool:
        for name, process in self.daemons.items():
            if process.poll() is not None:
                raise ClusterError(f"{name} ended with {process.returncode} at start\n{self.evidence()}")
        return self._nodes("%t") == ["idle"] * len(self.nodes) and self.run("srun", "true", check=False).returncode == 0

    def _nodes(self, field: str) -> list[str]:
        """A field of sinfo for every node; empty while slurmctld does not answer."""
        command = ("sinfo", "--noheader", "--Node", "--partition=gpu", f"--format={field}")
        return self.run(*command, check=False).stdout.split()
