"""hpc drill: what it tells of runs that were stopped (made up: each promise can be broken), and real drills."""

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc import drill, drilling, drilltable, payload, plan, preflight, slurm, stepledger
from hpc.drilling import FINISHED, Injection, Road, Steps, Way
from hpc.drillproof import EQUAL, SAMPLES, Report, Rules, report
from hpc.errors import UserError
from hpc.ledger import look
from hpc.rundir import RunDir, append_line, write_json, write_text
from tests.fakeslurm import FakeSlurm, without_slurm
from tests.slurm.cluster import Cluster
from tests.tiny_run import make_data

TOTAL = 20
RULES = Rules(True, {Road.NOTICE: 120.0, Road.TERM: 30.0, Road.REQUEUE: 5.0}, 1.0, 300.0, False)
SOAK = os.environ.get("HPC_SOAK") == "1"


class MadeUp:
    """A run's folder as attempts leave it: each from one step to another, and what it saved."""

    def __init__(self, path: Path) -> None:
        self.run = RunDir(path)
        self.run.events.mkdir(parents=True)
        self.run.ledger.mkdir()
        self._generation = 0

    def attempt(self, first: int, last: int, *saved: int, signal: str = "", saved_in: float = 0.4) -> "MadeUp":
        """Steps `first` to `last`, checkpoints after `saved`; stopped by `signal` at the last step, if one is named."""
        self._generation += 1
        start = 1000.0 * self._generation
        self._event("start", start)
        for step in range(first, last + 1):
            line = stepledger.line(step, [(step, 7 * step)], 1 / step, step if step % 10 == 0 else None, False)
            append_line(stepledger.path(self.run, self._generation, 0), line)
        for step in saved:
            late = saved_in if signal and step == last else 0.0
            self._event("checkpoint", start + step + late, step=step, seconds=0.2)
        if signal:
            self._event("signal", start + last + 0.1, cause=signal, step=last, received=start + last)
        self._event("end", start + last + 5)
        return self

    def finish(self, weights: bytes = b"weights", accuracy: float = 0.5, claimed: int = 7) -> "MadeUp":
        final = self.run.checkpoints / f"g{self._generation:03d}-s{TOTAL:08d}"
        final.mkdir(parents=True)
        (final / "model.safetensors").write_bytes(weights)
        write_json(final / "manifest.json", {"files": {"model.safetensors": {"crc32": claimed}}, "step": TOTAL})
        write_json(final / "state.json", {"best": final.name})
        append_line(
            self.run.metrics,
            {"generation": self._generation, "step": TOTAL, "split": "validation", "metrics": {"accuracy": accuracy}},
        )
        write_json(self.run.result, {"finished": True})
        return self

    def way(self, *injections: Injection, ended: str = FINISHED) -> Way:
        return Way(self.run.path.name, self.run, "local", list(injections), ended=ended)

    def _event(self, kind: str, when: float, **fields: object) -> None:
        writer = "shell" if kind in ("start", "end") else "rank0"
        line = {"time": when, "event": kind, "generation": self._generation, **fields}
        append_line(self.run.events / f"{self._generation:03d}-{writer}.jsonl", line)


@pytest.fixture
def golden(tmp_path: Path) -> Way:
    return MadeUp(tmp_path / "undisturbed").attempt(1, TOTAL, 10, TOTAL).finish().way()


def stop(road: Road, step: int, generation: int = 1, **more: object) -> Injection:
    known = {"sent": 50.0, "back": 54.2, "work_s": 0.5, **more}
    return Injection(road, step / TOTAL, generation=generation, step=step, **known)  # type: ignore[arg-type]


def stopped(folder: Path) -> MadeUp:
    return MadeUp(folder / "stopped").attempt(1, 8, 8, signal="SIGUSR2").attempt(9, 14, 14, signal="SIGTERM")


def judge(golden: Way, *ways: Way, rules: Rules = RULES) -> tuple[list[Report], drilltable.Verdict]:
    reports = [report(way, golden, rules) for way in (golden, *ways)]
    return reports, drilltable.verdict(reports, rules, "hpc submit exp.yaml", "hpc drill exp.yaml")


