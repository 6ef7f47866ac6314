"""The live cluster as typed data: settings, partitions and nodes, and what a preempted job gets there.

Three calls of scontrol, no sacct. Sizes are decimal GB of 1000 SLURM megabytes, times seconds.
"""

from __future__ import annotations

import grp
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hpc import slurm
from hpc.units import short_time

_AWAY = ("DOWN", "DRAIN", "FAIL", "NOT_RESPONDING", "INVAL", "FUTURE", "UNKNOWN", "MAINT")
_REQUEUE_WAIT_S = 120
"""How long SLURM keeps a requeued job in BeginTime."""


@dataclass(frozen=True)
class Settings:
    """Of the whole cluster, from `scontrol show config`."""

    name: str
    version: str
    max_array_size: int
    """So many tasks has an array at most: its highest index is one less."""
    kill_wait_s: int
    """Between SIGTERM and SIGKILL."""
    requeue: bool
    """JobRequeue: what a job gets that does not ask; our scripts ask."""
    preempt_by: str
    """none, partition_prio or qos."""
    preempt_mode: str
    exempt_s: int
    """No job is preempted in its first seconds, so many."""
    user_signal: bool
    """Whether preemption sends the signal of --signal, too."""
    accounting: bool

    @staticmethod
    def of(config: Mapping[str, str]) -> Settings:
        """Raises SlurmError where it lacks what every version of SLURM shows."""
        signals = f"{config.get('PreemptParameters', '')},{config.get('SlurmctldParameters', '')}"
        try:
            return Settings(
                name=config.get("ClusterName", ""),
                version=next((value for key, value in config.items() if key.endswith("_VERSION")), ""),
                max_array_size=int(config["MaxArraySize"]),
                kill_wait_s=_number(config["KillWait"]) or 0,
                requeue=config["JobRequeue"] == "1",
                preempt_by=config["PreemptType"].removeprefix("preempt/"),
                preempt_mode=config["PreemptMode"].upper(),
                exempt_s=slurm.duration(config.get("PreemptExemptTime", "")) or 0,
                user_signal=bool(re.search(r"\b(preempt_)?send_user_signal\b", signals)),
                accounting=not config.get("AccountingStorageType", "").endswith("/none"),
            )
        except (KeyError, ValueError) as error:
            raise slurm.SlurmError(f"scontrol show config: not understood ({error})") from None


@dataclass(frozen=True)
class Partition:
    """From `scontrol show partition`; None is no limit."""

    name: str
    default: bool
    hidden: bool
    state: str
    """UP, DOWN (queues, starts nothing), DRAIN or INACTIVE (take no jobs)."""
    max_time_s: int | None
    max_nodes: int | None
    min_nodes: int
    max_cpus: int | None
    """Per node."""
    max_mem_gb: float | None
    """Per node."""
    accounts: tuple[str, ...] | None
    groups: tuple[str, ...] | None
    tier: int
    """Under partition_prio, jobs of a higher tier preempt those of a lower one on the same nodes."""
    preempt_mode: str
    grace_s: int

    @staticmethod
    def of(fields: Mapping[str, str]) -> Partition:
        memory = _number(fields.get("MaxMemPerNode", ""))
        return Partition(
            name=fields["PartitionName"],
            default=fields.get("Default") == "YES",
            hidden=fields.get("Hidden") == "YES",
            state=fields.get("State", "UP").upper(),
            max_time_s=slurm.duration(fields.get("MaxTime", "")),
            max_nodes=_number(fields.get("MaxNodes", "")),
            min_nodes=_number(fields.get("MinNodes", "")) or 0,
            max_cpus=_number(fields.get("MaxCPUsPerNode", "")),
            max_mem_gb=memory / 1000 if memory else None,
            accounts=_names(fields.get("AllowAccounts", "ALL")),
            groups=_names(fields.get("AllowGroups", "ALL")),
            tier=_number(fields.get("PriorityTier", "")) or 1,
            preempt_mode=fields.get("PreemptMode", "OFF").upper(),
            grace_s=_number(fields.get("GraceTime", "")) or 0,
        )

    @property
    def open_to_us(self) -> bool:
        """Whether this user is in one of its groups (root is never asked)."""
        return self.groups is None or os.geteuid() == 0 or bool(set(self.groups) & _our_groups())


@dataclass(frozen=True)
class Node:
    """From `scontrol show node`: what jobs can have of it, less what SLURM keeps for itself."""

    name: str
    cpus: int
    mem_gb: float
    gpus: Mapping[str, int]
    """Count by type; the type is '' where the cluster names none."""
    partitions: tuple[str, ...]
    states: tuple[str, ...]
    """IDLE; MIXED, DRAIN; ..."""
    reason: str

    @staticmethod
    def of(fields: Mapping[str, str]) -> Node:
        cpus = _number(fields.get("CPUEfctv", "")) or _number(fields.get("CPUTot", "")) or 0
        memory = (_number(fields.get("RealMemory", "")) or 0) - (_number(fields.get("MemSpecLimit", "")) or 0)
        return Node(
            name=fields.get("NodeName", ""),
            cpus=cpus,
            mem_gb=memory / 1000,
            gpus=gpus_of(fields.get("Gres", "")),
            partitions=tuple(filter(None, fields.get("Partitions", "").split(","))),
            states=tuple(re.findall(r"[A-Z_]+|\*", fields.get("State", ""))),
            reason=fields.get("Reason", "").partition(" [")[0],
        )

    @property
    def away(self) -> str | None:
        """DOWN, DRAIN, ...: what keeps new jobs off it; None where nothing does."""
        if "*" in self.states:
            return "DOWN"
        return next((word for word in _AWAY for state in self.states if state.startswith(word)), None)

    @property
    def offer(self) -> str:
        """12 cores, 64 GB, 1 x a100."""
        gpus = [f"{count} x {kind or 'GPU'}" for kind, count in self.gpus.items()]
        return ", ".join([f"{self.cpus} cores", f"{self.mem_gb:g} GB", *gpus])


