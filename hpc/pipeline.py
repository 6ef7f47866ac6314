"""pack -> train -> evaluate as one command: three runs, each submitted to start when the one before has finished.

A step other than training is a run, too: experiment.yaml has the training experiment under the step's own name and
request, and step.yaml the payload's module and its arguments.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import after, instances, ledger, preflight, submission, template, yamlfile
from hpc import plan as plans
from hpc.errors import UserError
from hpc.experiment import Experiment, Launch, load, validate
from hpc.plan import Plan
from hpc.preflight import Findings
from hpc.rundir import RunDir, next_run, write_text

PACK, EVALUATE = "jobs.pack", "jobs.evaluate"


@dataclass(frozen=True)
class Link:
    """A run of the pipeline, not made yet; step.yaml of one that does not train."""

    plan: Plan
    step: dict[str, Any] | None = None


@dataclass(frozen=True)
class Pipeline:
    """Links in their order; each starts when the one before has finished."""

    links: list[Link]
    cluster: str
    packed: bool
    """The data file was there already."""


def make(file: Path, overrides: list[str], runs: Path, pack: str | None, pack_instance: str, split: str) -> Pipeline:
    """Plan the runs. `pack`: sources and options of `hpc pack` without -o, as in a shell. Raises UserError."""
    experiment, _ = load(file, overrides)
    cluster = submission.choose_cluster(experiment.launch.cluster)
    there = Path(experiment.data.file).exists()
    if not there and pack is None:
        raise UserError(
            f"{experiment.data.file} does not exist: say how to make it, --pack 'scans --labels labels.csv'"
        )
    links = []
    if pack is not None and not there:
        wanted = experiment.launch
        launch = Launch(instance=pack_instance if cluster == "slurm" else wanted.instance, cluster=wanted.cluster)
        arguments = [*_words(pack), "-o", experiment.data.file]
        links.append(_link(experiment, "pack", launch, {"module": PACK, "arguments": arguments}, runs))
    train = plans.make(file, overrides, runs)
    links.append(Link(train))
    arguments = [str(train.run.path), "--split", split]
    launch = _one_task(experiment.launch)
    links.append(_link(experiment, "evaluate", launch, {"module": EVALUATE, "arguments": arguments}, runs))
    return Pipeline(links, cluster, there)


def _words(pack: str) -> list[str]:
    try:
        return shlex.split(pack)
    except ValueError as error:
        raise UserError(f"--pack {pack!r}: {error}; quote it as in a shell") from None


def _one_task(launch: Launch) -> Launch:
    """The share of one task of a training's request."""
    request = instances.find(launch.instance).request(launch)
    share = {"nodes": 1, "gpus": min(request.gpus, 1), "tasks_per_node": 1, "cpus": request.cpus_per_task}
    return launch.model_copy(update={**share, "mem": request.mem_gb / request.tasks_per_node})


def _link(experiment: Experiment, kind: str, launch: Launch, step: dict[str, Any], runs: Path) -> Link:
    values = {**experiment.as_dict(), "name": f"{experiment.name}-{kind}", "launch": launch.model_dump(mode="json")}
    own = validate(values, kind)
    step = {**step, "folder": str(Path.cwd())}
    run = next_run(runs, own.name, {**own.as_dict(), "step": step})
    instance = instances.find(launch.instance)
    script = template.render(own, instance, run, sys.executable)
    return Link(Plan(own, {}, instance, run, script), step)


def check(pipeline: Pipeline) -> dict[str, Findings]:
    """What is found of each link, by its run's name; the training's data file may be made only then."""
    found = {}
    for link in pipeline.links:
        plan = link.plan
        whole = link.step is None and pipeline.packed
        found[plan.run.name] = preflight.check(
            plan.experiment, plan.instance, pipeline.cluster, plan.script, plan.run.runs, payload=whole
        )
    return found


def submit(pipeline: Pipeline) -> list[tuple[RunDir, str]]:
    """Make and submit all links, or none: each run and its job. Raises UserError."""
    done: list[tuple[RunDir, str]] = []
    made: list[RunDir] = []
    try:
        for link in pipeline.links:
            run = plans.create(link.plan)
            made.append(run)
            if link.step is not None:
                write_text(run.step, yamlfile.dump(link.step))
            waits = _after(done, pipeline.cluster)
            done.append((run, submission.submit(run, pipeline.cluster, waits).job_id))
    except BaseException:
        for run, _ in reversed(done):
            ledger.cancel(run)
        for run in made[len(done) :]:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    return done


def _after(done: list[tuple[RunDir, str]], cluster: str) -> list[str]:
    if not done:
        return []
    run, job = done[-1]
    return [str(run.path)] if cluster == "local" else after.dependency([job])