def test_the_table_of_a_drill_where_all_is_as_promised(golden: Way, tmp_path: Path) -> None:
    clean = stopped(tmp_path).attempt(15, TOTAL, TOTAL).finish()
    hard = MadeUp(tmp_path / "killed").attempt(1, 8, 5).attempt(6, 13, 10).attempt(11, TOTAL, TOTAL).finish()
    reports, verdict = judge(
        golden,
        clean.way(stop(Road.NOTICE, 7), stop(Road.TERM, 13, 2)),
        hard.way(stop(Road.KILL, 8), stop(Road.KILL, 12, 2, back=60.0)),
    )
    assert drilltable.rows(reports, RULES) == [
        {"stopped by": "undisturbed", "back": "", "attempts": "1", "steps lost": "", "seconds lost": "", "saved in": "",
         "result": "the reference"},
        {"stopped by": "USR2 to ranks", "back": "1/1", "attempts": "3", "steps lost": "0", "seconds lost": "4.2",
         "saved in": "0.40 of 120 s", "result": EQUAL},
        {"stopped by": "SIGTERM to ranks", "back": "1/1", "attempts": "3", "steps lost": "0", "seconds lost": "4.2",
         "saved in": "0.40 of 30 s", "result": EQUAL},
        {"stopped by": "SIGKILL of a rank", "back": "2/2", "attempts": "3", "steps lost": "6, most 3",
         "seconds lost": "14, most 10", "saved in": "", "result": EQUAL},
    ]  # fmt: skip
    assert verdict.good and verdict.command == "hpc submit exp.yaml"
    assert verdict.words == (
        "safe here: USR2, SIGTERM (no step lost, saved within 0.40 s of 30 s); SIGKILL (2 of 2 came back, 3 steps lost "
        "at most; in a real run as much as is done in 5 min)"
    )
    told = drilltable.as_dict(reports, RULES, verdict)
    assert json.loads(json.dumps(told))["runs"][2]["stops"][0]["steps_lost"] == 3