@dataclass(frozen=True)
class Cluster:
    settings: Settings
    partitions: Mapping[str, Partition]
    nodes: tuple[Node, ...]

    @staticmethod
    def look(nodes: str = "") -> Cluster:
        """As it is now, with all nodes or these (node[1-3]). Raises SlurmError where its controller does not answer."""
        settings = Settings.of(slurm.config())
        partitions = {name: Partition.of(fields) for name, fields in slurm.partitions().items()}
        return Cluster(settings, partitions, tuple(map(Node.of, slurm.nodes(nodes))))

    @property
    def default(self) -> str | None:
        """The partition of a job that names none."""
        return next((name for name, partition in self.partitions.items() if partition.default), None)

    def nodes_of(self, name: str) -> list[Node]:
        """What a job of this partition may have of each of its nodes."""
        limits = self.partitions[name]
        return [
            replace(
                node,
                cpus=min(node.cpus, limits.max_cpus or node.cpus),
                mem_gb=min(node.mem_gb, limits.max_mem_gb or node.mem_gb),
            )
            for node in self.nodes
            if name in node.partitions
        ]

    def notice_s(self, name: str) -> int | None:
        """Seconds from the first signal of a preemption to SIGKILL; None where jobs are never ended by one."""
        mode, partition = self._preempt_mode(name), self.partitions[name]
        ends = "REQUEUE" in mode or "CANCEL" in mode
        return partition.grace_s + self.settings.kill_wait_s if ends else None

    def preemption(self, name: str) -> str:
        """One sentence, two at most: what a preempted job of this partition gets."""
        settings, mode = self.settings, self._preempt_mode(name)
        if settings.preempt_by == "none":
            return f"partition {name}: jobs are not preempted here"
        if "SUSPEND" in mode:
            return (
                f"partition {name}: a preempted job is suspended where it is and goes on later; it hears no signal, "
                f"and keeps its memory"
            )
        if self.notice_s(name) is None:
            why = f"PreemptMode={mode}" if mode else "no partition of a higher tier shares its nodes"
            return f"partition {name}: its jobs are not preempted ({why})"
        if "REQUEUE" in mode:
            after = f"is requeued, and starts again after {short_time(_REQUEUE_WAIT_S)} or more"
            after += "" if settings.requeue else " (JobRequeue=0, but the script asks for --requeue)"
        else:
            after = "is cancelled and does not come back by itself ('hpc resume --all' brings it back)"
        exempt = f", not in its first {short_time(settings.exempt_s)}" if settings.exempt_s else ""
        qos = ". Its QOS may say otherwise (preempt/qos)" if settings.preempt_by == "qos" else ""
        return f"partition {name}: a preempted job {after}{exempt}; {self._notice(name)}{qos}"

    def _preempt_mode(self, name: str) -> str:
        """Of the partition, which overrides the cluster's; by QOS the cluster's. Empty where nobody could preempt."""
        settings, partition = self.settings, self.partitions[name]
        if settings.preempt_by == "none":
            return ""
        if settings.preempt_by != "partition_prio":
            return settings.preempt_mode
        rivals = {rival for node in self.nodes if name in node.partitions for rival in node.partitions}
        higher = any(self.partitions[rival].tier > partition.tier for rival in rivals & self.partitions.keys())
        return partition.preempt_mode if higher or "OFF" in partition.preempt_mode else ""

    def _notice(self, name: str) -> str:
        grace, wait = self.partitions[name].grace_s, self.settings.kill_wait_s
        total = f"{grace + wait} s (GraceTime {grace} + KillWait {wait})" if grace else f"{wait} s (KillWait)"
        if self.settings.user_signal:
            return f"its tasks get the user signal (USR2) {total} before SIGKILL"
        return f"its tasks get SIGTERM {total} before SIGKILL, and no user signal"


def gpus_of(gres: str) -> dict[str, int]:
    """GPUs by type from a node's Gres: gpu:a100:4(S:0-1),gpu:2,nvme:1 gives {"a100": 4, "": 2}."""
    found: Counter[str] = Counter()
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = entry.split(":")
        if name == "gpu":
            count = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
            found[rest[0] if rest else ""] += count
    return dict(found)


def _number(text: str) -> int | None:
    """The number that a value begins with: `30 sec`; None for UNLIMITED and N/A."""
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else None


def _names(text: str) -> tuple[str, ...] | None:
    return None if text in ("ALL", "(null)", "") else tuple(text.split(","))


def _our_groups() -> set[str]:
    known = {entry.gr_gid: entry.gr_name for entry in grp.getgrall()}
    return {known[gid] for gid in {*os.getgroups(), os.getgid()} if gid in known}
