"""`hpc drill`: a short form of an experiment, run undisturbed, stopped cleanly and killed, to trust a cluster.

runs/drill-<name>-<id>/ is a folder of runs of its own, which `hpc ls` does not show: the three runs, and drill.json.
"""

from __future__ import annotations

import json
import random
import re
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc import (
    badnodes,
    drilling,
    drillproof,
    drilltable,
    fit,
    ledger,
    localstep,
    plan,
    preflight,
    slurm,
    submission,
    template,
)
from hpc.cluster import Cluster
from hpc.drilling import Road, Way
from hpc.drillproof import Report, Rules
from hpc.drilltable import Verdict
from hpc.drillview import View
from hpc.errors import UserError
from hpc.experiment import load
from hpc.optimisation import Scheduler
from hpc.plan import Plan
from hpc.preflight import Findings
from hpc.rundir import RunDir, write_json
from hpc.training import Train

_WAYS = ("undisturbed", "stopped", "killed")
_LOOK_S = 1.0
_POLL_S = 0.02
"""A step of a small model takes as long."""
_SPARE = 3
"""Crashes that the budget has room for, beside the kills."""
_OURS = ("name", "train.epochs", "train.limit_steps", "train.ledger", "launch.budgets.crash")
_COPIES = 2
"""Checkpoints beside those that are kept: the best, and the one that is being written."""
_MOMENTS = {"sgd": 4}
_WEIGHT, _MOST_MOMENTS = 4, 8
"""Bytes of a checkpoint for each parameter: the weight, and what the optimizer knows of it (Adam's two)."""
_END_S = 60.0


@dataclass(frozen=True)
class Drill:
    """What is to be done; nothing is made yet."""

    folder: Path
    """Of its runs."""
    plans: dict[str, Plan]
    """undisturbed, stopped, killed."""
    cluster: str
    rules: Rules
    findings: Findings
    kills: int
    seed: int
    submit: str
    """The command that starts the experiment for real."""
    again: str
    """This command, without --steps."""


def make(file: Path, overrides: list[str], runs: Path, kills: int, steps: int, seed: int) -> Drill:
    """Shorten the experiment, and check it and its three runs. Raises UserError."""
    if taken := [text for text in overrides if text.partition("=")[0] in _OURS]:
        keys = ", ".join(text.partition("=")[0] for text in taken)
        raise UserError(f"{keys}: the drill sets this itself; --steps says how long its runs are, --kills how many")
    given = [text.partition("=")[0] for text in overrides]
    own = ["train.ledger=true", f"launch.budgets.crash={kills + _SPARE}", "launch.mail=null"]
    own += [] if "train.checkpoint_every" in given else [drilltable.EVERY]
    whole = plan.make(file, [*overrides, *own], runs)
    cluster = submission.choose_cluster(whole.experiment.launch.cluster)
    findings = preflight.check(whole.experiment, whole.instance, cluster, whole.script, whole.run.runs)
    if findings.refusals:
        raise UserError("\n".join(findings.refusals))
    length = _length(whole, findings, steps)
    own += length
    _check_space(whole, findings, runs)
    own_id = secrets.token_hex(4)
    folder = runs / f"drill-{whole.experiment.name}-{own_id}"
    ways = _WAYS if kills else _WAYS[:-1]
    # A job is found by its run's name: no other drill may have the same.
    plans = {way: plan.make(file, [*overrides, *own, f"name={way}-{own_id}"], folder) for way in ways}
    words = shlex.join([str(file), *overrides])
    again = f"hpc drill {words} --kills {kills} --seed {seed}"
    every_s = float(load(file, overrides)[0].train.checkpoint_every)
    rules = _rules(plans[_WAYS[0]], cluster, every_s)
    return Drill(folder, plans, cluster, rules, findings, kills, seed, f"hpc submit {words}", again)