BROKEN = {
    "a step is lost": ("USR2 at step 7: 2 steps were lost", {"resumed": 7}),
    "saved too late": ("USR2 at step 7: saved after 121.0 s, and SIGKILL comes after 120 s", {"saved_in": 121.0}),
    "no clean stop": ("USR2 at step 7: it was not stopped cleanly", {"signal": ""}),
    "other weights": ("stopped: model.safetensors at the end differs", {"weights": b"Weights"}),
    "a sum that differs": ("stopped: model.safetensors at the end differs", {"claimed": 8}),
    "another metric": ("stopped: its metrics differ", {"accuracy": 0.6}),
    "a step left out": ("stopped: 1 steps are missing, the first is 9", {"resumed": 10}),
    "an attempt too many": ("stopped: 1 attempt more than the drill caused", {"more": True}),
    "not back": ("stopped: it did not finish (failed: out of memory)", {"ended": "failed: out of memory"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_promise_of_a_clean_stop_can_be_broken(golden: Way, tmp_path: Path, name: str) -> None:
    sentence, how = BROKEN[name]
    first = {"signal": "SIGUSR2"} | {key: how[key] for key in ("signal", "saved_in") if key in how}
    run = MadeUp(tmp_path / "stopped").attempt(1, 8, 8, **first)
    if how.get("more"):
        run.attempt(9, 12, 12)
    run.attempt(13 if how.get("more") else how.get("resumed", 9), TOTAL, TOTAL)
    run.finish(**{key: how[key] for key in ("weights", "claimed", "accuracy") if key in how})
    way = run.way(stop(Road.NOTICE, 7), ended=how.get("ended", FINISHED))
    _, verdict = judge(golden, way)
    assert not verdict.good and sentence in verdict.words
    assert verdict.command == f"hpc why {run.run.path}"


def test_a_kill_may_cost_one_interval_and_no_more(golden: Way, tmp_path: Path) -> None:
    run = MadeUp(tmp_path / "killed").attempt(1, 12, 6, 10).attempt(7, TOTAL, TOTAL).finish()
    _, verdict = judge(golden, run.way(stop(Road.KILL, 12)))
    assert "SIGKILL at step 12: it went on from step 6, and step 10 was saved" in verdict.words
    run = MadeUp(tmp_path / "late").attempt(1, 12).attempt(1, TOTAL, TOTAL).finish()
    _, verdict = judge(golden, run.way(stop(Road.KILL, 12, work_s=2.3)))
    assert verdict.good, "1 s between saves, 0.2 s for each of two, and what is seen late"
    _, verdict = judge(golden, run.way(stop(Road.KILL, 12, work_s=2.5)))
    assert "2.5 s of work (12 steps) were lost, and 2.4 s is the most that may be" in verdict.words
    _, verdict = judge(golden, run.way(stop(Road.KILL, 12, work_s=2.5, longest_s=0.2)))
    assert verdict.good, "no save is made while a validation runs"


def test_a_stop_that_came_too_late_proves_nothing_and_one_unheard_is_a_fault(golden: Way, tmp_path: Path) -> None:
    run = MadeUp(tmp_path / "killed").attempt(1, TOTAL, TOTAL).finish()
    never = Injection(Road.KILL, 0.9)
    _, verdict = judge(golden, run.way(stop(Road.KILL, TOTAL - 1, back=50.1), never))
    assert not verdict.good and "not shown: 2 stops came after the end of so short a run" in verdict.words
    assert verdict.command == "hpc drill exp.yaml --steps 100"
    _, verdict = judge(golden, run.way(never), rules=replace(RULES, every_s=3600.0))
    assert "not shown: 1 stop came after a run whose saves are 60 min apart" in verdict.words
    assert verdict.command == "hpc drill exp.yaml train.checkpoint_every=1s"
    _, verdict = judge(golden, run.way(stop(Road.TERM, 5, ignored=True)))
    assert "SIGTERM at step 5: the run went on as if nothing had been sent" in verdict.words
    _, verdict = judge(golden, run.way(Injection(Road.REQUEUE, 0.5, refused="requeue is disabled")))
    assert verdict.good and "not possible here: user's requeue (requeue is disabled)" in verdict.words


def test_a_reference_that_was_disturbed_is_none(tmp_path: Path) -> None:
    run = MadeUp(tmp_path / "undisturbed").attempt(1, 8, 8).attempt(9, TOTAL, TOTAL).finish().way()
    reports, verdict = judge(run)
    assert reports[0].result == "1 attempt more than the drill caused" and not verdict.good
    run = MadeUp(tmp_path / "silent").attempt(2, 1).finish().way()
    assert "undisturbed" not in judge(run)[1].words and "silent: it kept no step ledger" in judge(run)[1].words


def test_weights_may_differ_where_they_are_not_promised_equal_and_samples_never(golden: Way, tmp_path: Path) -> None:
    free = replace(RULES, promised=False)
    clean = stopped(tmp_path).attempt(15, TOTAL, TOTAL).finish(weights=b"other")
    way = clean.way(stop(Road.NOTICE, 7), stop(Road.TERM, 13, 2))
    reports, verdict = judge(golden, way, rules=free)
    assert verdict.good and reports[1].result == SAMPLES and "train.deterministic is off" in verdict.words
    path = stepledger.path(clean.run, 3, 0)
    path.write_text(path.read_text().replace("[[17, 119]]", "[[17, 118]]"))
    reports, verdict = judge(golden, way, rules=free)
    assert not verdict.good and "samples: 1 steps differ, the first is 17" in verdict.words


def test_where_and_when_runs_are_stopped_follows_from_the_seed() -> None:
    roads = [Road.NOTICE, Road.TERM, Road.REQUEUE]
    stops = drilling.clean_stops(roads, random.Random(3))
    assert [one.road for one in stops] == roads
    assert [int(one.share * 3) for one in stops] == [0, 1, 2], "each in its own third"
    first, second = (drilling.kills(5, random.Random(1), 10.0) for _ in range(2))
    assert first == second != drilling.kills(5, random.Random(2), 10.0)
    assert [one.share for one in first] == sorted(one.share for one in first)
    assert all(one.after_save_s is not None and 0 <= one.after_save_s < 10 for one in first)
    assert [Injection(Road.KILL, share).target(60) for share in (0.0, 0.5, 0.999)] == [1, 30, 59]


def test_steps_are_read_once_and_a_torn_line_later(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.ledger.mkdir(parents=True)
    steps = Steps(run, 2)
    steps.update()
    assert steps.last == 0
    file = stepledger.path(run, 2, 0)
    file.write_bytes(b'{"step": 4}\n{"step": 5}\n{"st')
    steps.update()
    seen = dict(steps.seen)
    assert list(seen) == [4, 5]
    file.write_bytes(file.read_bytes() + b'ep": 6}\n')
    steps.update()
    assert list(steps.seen) == [4, 5, 6] and {key: steps.seen[key] for key in seen} == seen


def write_state(run: RunDir, generation: int, job: str, phase: str = "training") -> None:
    held = {"job": job, "host": "node0", "pid": 1, "phase": phase, "time": time.time(), "started": time.time()}
    write_json(run.state, {"generation": generation, "steps": TOTAL, **held})


def test_on_slurm_signals_go_to_the_tasks_and_a_requeued_job_starts_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", fake.path)
    slurm.send("7", "SIGTERM")
    slurm.send("7", "SIGKILL")
    assert fake.calls() == ["scancel --signal=SIGTERM 7", "scancel --signal=SIGKILL 7.0"], "KILL 7 would cancel it"
    made = MadeUp(tmp_path / "runs" / "stopped-0000aaaa").attempt(1, 8)
    write_text(made.run.experiment, "name: stopped\n")
    write_json(made.run.submit, {"cluster": "slurm", "job": "90", "time": time.time()})
    way = Way("stopped", made.run, "slurm", [Injection(Road.NOTICE, 0.3), Injection(Road.REQUEUE, 0.6)])
    write_state(made.run, 1, "90")
    way.advance()
    assert fake.calls()[-1] == "scancel --signal=SIGUSR2 90" and way.sent[0].step == 8
    fake.job("90", "PENDING", reason="BeginTime", comment=made.run.name)
    way.look(look([made.run])[0])
    way.look(look([made.run])[0])
    moved = [call for call in fake.calls() if "StartTime" in call]
    assert moved == ["scontrol update JobId=90 StartTime=now+1"], "once, and again only if it still waits later"
    made.attempt(9, 9)
    write_state(made.run, 2, "90")
    way.advance()
    assert way.sent[0].back and way.words.startswith("back after")
    way.advance()
    assert len(way.sent) == 1, "the next one is wanted at step 12"
    made.run.ledger.joinpath("002-rank0.jsonl").open("a").write('{"step": 12}\n')
    way.advance()
    assert fake.calls()[-1] == "scontrol requeue 90" and way.words == "requeue sent at step 12"


def test_a_road_that_is_refused_is_left_out_and_a_run_that_is_gone_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", fake.path)
    fake.fails("scontrol", "Requested operation is presently disabled for job 90")
    made = MadeUp(tmp_path / "runs" / "stopped-0000aaaa").attempt(1, 8)
    write_text(made.run.experiment, "name: stopped\n")
    write_json(made.run.submit, {"cluster": "slurm", "job": "90", "time": time.time()})
    way = Way("stopped", made.run, "slurm", [Injection(Road.REQUEUE, 0.3)])
    write_state(made.run, 1, "90")
    way.advance()
    assert "disabled" in way.injections[0].refused and not way.sent
    fake.job("90", "CANCELLED", comment=made.run.name)
    way.look(look([made.run])[0])
    assert not way.ended, "one look may come in between"
    way.look(look([made.run])[0])
    assert way.ended.startswith("cancelled")


def test_a_second_kill_waits_for_a_new_checkpoint(tmp_path: Path) -> None:
    made = MadeUp(tmp_path / "killed").attempt(1, 18, 6)
    before = Injection(Road.KILL, 0.1, generation=1, step=7, sent=1010.0, back=1015.0)
    way = Way("killed", made.run, "local", [before, Injection(Road.KILL, 0.2, after_save_s=5.0)], total=TOTAL)
    assert not way._has_saved(5.0)
    now = time.time()
    append_line(made.run.events / "002-rank0.jsonl", {"time": now, "event": "checkpoint", "generation": 2, "step": 9})
    assert not way._has_saved(5.0) and way._has_saved(-1.0), "not so soon after it"
    way.injections[0].generation = 0
    assert way._has_saved(5.0), "the first one need not wait"


EXPERIMENT = """
name: small
model: {name: resnet3d_tiny, width: 4, layers: 1, downsample: [], stem_stride: 2, dropout: 0.2}
data: {file: scans.h5, batch_size: 4, augment: {flip: [0]}, threads: 1}
train: {epochs: 50, device: cpu, optimizer: {lr: 0.02}}
launch: {instance: laptop, cluster: local, cpus: 1, mem: 1GB, time: 20min}
"""
SPLITS = {"train": 800, "validation": 12, "test": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drill")
    make_data(folder, SPLITS)
    (folder / "small.yaml").write_text(EXPERIMENT)
    return folder


def hpc(folder: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc.cli", *words]
    root = Path(__file__).resolve().parent.parent
    own = {**os.environ, "COLUMNS": "160", "HPC_ROOT": str(root), "PYTHONPATH": str(root), **environ}
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)


ANSWERS: dict[str, subprocess.CompletedProcess[str]] = {}


@pytest.fixture
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preflight's process looks at data and model, which these experiments have in common, once for each file."""

    def ask(module: str, arguments: list[str], text: str) -> subprocess.CompletedProcess[str]:
        (file,) = re.findall(r"^  file: (.*)$", text, re.MULTILINE)
        if file not in ANSWERS:
            ANSWERS[file] = payload.ask(module, arguments, text)
        return ANSWERS[file]

    monkeypatch.setattr(preflight, "ask", ask)


@pytest.mark.usefixtures("asked_once")
def test_the_drill_refuses_what_it_cannot_do(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_slurm(monkeypatch)
    runs, file = tmp_path / "runs", folder / "small.yaml"
    with pytest.raises(UserError, match=r"^train.epochs, name: the drill sets this itself; --steps says"):
        drill.make(file, ["train.epochs=3", "name=x"], runs, 1, 60, 0)
    with pytest.raises(UserError, match=r"GB are free, and the checkpoints of three runs may take .*--runs or"):
        drill.make(file, [f"train.keep={10**9}"], runs, 1, 60, 0)
    with pytest.raises(UserError, match=r"none\.h5"):
        drill.make(file, [f"data.file={tmp_path / 'none.h5'}"], runs, 1, 60, 0)
    planned = drill.make(file, ["train.checkpoint_every=7s"], runs, 0, 250, 0)
    assert not runs.exists(), "nothing is made before all is known"
    assert list(planned.plans) == ["undisturbed", "stopped"]
    train = planned.plans["stopped"].experiment.train
    assert (train.epochs, train.checkpoint_every, train.ledger) == (2, 7, True), "200 steps are an epoch"
    assert planned.rules == Rules(True, {Road.NOTICE: 120.0, Road.TERM: 30.0}, 7.0, 7.0, False)
    assert planned.submit == f"hpc submit {file} train.checkpoint_every=7s"


@pytest.mark.usefixtures("asked_once")
def test_each_stage_of_a_drill_is_short_and_nothing_ends_it_early(folder: Path, tmp_path: Path) -> None:
    stages = "[{epochs: 30, freeze: backbone}, {epochs: 70, lr: 1e-4}]"
    staged = folder / "staged.yaml"
    staged.write_text(f"base: small.yaml\ntrain: {{epochs: null, early_stopping: {{patience: 1}}, stages: {stages}}}\n")
    given = ["train.ema={decay: 0.9}", "launch.cluster=local"]
    planned = drill.make(staged, given, tmp_path / "runs", 0, 700, 0)
    train = planned.plans["stopped"].experiment.train
    assert [(stage.epochs, stage.freeze, stage.lr) for stage in train.stages] == [(2, "backbone", None), (2, (), 1e-4)]
    assert train.epochs == 4 and train.early_stopping is None and train.ema


@pytest.mark.parametrize(
    ("scheduler", "wanted"),
    [
        ("{name: cosine, warmup_epochs: 20}", {"name": "cosine", "warmup_epochs": 1.0}),
        ("{name: step, milestones: [30, 60], gamma: 0.5}", {"name": "step", "step_size": 1, "gamma": 0.5}),
    ],
)
@pytest.mark.usefixtures("asked_once")
def test_a_schedule_is_made_to_fit_the_epochs_of_a_drill(
    scheduler: str, wanted: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    long = folder / "long.yaml"
    long.write_text(f"base: small.yaml\ntrain: {{epochs: 100, scheduler: {scheduler}}}\n")
    train = drill.make(long, ["launch.cluster=local"], tmp_path / "runs", 0, 250, 0).plans["stopped"].experiment.train
    assert train.epochs == 2 and train.scheduler.model_dump(exclude_defaults=True) == wanted
    long.write_text(
        f"base: small.yaml\ntrain: {{epochs: null, stages: [{{epochs: 90}}, {{epochs: 90}}], scheduler: {scheduler}}}\n"
    )
    train = drill.make(long, ["launch.cluster=local"], tmp_path / "runs", 0, 250, 0).plans["stopped"].experiment.train
    assert train.epochs == 2 and all(stage.scheduler for stage in train.stages)


PROMISES = {
    (): True,
    ("train.deterministic='off'",): False,
    ("train.device=cuda",): False,
    ("train.device=cuda", "train.deterministic=run"): True,
    ("train.device=auto", "launch.instance=cedia-a100-40gb"): False,
}


@pytest.mark.parametrize("overrides", PROMISES, ids=" ".join)
def test_equal_weights_are_promised_where_they_are_computed_equal(overrides: tuple[str, ...], folder: Path) -> None:
    planned = plan.make(folder / "small.yaml", list(overrides), folder / "runs")
    assert drill._rules(planned, "local", 300.0).promised == PROMISES[overrides]


def test_a_real_drill_here(folder: Path) -> None:
    """Six attempts of a run of seconds: undisturbed, stopped twice, killed once, none of it near its end."""
    done = hpc(folder, "drill", "small.yaml", "--kills", "1", "--steps", "400", "--seed", "4", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    (made,) = (folder / "runs").glob("drill-small-*")
    assert told == json.loads((made / "drill.json").read_text()) and told["good"]
    assert [run["result"] for run in told["runs"]] == ["the reference", EQUAL, EQUAL]
    assert [run["attempts"] for run in told["runs"]] == [1, 3, 2]
    notice, term = told["runs"][1]["stops"]
    assert (notice["road"], term["road"]) == ("USR2", "SIGTERM")
    assert notice["steps_lost"] == term["steps_lost"] == 0
    assert 0 < notice["saved_s"] < 30 and notice["seconds_lost"] > 0
    (kill,) = told["runs"][2]["stops"]
    assert kill["road"] == "SIGKILL" and kill["back"] and kill["steps_lost"] >= 0
    assert "killed       SIGKILL sent at step" in done.stderr
    assert json.loads(hpc(folder, "ls", "--json").stdout) == [], "it clutters no list"
    listed = json.loads(hpc(folder, "ls", "--json", "--runs", str(made)).stdout)
    assert {run["state"] for run in listed} == {FINISHED} and len(listed) == 3


if SOAK:  # two minutes

    @pytest.mark.slurm
    def test_a_real_drill_on_two_nodes(folder: Path) -> None:
        with Cluster() as cluster:
            words = ("launch.cluster=slurm", "launch.instance=cedia-a100-40gb-nodes", "launch.nodes=2", "launch.gpus=1")
            own = {key: cluster.environment()[key] for key in ("SLURM_CONF", "PATH")}
            done = hpc(folder, "drill", "small.yaml", *words, "launch.partition=grace", "--steps", "800", **own)
            print(done.stderr, done.stdout)
            assert done.returncode == 0, done.stdout + done.stderr + cluster.evidence()
        for line in (
            "USR2 to ranks      1/1",
            "SIGTERM to ranks   1/1",
            "user's requeue     1/1",
            "SIGKILL of a rank  5/5",
        ):
            assert line in done.stdout
        assert done.stdout.count(EQUAL) == 4
