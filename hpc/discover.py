"""Instances of the cluster at hand: one for each kind of node in each partition, from what scontrol shows."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import instances, slurm, yamlfile
from hpc.cluster import Node, Partition
from hpc.errors import UserError
from hpc.rundir import write_text

Fields = Mapping[str, str]

_WITHOUT_LIMIT = "7d"
_KNOWN_GB = {
    "a10": 24.0, "a30": 24.0, "a40": 48.0, "h200": 141.0, "l4": 24.0, "l40": 48.0, "l40s": 48.0, "rtx_3090": 24.0,
    "rtx3090": 24.0, "rtx_4090": 24.0, "rtx4090": 24.0, "rtx_a6000": 48.0, "t4": 16.0, "tesla_t4": 16.0,
}  # fmt: skip
"""Memory of GPUs that are sold with one size only."""


@dataclass(frozen=True)
class Kind:
    """What a job may have of a node, with one of its types of GPU."""

    cpus: int
    mem_gb: float
    gpu_type: str = ""
    gpus: int = 0


@dataclass(frozen=True)
class Found:
    """An instance's file that is not written yet."""

    name: str
    values: dict[str, Any]
    text: str


def read() -> list[Found]:
    """The instances of the cluster that answers here. Raises UserError where none does."""
    try:
        return derive(slurm.config(), slurm.partitions(), slurm.nodes())
    except slurm.SlurmError as error:
        raise UserError(f"no SLURM answers here ({error}); run this on a login node of the cluster") from None


def derive(config: Fields, partitions: Mapping[str, Fields], nodes: Sequence[Fields]) -> list[Found]:
    """One instance per partition and kind of node; partitions without nodes are left out."""
    found: dict[str, Found] = {}
    for name, fields in partitions.items():
        members = [node for node in nodes if name in Node.of(node).partitions and "FUTURE" not in node.get("State", "")]
        kinds = _kinds(Partition.of(fields), members)
        for kind, alike in kinds.items():
            label = _label(config.get("ClusterName", "cluster"), name, kind, len(kinds) > 1, found)
            found[label] = _found(label, kind, config, name, fields, alike)
    return list(found.values())


def write(found: Iterable[Found], force: bool = False) -> list[Path]:
    """The files, in the user's own folder. Raises UserError, before anything is written, where one is there already."""
    folder = instances.folders()[0]
    files = {folder / f"{one.name}.yaml": one.text for one in found}
    there = [path.name for path in files if path.exists()]
    if there and not force:
        raise UserError(f"{folder}: {', '.join(there)}: already there; --force writes over them")
    try:
        for path, text in files.items():
            write_text(path, text)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose a folder with HPC_INSTANCES") from None
    return list(files)


def _kinds(partition: Partition, nodes: Sequence[Fields]) -> dict[Kind, list[Fields]]:
    """The nodes by what a job may have of each; memory that differs by some percent is the least of them."""
    alike: dict[tuple[Any, ...], list[tuple[Kind, Fields]]] = {}
    for fields in nodes:
        node = Node.of(fields)
        cores = _number(fields.get("CPUTot"), node.cpus) - _number(fields.get("CoreSpecCount"), 0) * _threads(fields)
        cpus = max(min(node.cpus, cores, partition.max_cpus or cores), 1)
        memory = min(node.mem_gb, partition.max_mem_gb or node.mem_gb)
        for gpu_type, count in node.gpus.items() or [("", 0)]:
            kind = Kind(cpus, max(memory, 1e-3), gpu_type, count)
            alike.setdefault((cpus, f"{memory:.1e}", gpu_type, count), []).append((kind, fields))
    return {min(pairs, key=lambda pair: pair[0].mem_gb)[0]: [fields for _, fields in pairs] for pairs in alike.values()}


def _threads(fields: Fields) -> int:
    return _number(fields.get("ThreadsPerCore"), 1)


def _gpu_memory(gpu_type: str, features: str) -> float | None:
    """GB, where the type's name (a100-40g, a100_3g.20gb) or a feature of the node (GPU_MEM:32GB) tells it."""
    name = gpu_type.lower()
    told = [word for word in features.lower().split(",") if "gpu" in word or (name and name in word)]
    for word in (name, *told):
        if match := re.search(r"(?<![a-z0-9])(\d+)gb?(?![a-z0-9.])", word):
            return float(match[1])
    return _KNOWN_GB.get(name.removeprefix("nvidia_"))


