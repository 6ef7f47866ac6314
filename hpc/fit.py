"""Does a request fit the live cluster? Each refusal says which number, which limit, and what would fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hpc.cluster import Cluster, Node, Partition
from hpc.errors import nearest
from hpc.instances import Request
from hpc.units import slurm_time

_CLOSED = ("INACTIVE", "DRAIN")
_KINDS = 4
"""So many kinds of node are told of a partition."""


@dataclass
class Answer:
    """`refusals` stop a submission; `warnings` tell why it would wait; `passed` what fits."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Ask:
    """A request with what its instance and launch section say besides."""

    request: Request
    gpu_type: str | None
    account: str | None

    @property
    def shape(self) -> str:
        """12 cores, 64 GB, 1 x a100."""
        gpus = [f"{self.request.gpus} x {self.gpu_type or 'GPU'}"] if self.request.gpus else []
        return ", ".join([f"{self.request.cpus} cores", f"{self.request.mem_gb:g} GB", *gpus])


def choose(cluster: Cluster, wanted: str | None) -> list[str]:
    """The partitions that a job may start in: `wanted` (several with commas), or the default, if there is one."""
    return list(filter(None, (wanted or cluster.default or "").split(",")))


def check(
    cluster: Cluster, request: Request, gpu_type: str | None, wanted: str | None, account: str | None = None
) -> Answer:
    """Whether a partition of `wanted` (several with commas; None: the default) takes the request and can run it."""
    shown = [name for name, partition in cluster.partitions.items() if not partition.hidden]
    names = choose(cluster, wanted)
    if not names:
        return Answer([f"launch.partition: none is given, and this cluster has no default; valid: {_list(shown)}"])
    if unknown := [name for name in names if name not in cluster.partitions]:
        return Answer([f"partition {name!r} is not on this cluster; {nearest(name, shown)}" for name in unknown])
    ask = _Ask(request, gpu_type, account)
    answers = {name: _fit(cluster, partition, ask) for name, partition in cluster.partitions.items()}
    asked = [answers[name] for name in names]
    good = [answer for answer in asked if not answer.refusals]
    if good:
        return next((answer for answer in good if not answer.warnings), good[0])
    others = [name for name in shown if not answers[name].refusals and cluster.partitions[name].open_to_us]
    hint = f", or use partition {_list(others, 'or')}" if others else ""
    return Answer([line + hint for answer in asked for line in answer.refusals])


def _fit(cluster: Cluster, partition: Partition, ask: _Ask) -> Answer:
    answer, name, request = Answer(), f"partition {partition.name}", ask.request
    if partition.state.startswith(_CLOSED):
        answer.refusals.append(f"{name} is {partition.state} and takes no jobs; wait until 'sinfo' shows it up")
    if partition.state == "DOWN":
        answer.warnings.append(f"{name} is DOWN: a job waits until it is up again")
    if ask.account and partition.accounts is not None and ask.account not in partition.accounts:
        allowed = _list(partition.accounts, "or")
        answer.refusals.append(f"launch.account: {ask.account} may not use {name}; use {allowed}")
    if partition.max_time_s is not None and request.time_s > partition.max_time_s:
        limit = slurm_time(partition.max_time_s)
        asked = slurm_time(request.time_s)
        answer.refusals.append(
            f"launch.time: {asked} asked, but {name} ends a job after {limit}; ask for {limit} or less"
        )
    most, least = partition.max_nodes, partition.min_nodes
    if most is not None and request.nodes > most:
        limit = f"a job of {name} has {most} at most; ask for {most} or less"
        answer.refusals.append(f"launch.nodes: {request.nodes} asked, but {limit}")
    if request.nodes < least:
        limit = f"a job of {name} has {least} at least; ask for {least} or more"
        answer.refusals.append(f"launch.nodes: {request.nodes} asked, but {limit}")
    _fit_nodes(name, cluster.nodes_of(partition.name), ask, answer)
    return answer


def _fit_nodes(name: str, nodes: list[Node], ask: _Ask, answer: Answer) -> None:
    """Add to the answer what the nodes of a partition say to it."""
    needed = ask.request.nodes
    if not nodes:
        answer.warnings.append(f"{name} shows no nodes: whether they fit is not known")
        return
    fit = [node for node in nodes if not any(_over(name, [node], ask))]
    there = [node for node in fit if not node.away]
    if not fit:
        kinds = Counter(node.offer for node in nodes).most_common(_KINDS)
        has = "; ".join(f"{count} of {offer}" for offer, count in kinds)
        answer.refusals += list(_over(name, nodes, ask)) or [
            f"no node of {name} has {ask.shape} together; it has {has}"
        ]
    elif len(fit) < needed:
        limit = f"{name} has {len(fit)} with {ask.shape}; ask for {len(fit)} or less"
        answer.refusals.append(f"launch.nodes: {needed} asked, but {limit}")
    elif len(there) < needed:
        away = "; ".join(f"{node.name} is {node.away}{_because(node)}" for node in fit if node.away)
        answer.warnings.append(
            f"{name}: of its {len(fit)} nodes that fit, {needed} are needed, and a job waits: {away}"
        )
    else:
        idle = sum(node.states[:1] == ("IDLE",) for node in there)
        answer.passed.append(f"{name}: {len(fit)} of its {len(nodes)} nodes fit ({ask.shape}), {idle} idle now")


def _over(name: str, nodes: list[Node], ask: _Ask) -> Iterator[str]:
    """A sentence for each number that is more than the largest of these nodes has."""
    request, kind = ask.request, ask.gpu_type
    kinds = sorted({kind for node in nodes for kind in node.gpus if kind})
    if request.gpus and kind and kind not in kinds:
        has = (
            f"it has {_list(kinds)}" if kinds else "it names no types" if any(n.gpus for n in nodes) else "it has none"
        )
        yield f"gpu_type {kind}: no node of {name} has such a GPU; {has}"
        return
    gpus = max(node.gpus.get(kind, 0) if kind else sum(node.gpus.values()) for node in nodes)
    limits: list[tuple[str, float, float, str]] = [
        ("cpus", request.cpus, max(node.cpus for node in nodes), " cores per node"),
        ("mem", request.mem_gb, max(node.mem_gb for node in nodes), " GB per node"),
        ("gpus", request.gpus, gpus, f" x {kind} per node" if kind else " per node"),
    ]
    for key, asked, limit, words in limits:
        if asked > limit:
            most = f"the largest node of {name} has {limit:g}; ask for {limit:g} or less"
            yield f"launch.{key}: {asked:g}{words} asked, but {most}"


def _because(node: Node) -> str:
    return f" ({node.reason})" if node.reason else ""


def _list(names: Iterable[str], word: str = "and") -> str:
    *head, last = [*names] or ["none"]
    return f"{', '.join(head)} {word} {last}" if head else last
