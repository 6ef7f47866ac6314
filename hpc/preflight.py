"""Checks before anything queues: request against instance and cluster, payload against its data, sbatch's verdict."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc import badnodes, fit, saves, slurm, yamlfile
from hpc.cluster import Cluster
from hpc.experiment import Experiment
from hpc.instances import Instance
from hpc.payload import ask
from hpc.preempt import ExitCode
from hpc.settings import Launch
from hpc.sweepdir import spec
from hpc.units import short_time

_SOON_S = 60
_SHORT_S = 180
"""A start (imports, data, model) and the notice of the time limit may need nearly as much."""


@dataclass
class Findings(fit.Answer):
    """What the cluster answers, and what else was found.

    `unchecked` names what was not looked at, and why; `cautions` what is allowed and may not be what was meant.
    """

    unchecked: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    memory: dict[str, Any] | None = None
    """The plan of a single experiment's training step: jobs/memory_plan.py."""


@dataclass(frozen=True)
class _Group:
    """Experiments that are equal in what a check looks at."""

    label: str
    """`row 3: `, `rows 0-4, 7: `; empty for all of them."""
    experiment: Experiment


def check(
    experiment: Experiment,
    instance: Instance,
    cluster: str,
    script: str,
    runs: Path,
    *,
    payload: bool = True,
    details: bool = False,
) -> Findings:
    """Every check that can run here. Never raises for a fault of the experiment: that is a refusal.

    `runs`: the folder of the runs, which knows the bad nodes. `payload`: whether data file and model are looked at; not
    where an earlier job is to make the file. `details`: which batch and which switches fit the memory, too.
    """
    return check_many([experiment], instance, cluster, script, runs, payload=payload, details=details)


def check_many(
    experiments: Sequence[Experiment],
    instance: Instance,
    cluster: str,
    script: str,
    runs: Path,
    *,
    payload: bool = True,
    details: bool = False,
) -> Findings:
    """The same for the rows of a sweep, each thing once: a sentence names its rows (from 0) where it is not of all.

    `script` is what sbatch judges: one array stands for all.
    """
    findings = Findings()
    for group in _groups(experiments, lambda one: one.launch.model_dump_json()):
        _check_request(group, instance, cluster, findings)
    for group in _groups(experiments, lambda one: _shares(one, instance)):
        _check_shares(group, instance, findings)
    answers = cluster == "slurm" and _check_cluster(experiments, instance, runs, findings)
    if payload and not findings.refusals:
        _check_payload(experiments, findings, details)
    if answers and not findings.refusals:
        bad = badnodes.current(runs)
        findings.passed += [
            f"{node} is left out for a day ({badnodes.file(runs)}): {bad[node]}" for node in sorted(bad)
        ]
        for key, value in slurm.inherited(script).items():
            findings.passed.append(f"{key}={value} of your environment counts, as the script says nothing of it")
        _check_sbatch(script, badnodes.exclusion(runs), findings)
    return findings


def _groups(experiments: Sequence[Experiment], key: Callable[[Experiment], str]) -> Iterator[_Group]:
    rows: dict[str, list[int]] = {}
    for row, experiment in enumerate(experiments):
        rows.setdefault(key(experiment), []).append(row)
    for members in rows.values():
        yield _Group(_label(members, len(experiments)), experiments[members[0]])


def _label(rows: list[int], total: int) -> str:
    """`rows 0-4, 7: `, or nothing for all."""
    if len(rows) == total:
        return ""
    return f"row{'s' if len(rows) > 1 else ''} {spec(rows).replace(',', ', ')}: "


def _check_request(group: _Group, instance: Instance, cluster: str, findings: Findings) -> None:
    request = instance.request(group.experiment.launch)
    refusals = instance.check(request)
    if cluster == "local" and request.nodes > 1:
        refusals.append(f"launch.nodes: {request.nodes} asked, but a local run has 1")
    if cluster == "local" and instance.local_obstacle:
        refusals.append(f"launch.cluster: {instance.local_obstacle}")
    findings.refusals += [group.label + line for line in refusals]
    if request.time_s < _SHORT_S:
        findings.cautions.append(
            f"{group.label}launch.time: {request.time_s:.0f} s is little: it must hold the start (imports, data, "
            f"model), steps, and the notice in which a run saves; three attempts without a step end the run"
        )
    if not refusals:
        findings.passed.append(
            f"{group.label}fits {instance.name}: {request.nodes} x ({request.cpus} cores, {request.mem_gb:g} GB, "
            f"{request.gpus} GPUs), {request.tasks_per_node} tasks per node"
        )


def _shares(experiment: Experiment, instance: Instance) -> str:
    """What `_check_shares` looks at."""
    tasks = instance.request(experiment.launch).world_size
    train, gpus = experiment.train, instance.request(experiment.launch).gpus
    of_ranks = [train.strategy, train.accumulate, train.sync_batchnorm, train.device]
    return json.dumps([tasks, gpus, *of_ranks, experiment.data.batch_size])


def _check_shares(group: _Group, instance: Instance, findings: Findings) -> None:
    tasks = instance.request(group.experiment.launch).world_size
    if group.experiment.train.strategy == "single" and tasks > 1:
        findings.refusals.append(
            f"{group.label}train.strategy: single runs one task, but {tasks} are asked for; use ddp"
        )
    train, gpus = group.experiment.train, instance.request(group.experiment.launch).gpus
    if train.sync_batchnorm and tasks > 1 and (train.device == "cpu" or not gpus):
        findings.refusals.append(
            f"{group.label}train.sync_batchnorm: torch has it on CUDA alone; leave it out to train on the CPU"
        )
    if train.strategy in ("fsdp", "deepspeed") and tasks == 1:
        findings.cautions.append(f"{group.label}train.strategy: {train.strategy} of one task is one whole process")
    if fault := group.experiment.batch_fault(tasks):
        findings.refusals.append(group.label + fault)


