"""Checks before anything queues: request against instance, payload against data file, sbatch's own verdict."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hpc import payload, slurm, yamlfile
from hpc.experiment import Experiment
from hpc.instances import Instance
from hpc.preempt import ExitCode


@dataclass
class Findings:
    """`refusals` stop a submission; `unchecked` names what could not be looked at here, and why."""

    refusals: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def check(experiment: Experiment, instance: Instance, cluster: str, script: str) -> Findings:
    """Every check that can run here. Never raises for a fault of the experiment: that is a refusal."""
    findings = Findings()
    request = instance.request(experiment.launch)
    _check_request(experiment, instance, cluster, findings)
    if experiment.train.strategy == "single" and request.world_size > 1:
        findings.refusals.append(
            f"train.strategy: single runs one task, but {request.world_size} are asked for; use ddp"
        )
    shares = request.world_size * experiment.train.accumulate
    if experiment.data.batch_size % shares:
        findings.refusals.append(
            f"data.batch_size: {experiment.data.batch_size} does not divide by {request.world_size} tasks "
            f"x {experiment.train.accumulate} parts; use a multiple of {shares}"
        )
    if not findings.refusals:
        _check_payload(experiment, findings)
    if cluster == "slurm" and not findings.refusals:
        _check_sbatch(script, findings)
    return findings


def _check_request(experiment: Experiment, instance: Instance, cluster: str, findings: Findings) -> None:
    request = instance.request(experiment.launch)
    findings.refusals += instance.check(request)
    if cluster == "local" and request.nodes > 1:
        findings.refusals.append(f"launch.nodes: {request.nodes} asked, but a local run has 1")
    if not findings.refusals:
        findings.passed.append(
            f"fits {instance.name}: {request.nodes} x ({request.cpus} cores, {request.mem_gb:g} GB, "
            f"{request.gpus} GPUs), {request.tasks_per_node} tasks per node"
        )


def _check_payload(experiment: Experiment, findings: Findings) -> None:
    """The job checks itself in a child process: data file, classes, model (on the meta device)."""
    answer = payload.ask("jobs.train", ["--check", "-"], yamlfile.dump(experiment.as_dict()))
    lines = answer.stdout.strip().splitlines()
    if answer.returncode == ExitCode.DONE:
        findings.passed += lines
    elif answer.returncode == ExitCode.BAD_INPUT:
        findings.refusals += answer.stderr.strip().splitlines()
    elif "ModuleNotFoundError" in answer.stderr:
        missing = answer.stderr.strip().splitlines()[-1].removeprefix("ModuleNotFoundError: ")
        findings.unchecked.append(f"data file and model: {missing} here ('make setup' installs what jobs need)")
    else:
        findings.refusals.append(f"the payload's check failed: {answer.stderr.strip()}")


def _check_sbatch(script: str, findings: Findings) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(script)
        file.flush()
        try:
            accepted, words = slurm.test_only(Path(file.name))
        except slurm.SlurmError as error:
            findings.unchecked.append(str(error))
            return
    if accepted:
        findings.passed.append(f"sbatch --test-only: {words}")
    else:
        findings.refusals.append(f"sbatch --test-only: {words}")