def _label(cluster: str, partition: str, kind: Kind, several: bool, taken: Container[str]) -> str:
    """CLUSTER-PARTITION, and where it has several kinds of nodes what tells this one."""
    parts = [cluster, partition]
    parts += [f"{kind.gpus}x{kind.gpu_type or 'gpu'}" if kind.gpus else f"{kind.cpus}cpus"] if several else []
    for more in ("", f"{kind.cpus}cpus", f"{kind.mem_gb:.0f}gb", "more"):
        parts += [more] if more else []
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))
        if label not in taken:
            break
    return label


def _found(label: str, kind: Kind, config: Fields, name: str, partition: Fields, nodes: list[Fields]) -> Found:
    limits = Partition.of(partition)
    per_cpu = _number(partition.get("MaxMemPerCPU"), 0) * kind.cpus / 1000
    memory = min(kind.mem_gb, per_cpu or kind.mem_gb)
    gpu_mem = _gpu_memory(kind.gpu_type, nodes[0].get("AvailableFeatures", ""))
    shown = f", {kind.gpus} x {kind.gpu_type or 'GPU'}" if kind.gpus else ""
    values = {
        "description": f"{config.get('ClusterName', 'SLURM')}, {kind.cpus} CPUs, {memory:g} GB{shown}",
        "cpus": kind.cpus,
        "mem_gb": int(memory) if memory == int(memory) else memory,
        "gpus": kind.gpus or None,
        "gpu_type": kind.gpu_type or None,
        "gpu_mem_gb": gpu_mem if kind.gpus else None,
        "nodes": min(len(nodes), limits.max_nodes or len(nodes)),
        "time_limit": partition["MaxTime"] if limits.max_time_s else _WITHOUT_LIMIT,
        "partition": name,
    }
    values = {key: value for key, value in values.items() if value is not None}
    notes = _notes(config, partition, nodes, limits)
    if kind.gpus and not gpu_mem:
        notes["gpu_mem_gb"] = "gpu_mem_gb: 40 (say): SLURM does not tell it; nvidia-smi on a node does"
    lines = []
    for key, value in values.items():
        note = f"  # {notes.pop(key)}" if key in notes else ""
        lines.append(yamlfile.dump({key: value}).rstrip("\n") + note)
    return Found(label, values, "\n".join([*lines, *(f"# {note}" for note in notes.values())]) + "\n")


def _notes(config: Fields, partition: Fields, nodes: list[Fields], limits: Partition) -> dict[str, str]:
    """Remarks, beside the field of their name, or below all fields."""
    notes: dict[str, str] = {}
    away = [node.name for node in map(Node.of, nodes) if node.away]
    if (threads := _threads(nodes[0])) > 1:
        notes["cpus"] = f"SLURM counts hardware threads, {threads} of a core"
    if away:
        names = ", ".join(away[:3]) + ", ..." * (len(away) > 3)
        notes["nodes"] = f"{len(away)} of {len(nodes)} are down or drained now: {names}"
    if limits.max_time_s is None:
        notes["time_limit"] = "the partition has no limit: this is what a run asks for that names no time"
    if limits.state != "UP":
        notes["partition"] = f"it is {limits.state} now"
    for key in ("AllowAccounts", "AllowQos", "AllowGroups"):
        if (value := partition.get(key, "ALL")) != "ALL":
            notes[key] = f"{key}={value}"
    if (qos := partition.get("QoS", "N/A")) != "N/A":
        notes["QoS"] = f"QoS={qos} may set closer limits: sacctmgr show qos {qos}"
    if size := config.get("MaxArraySize"):
        notes["MaxArraySize"] = f"MaxArraySize={size}: hpc cuts longer arrays into chunks"
    return notes


def _number(text: str | None, otherwise: int) -> int:
    """The leading digits of SLURM's text; `otherwise` for UNLIMITED, INFINITE, N/A or nothing."""
    match = re.match(r"\d+", text or "")
    return int(match[0]) if match else otherwise