def _check_cluster(experiments: Sequence[Experiment], instance: Instance, runs: Path, findings: Findings) -> bool:
    """Partitions and nodes as they are now; False where the controller does not answer."""
    try:
        live = Cluster.look()
    except slurm.SlurmError as error:
        findings.unchecked.append(f"partition, nodes, preemption and sbatch's verdict: {error}")
        return False
    rows, most = len(experiments), live.settings.max_array_size
    if rows > most:
        findings.passed.append(f"{rows} rows are several arrays: one has {most} at most here (MaxArraySize)")
    partitions: dict[str, None] = {}
    for group in _groups(experiments, lambda one: one.launch.model_dump_json()):
        launch = group.experiment.launch
        wanted = launch.partition or instance.partition
        answer = fit.check(live, instance.request(launch), instance.gpu_type, wanted, launch.account)
        findings.refusals += [group.label + line for line in answer.refusals]
        findings.warnings += [group.label + line for line in answer.warnings]
        findings.passed += [group.label + line for line in answer.passed]
        partitions |= dict.fromkeys(fit.choose(live, wanted))
    here = [name for name in partitions if name in live.partitions]
    findings.passed += [live.preemption(name) for name in here]
    findings.passed += _too_short(
        [(name, notice) for name in here if (notice := live.notice_s(name))], experiments, runs
    )
    return True


def _too_short(notices: list[tuple[str, int]], experiments: Sequence[Experiment], runs: Path) -> list[str]:
    """Of partitions where a save like those of earlier runs does not fit into the notice of a preemption."""
    known = saves.longest(runs, {experiment.model.name for experiment in experiments}) if notices else None
    took, which = known or (0.0, "")
    return [
        f"partition {name}: a preempted job has {notice} s, and a save took up to {took:.0f} s ({which}): "
        f"what was done since the last save is lost then, so save often (train.checkpoint_every)"
        for name, notice in notices
        if took > notice
    ]


def _check_payload(experiments: Sequence[Experiment], findings: Findings, details: bool) -> None:
    """The job checks itself in one child process: data file, classes, model (on the meta device), memory."""
    groups = list(_groups(experiments, _payload_key))
    text = "---\n".join(yamlfile.dump(group.experiment.as_dict()) for group in groups)
    answer = ask("jobs.check", ["-", "--json", *(["--details"] if details else [])], text)
    words = answer.stderr.strip().splitlines()
    if answer.returncode in (ExitCode.DONE, ExitCode.BAD_INPUT) and answer.stdout:
        found = json.loads(answer.stdout.splitlines()[-1])  # a user's own model may print, too
        findings.memory = found.get("memory")
        findings.refusals += [_name_rows(line, groups) for line in words if answer.returncode == ExitCode.BAD_INPUT]
        for key in ("passed", "unchecked", "cautions"):
            getattr(findings, key).extend([] if findings.refusals else found[key])
    elif "ModuleNotFoundError" in answer.stderr:
        missing = words[-1].removeprefix("ModuleNotFoundError: ")
        findings.unchecked.append(f"data file and model: {missing} here ('make setup' installs what jobs need)")
    else:
        told = words[-1] if words else f"left with exit code {answer.returncode}"
        findings.refusals.append(f"the payload's check failed: {told}; 'python -m jobs.check EXPERIMENT' shows where")


UNCHECKED: dict[str, Any] = {
    "name": True,
    "train": {
        **dict.fromkeys(("seed", "epochs", "limit_steps", "checkpoint_every", "keep", "keep_every"), True),
        **dict.fromkeys(("hang_after", "ledger", "figures"), True),
        "optimizer": {"lr", "weight_decay"},
    },
    "launch": set(Launch.model_fields) - {"instance", "nodes", "gpus", "tasks_per_node", "mem"},
}
"""What jobs.check does not look at."""


def _payload_key(experiment: Experiment) -> str:
    """Rows that differ in nothing that jobs.check looks at are checked once: a sweep over seeds costs one check."""
    return experiment.model_dump_json(exclude=UNCHECKED)


def _name_rows(line: str, groups: list[_Group]) -> str:
    """The rows in place of the number that jobs.check puts before each fault of several experiments."""
    numbered = re.match(r"(\d+): ", line) if len(groups) > 1 else None
    return groups[int(numbered[1])].label + line[numbered.end() :] if numbered else line


def _check_sbatch(script: str, options: Sequence[str], findings: Findings) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(script)
        file.flush()
        try:
            accepted, words = slurm.test_only(Path(file.name), *options)
        except slurm.SlurmError as error:
            findings.unchecked.append(str(error))
            return
    if accepted:
        findings.passed.append(f"sbatch --test-only: {_verdict(words)}")
    elif findings.warnings:  # it says no, too, where nodes are only away
        findings.warnings.append(f"sbatch --test-only, now: {words}")
    else:
        findings.refusals.append(f"sbatch --test-only: {words}")


def _verdict(words: str) -> str:
    """`Job 5 to start at 2030-01-01T12:00:00 using 12 processors on nodes node0 in partition gpu`, for people."""
    told = re.fullmatch(r"Job \S+ to start at (\S+)( using .*)?", words.partition("; ")[0])
    start = slurm.epoch(told[1]) if told else None
    if told is None or start is None:
        return words
    wait = start - time.time()
    when = "at once" if wait < _SOON_S else f"in about {short_time(wait)}, at {told[1].replace('T', ' ')}"
    return f"accepted; it would start {when},{told[2] or ''}".rstrip(",")
