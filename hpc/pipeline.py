"""pack -> train -> evaluate as one command: three runs, each submitted to start when the one before has finished.

A step other than training is a run, too: experiment.yaml has the training experiment under the step's own name and
request, and step.yaml the payload's module and its arguments.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import after, arrays, instances, payload, preflight, submission, template, yamlfile
from hpc import plan as plans
from hpc.errors import UserError
from hpc.experiment import Experiment, load, validate
from hpc.plan import Plan
from hpc.preempt import ExitCode
from hpc.preflight import Findings
from hpc.rundir import RunDir, next_run, write_text
from hpc.settings import Launch

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
    data: str
    """The data file."""
    pack: list[str] | None
    """Arguments of `hpc pack`; None where the data file is there already."""
    split: str
    """What is evaluated."""


def make(file: Path, overrides: list[str], runs: Path, pack: str | None, pack_instance: str, split: str) -> Pipeline:
    """Plan the runs. `pack`: sources and options of `hpc pack` without -o, as in a shell. Raises UserError."""
    experiment, _ = load(file, overrides)
    cluster = submission.choose_cluster(experiment.launch.cluster)
    data = experiment.data.file
    words = _words(pack, data) if not _exists(Path(data)) else None
    links = []
    if words is not None:
        wanted = experiment.launch
        where = pack_instance if cluster == "slurm" else wanted.instance
        launch = Launch(instance=where, cluster=wanted.cluster, account=wanted.account, mail=wanted.mail)
        links.append(_link(experiment, "pack", launch, {"module": PACK, "arguments": words}, runs))
    train = plans.make(file, overrides, runs)
    links.append(Link(train))
    arguments = [str(train.run.path), "--split", split]
    launch = _one_task(experiment.launch)
    links.append(_link(experiment, "evaluate", launch, {"module": EVALUATE, "arguments": arguments}, runs))
    return Pipeline(links, cluster, data, words, split)


def _exists(data: Path) -> bool:
    """A file, or shards by a pattern. Raises UserError for a pattern without any: a step packs one file."""
    shards = "*" in data.name
    if shards and not any(data.parent.glob(data.name)):
        raise UserError(f"no file is named like {data}: pack the shards first, or let data.file be one file")
    return shards or data.exists()


def _words(pack: str | None, data: str) -> list[str]:
    if pack is None:
        raise UserError(f"{data} does not exist: say how to make it, --pack 'scans --labels labels.csv'")
    try:
        words = shlex.split(pack)
    except ValueError as error:
        raise UserError(f"--pack {pack!r}: {error}; quote it as in a shell") from None
    if {"-o", "--output"} & {word.partition("=")[0] for word in words}:
        raise UserError(f"--pack {pack!r}: leave -o out; the file is data.file, {data}")
    return [*words, "-o", data]


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
        plan, whole = link.plan, link.step is None and pipeline.pack is None
        found[plan.run.name] = preflight.check(
            plan.experiment, plan.instance, pipeline.cluster, plan.script, plan.run.runs, payload=whole
        )
    _check_steps(pipeline, next(iter(found.values())))
    return found


def _check_steps(pipeline: Pipeline, findings: Findings) -> None:
    """The payload looks at its own arguments: what the last link needs is missed before the first one queues."""
    fold = pipeline.links[-1].plan.experiment.data.fold
    asked = {"pack": pipeline.pack, "data": pipeline.data, "split": pipeline.split, "fold": fold}
    answer = payload.ask("jobs.step", [], yamlfile.dump(asked))
    words = answer.stderr.strip().splitlines()
    if answer.returncode == ExitCode.DONE:
        findings.passed.append(answer.stdout.strip())
    elif answer.returncode == ExitCode.BAD_INPUT:
        findings.refusals += words[-1:]  # before it argparse prints the usage
    elif "ModuleNotFoundError" in answer.stderr:
        findings.unchecked.append(f"sources and split: {words[-1]} ('make setup' installs what jobs need)")
    else:
        findings.refusals.append(f"the payload's check failed: {words[-1] if words else answer.returncode}")


def submit(pipeline: Pipeline) -> list[tuple[RunDir, str]]:
    """Make and submit all links, or none: each run and its job. Raises UserError.

    On SLURM the first is held until all of them are accepted: a refusal finds none that has started.
    """
    made, jobs, cluster = _create(pipeline), list[str](), pipeline.cluster
    try:
        with arrays.taken_back("pipeline", cluster, [run.name for run in made], jobs):
            for run in made:
                jobs.append(submission.submit(run, cluster, _after(made, jobs, cluster)).job_id)
    except submission.Refused:
        _remove(made)
        raise
    if cluster == "slurm":
        arrays.release(jobs[:1])
    return list(zip(made, jobs, strict=True))


def _create(pipeline: Pipeline) -> list[RunDir]:
    made: list[RunDir] = []
    try:
        for link in pipeline.links:
            made.append(plans.create(link.plan))
            if link.step is not None:
                write_text(made[-1].step, yamlfile.dump(link.step))
    except BaseException as error:
        _remove(made)
        if isinstance(error, OSError):
            raise UserError(f"{pipeline.links[0].plan.run.runs}: nothing is made: {error.strerror}") from None
        raise
    return made


def _remove(made: list[RunDir]) -> None:
    for run in made:
        shutil.rmtree(run.path, ignore_errors=True)
    with suppress(OSError, IndexError):  # other runs are in it, or nothing was made
        made[0].runs.rmdir()


def _after(made: list[RunDir], jobs: list[str], cluster: str) -> list[str]:
    """What the next submission is given."""
    if cluster == "local":
        return [str(made[len(jobs) - 1].path)] if jobs else []
    return after.dependency([jobs[-1]]) if jobs else ["--hold"]