def _length(whole: Plan, findings: Findings, steps: int) -> list[str]:
    """About so many steps in two epochs or more: the end of an epoch is drilled, too."""
    batch, samples = whole.experiment.data.batch_size, _number(findings, r"^data: .* ([\d,]+) train")
    limit = max(1, steps // 2)
    epoch = limit if samples is None else min(limit, max(1, samples // batch))
    return [*_epochs(whole.experiment.train, -(-steps // epoch)), f"train.limit_steps={limit}"]


def _epochs(train: Train, epochs: int) -> list[str]:
    """The overrides for so many epochs, at least one in each stage, with schedules to fit; nothing ends them early."""
    stages = [stage.model_dump(mode="json") for stage in train.stages]
    for number, stage in enumerate(stages):
        stage["epochs"] = max(1, (epochs + number) // len(stages))
        own = train.stages[number].scheduler or train.scheduler
        if own.idle_fault(stage["epochs"]):
            stage["scheduler"] = _scheduler(own, stage["epochs"])
    total = sum(stage["epochs"] for stage in stages) if stages else epochs
    staged = [f"train.stages={json.dumps(stages)}"] if stages else []
    if not stages and train.scheduler.idle_fault(epochs):
        staged = [f"train.scheduler={json.dumps(_scheduler(train.scheduler, epochs))}"]
    return [*staged, f"train.epochs={total}", *(["train.early_stopping=null"] if train.early_stopping else [])]


def _scheduler(scheduler: Scheduler, epochs: int) -> dict[str, Any]:
    """Of the same kind, where it ends within so many epochs."""
    told = scheduler.model_dump(mode="json") | {"warmup_epochs": min(scheduler.warmup_epochs, epochs / 2)}
    if scheduler.name != "step":
        return told
    stairs = {"step_size": 1} if epochs > 1 else {"name": "constant", "step_size": None, "gamma": None}
    return told | {"milestones": [], **stairs}


def _number(findings: Findings, pattern: str) -> int | None:
    """What jobs.check told of the data or the model; None where it could not run."""
    found = next(filter(None, (re.search(pattern, line) for line in findings.passed)), None)
    return int(found[1].replace(",", "")) if found else None


def _check_space(whole: Plan, findings: Findings, runs: Path) -> None:
    """The data are read where they are; of the checkpoints of three runs there must be room. Raises UserError."""
    parameters = _number(findings, r"^model: .* ([\d,]+) parameters")
    if parameters is None:
        return
    train = whole.experiment.train
    needed = len(_WAYS) * (train.keep + _COPIES) * parameters * _bytes(train)
    there = next(path for path in (runs, *runs.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{there}: {free / 1e9:.2g} GB are free, and the checkpoints of three runs may take {needed / 1e9:.2g} GB: "
            f"choose another folder with --runs or HPC_RUNS"
        )


def _bytes(train: Train) -> int:
    """Of a checkpoint, for each parameter."""
    weights = _WEIGHT * (2 if train.ema else 1)
    return weights + _MOMENTS.get(train.optimizer.name, _MOST_MOMENTS)


def _rules(planned: Plan, cluster: str, own_every_s: float) -> Rules:
    train, request = planned.experiment.train, planned.instance.request(planned.experiment.launch)
    on_cpu = train.device == "cpu" or (train.device == "auto" and not request.gpus)
    promised = train.deterministic in ("run", "layout") or (train.deterministic == "auto" and on_cpu)
    notice = float(template.notice_seconds(request))
    if cluster == "local":
        budgets = {Road.NOTICE: notice, Road.TERM: localstep.GRACE_S}
    else:
        budgets = _budgets(planned, notice)
    return Rules(promised, budgets, float(train.checkpoint_every), own_every_s, cluster == "slurm")


def _budgets(planned: Plan, notice: float) -> dict[Road, float]:
    """Seconds until SIGKILL: of a time limit's notice, a preemption, and a requeue. Raises UserError."""
    try:
        live = Cluster.look()
    except slurm.SlurmError as error:
        raise UserError(f"{error}: try again, or run on this machine: launch.cluster=local") from None
    partitions = fit.choose(live, planned.experiment.launch.partition or planned.instance.partition)
    wait = float(live.settings.kill_wait_s)
    graces = [float(told) for name in partitions if (told := live.notice_s(name)) is not None]
    grace = min(graces, default=wait)
    heard_first = live.settings.user_signal and bool(graces)
    return {Road.NOTICE: min(notice, grace) if heard_first else notice, Road.TERM: grace, Road.REQUEUE: wait}


def run(drill: Drill) -> tuple[list[Report], Verdict]:
    """Submit the three runs, disturb two of them, compare. Ctrl-C, or any failure, cancels what is under way.

    On SLURM they run side by side; here one after the other. Raises UserError where one cannot be submitted.
    """
    ways = _make(drill)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with View(ways) as view:
            _follow(drill, ways, view)
    except BaseException:
        _cancel(ways)
        print(f"the drill is not finished; its runs are in {drill.folder}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    reports = [drillproof.report(way, ways[0], drill.rules) for way in ways]
    verdict = drilltable.verdict(reports, drill.rules, drill.submit, drill.again)
    write_json(drill.folder / "drill.json", drilltable.as_dict(reports, drill.rules, verdict))
    return reports, verdict


def _make(drill: Drill) -> list[Way]:
    draw = random.Random(drill.seed)
    roads = [road for road in (Road.NOTICE, Road.TERM, Road.REQUEUE) if road in drill.rules.budgets]
    todo = {
        "undisturbed": [],
        "stopped": drilling.clean_stops(roads, draw),
        "killed": drilling.kills(drill.kills, draw, drill.rules.every_s),
    }
    plan.make_whole(drill.folder, lambda aside: None)
    return [Way(name, plan.create(planned), drill.cluster, todo[name]) for name, planned in drill.plans.items()]


def _follow(drill: Drill, ways: Sequence[Way], view: View) -> None:
    """Until all have ended."""
    waiting, active = list(ways), list[Way]()
    scheduler, looked = ledger.Scheduler(_LOOK_S), 0.0
    while waiting or active:
        while waiting and (drill.cluster == "slurm" or not active):
            active.append(waiting.pop(0))
            _submit(drill, active[-1])
        for way in active:
            way.advance()
        if time.monotonic() > looked + _LOOK_S:
            looked = time.monotonic()
            for way, seen in zip(active, ledger.look([way.run for way in active], scheduler), strict=True):
                way.look(seen)
        view.show()
        active = [way for way in active if not way.ended]
        time.sleep(_POLL_S)


def _submit(drill: Drill, way: Way) -> None:
    way.words = "submitted"
    options = badnodes.exclusion(drill.folder.parent) if drill.cluster == "slurm" else []
    with _deaf_to_interrupts():
        submission.submit(way.run, drill.cluster, options)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started here inherits it: Ctrl-C reaches this process alone, which then cancels its runs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _cancel(ways: Sequence[Way]) -> None:
    """End the drill's own runs, and say so; one that is just starting is asked again."""
    end = time.monotonic() + _END_S
    left = [way for way in ways if not way.ended]
    while left and time.monotonic() < end:
        alive = [way for way in left if ledger.status(way.run).live]
        for way in alive:
            with suppress(UserError):
                print(f"{way.name}: cancelled {ledger.cancel_all([way.run])[0]}", file=sys.stderr)
                left.remove(way)
        left = [way for way in left if way in alive]
        time.sleep(_POLL_S)


def remove(drill: Drill) -> None:
    """Remove the drill's folder, once the batch scripts have left it."""
    end = time.monotonic() + _END_S
    left = [RunDir(planned.run.path) for planned in drill.plans.values()]
    while left and time.monotonic() < end:
        left = [run for run in left if not _has_left(run)]
        time.sleep(_POLL_S)
    shutil.rmtree(drill.folder)


def _has_left(run: RunDir) -> bool:
    last = run.last_generation()
    return any(event["event"] == "end" and event["generation"] == last for event in run.read_events())
