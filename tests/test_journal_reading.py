"""The journal of real runs: its numbers are those of the run's own files, from its logs alone and in pieces, too."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hpc import payload
from hpc.cli import app
from hpc.journal.compare import number
from hpc.journal.compose import compose, metric_names
from hpc.journal.content import CURVE_POINTS, Table
from hpc.journal.evaluations import Evaluated
from hpc.journal.reading import read
from hpc.journal.rundata import RunData
from hpc.logs.sinks.facts import evaluations
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, append_line, read_json, write_json
from tests import tiny_run, tiny_tasks

KEPT = (
    "experiment.yaml",
    "data.json",
    "delta.yaml",
    "events",
    "metrics.jsonl",
    "figures",
    "usage",
    "result.json",
    "tb",
)


def trains(folder: Path) -> None:
    data = tiny_tasks.make_data(folder, "segmentation")
    (folder / "net.py").write_text(tiny_tasks.NETS)
    good = True
    for seed in range(3):
        overrides = (f"train.seed={seed}", "train.epochs=3", f"model.name=file:{folder}/net.py:Maps")
        run = tiny_tasks.make_run(folder / "runs" / f"tiny-0000000{seed}", data, "segmentation", *overrides)
        run.event("start", "shell", 1, job="55", node="node1", commit="0123abc")
        good = good and tiny_run.train(run) == "done"
    os._exit(ExitCode.DONE if good else ExitCode.CRASH)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three runs that differ in their seed alone."""
    folder = tmp_path_factory.mktemp("trained")
    assert tiny_run.in_child(trains, folder) == 0
    return folder / "runs"


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def report(folder: Path, *words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["report", "--runs", str(folder), "-o", str(folder.parent / "out"), *words])
    assert done.exit_code == code, done.output
    return done


def titled(tables: tuple[Table, ...], title: str) -> list[dict[str, str]]:
    found = next(table for table in tables if table.title.startswith(title))
    return [dict(zip([h.text for h in found.heads], [c.text for c in row], strict=True)) for row in found.rows]


def test_the_numbers_are_those_of_the_result(runs: Path) -> None:
    several = [RunDir(path) for path in sorted(runs.iterdir())]
    made = compose([read(run) for run in several], {})
    heads = [head.text for head in made.overview.heads]
    for run, row, section in zip(several, made.overview.rows, made.sections, strict=True):
        result, lines = read_json(run.result), {line["step"]: line for line in run.read_metrics()}
        shown = dict(zip(heads, row, strict=True))
        for name, value in result["best"]["metrics"].items():
            assert shown[name].text == number(value) and shown[name].sort == value
        assert shown["Best epoch"].sort == result["best"]["epoch"] == section.best_epoch
        for scores in titled(section.tables, "Training and validation"):
            name = scores["Metric"]
            for word, moment in (("Best", result["best"]), ("Last", result["last"])):
                assert scores[f"{word} validation"] == number(moment["metrics"].get(name))
                assert scores[f"{word} train"] == number(lines[moment["step"]]["train"].get(name))
        for row_of_class in titled(section.tables, "Classes"):
            told = next(one for one in result["per_class"] if one["name"] == row_of_class["Class"])
            assert row_of_class["Dice"] == number(told["dice"]) and row_of_class["Support"] == str(told["support"])
        for curve in section.curves:
            key = "train" if curve.split == "train" else "metrics"
            assert list(curve.values) == [line[key].get(curve.metric) for line in lines.values()]
            assert curve.steps == tuple(map(float, lines)) and curve.epochs == (1, 2, 3)
        facts = {fact["Fact"]: fact["Value"] for fact in titled(section.tables, "Facts")}
        assert facts["Jobs"] == "55" and facts["Commit"] == "0123abc"
        times = [line["time"] for line in lines.values()]
        assert facts["Seconds per epoch"] == number(statistics.median([times[1] - times[0], times[2] - times[1]]))
        assert times[-1] == pytest.approx(run.metrics.stat().st_mtime, abs=2) and times == sorted(times)
        assert {when for *_, when in evaluations(run)} == set(times), "for the sinks, too"
        assert facts["Parameters"] == "93" and read_json(run.state)["parameters"] == 60 + 12 + 21
        assert facts["Validation samples/s"] == number(result["samples_per_second"]["validation"])
    assert made.groups is not None and made.groups.rows[0][2].text == "3 of 3" and len(made.groups.rows) == 1


def test_logs_that_came_home_say_the_same(runs: Path, tmp_path: Path) -> None:
    home = tmp_path / "home" / "runs"
    for run in runs.iterdir():
        (home / run.name).mkdir(parents=True)
        for name in KEPT:
            if (run / name).is_dir():
                shutil.copytree(run / name, home / run.name / name)
            elif (run / name).exists():
                shutil.copy2(run / name, home / run.name / name)
    report(runs)
    report(home)
    for name in ("EXPERIMENTS.md", "index.html"):
        assert (tmp_path / "out" / name).read_bytes() == (home.parent / "out" / name).read_bytes()


def test_event_files_alone_tell_metrics_and_curves(runs: Path) -> None:
    run = RunDir(runs / "tiny-00000001")
    whole = read(run)
    for path in (run.metrics, run.result, run.data):
        path.unlink()
    bare = read(run)
    assert not bare.damage and bare.best["step"] == whole.best["step"] and bare.best["epoch"] == whole.best["epoch"]
    assert bare.best["metrics"] == pytest.approx(whole.best["metrics"], rel=1e-6), "events hold single precision"
    assert bare.validation(bare.best)["train"] == pytest.approx(whole.validation(whole.best)["train"], rel=1e-6)
    assert bare.speed == pytest.approx(whole.speed, rel=1e-5) and bare.waiting_share == pytest.approx(
        whole.waiting_share
    )
    assert bare.epoch_seconds == pytest.approx(whole.epoch_seconds, abs=0.5) and bare.parameters == whole.parameters
    wanted = {(curve.metric, curve.split): curve.values for curve in whole.curves}
    for curve in bare.curves:
        assert curve.values == pytest.approx(wanted[curve.metric, curve.split], rel=1e-6)
    shutil.rmtree(run.tensorboard)
    assert read(run).curves == () and read(run).best == {}


@pytest.mark.parametrize(
    "name", ["result.json", "metrics.jsonl", "experiment.yaml", "state.json", "data.json", "predictions/test.json"]
)
def test_a_damaged_file_is_named_and_costs_nothing_else(runs: Path, name: str) -> None:
    run = RunDir(runs / "tiny-00000002")
    (run.path / name).parent.mkdir(exist_ok=True)
    (run.path / name).write_text('{"step": 3, "spl: [')
    if name == "metrics.jsonl":
        (run.path / name).write_text('{"step": 3}\n')
    done = report(runs)
    assert f"{run.name}: " in done.output and Path(name).name in done.output and "Traceback" not in done.output
    text = (runs.parent / "out" / "EXPERIMENTS.md").read_text()
    state = next(line for line in text.splitlines() if line.startswith(f"| {run.name} |")).split(" | ")[1]
    assert state.endswith("; damaged") and text.count("; damaged |") == 2
    dice = read_json(RunDir(runs / "tiny-00000001").result)["best"]["metrics"]["dice"]
    assert number(dice) in text


def test_bad_lines_of_metrics_cost_those_lines_alone_and_are_named(runs: Path) -> None:
    run = RunDir(runs / "tiny-00000001")
    whole, good = read(run), run.metrics.read_text().splitlines()
    bad = [
        '{"generation": 1, "st',
        '{"step": 1, "split": "validation"}',
        "[1]",
        "words",
        '{"generation": 1, "step": "x"}',
    ]
    run.metrics.write_text("\n".join([good[0], *bad, "", *good[1:], '{"generation": 1, "torn']))
    found = read(run)
    assert found.damage == [
        "metrics.jsonl: left out: line 2 is no JSON (half a line?), line 3 has no generation, "
        "line 4 holds list, not an object, and 2 more"
    ]
    assert (found.curves, found.best, found.speed, found.used) == (whole.curves, whole.best, whole.speed, whole.used)
    run.result.unlink()
    assert read(run).damage == found.damage, "the usage is not blamed"


def test_lines_are_taken_back_as_the_run_itself_takes_them_back(tmp_path: Path) -> None:
    chance, run = random.Random(4), RunDir(tmp_path)
    for _ in range(200):
        line = {"generation": chance.randrange(1, 4), "step": chance.randrange(9), "split": chance.choice("ab")}
        append_line(run.metrics, line)
        append_line(run.metrics, {"step": 3})
        assert Evaluated(tmp_path).read_metrics() == run.read_metrics()
        if chance.random() < 0.1:
            run.metrics.unlink()


@pytest.mark.parametrize(
    "told",
    [
        {"step_seconds": {"data": "long"}, "mfu": [1]},
        {"step_seconds": {"data": float("inf")}},
        {"per_class": 3, "class_names": 4.0, "confusion_matrix": 5, "usage": 6, "attempts": float("inf")},
        {"confusion_matrix": ["words", [[1, 2], [3, 4]]]},
        {"confusion_matrix": [[[1, 2], [3, 4]], [[1], [2]], [[1, 2, 3], 4]]},
    ],
)
def test_a_result_of_odd_values_costs_those_alone(runs: Path, told: dict[str, Any]) -> None:
    run = RunDir(runs / "tiny-00000001")
    run.result.write_text(json.dumps(read_json(run.result) | told))
    shutil.rmtree(run.figures)
    report(runs)
    assert f"| {run.name} | finished |" in (runs.parent / "out" / "EXPERIMENTS.md").read_text()


def test_the_commit_of_logs_that_do_not_tell_it_comes_with_the_code(runs: Path, tmp_path: Path) -> None:
    """As those of older runs; a sweep's rows have one code, beside them."""
    sweep = tmp_path / "sweeps" / "tiny-sweep-1"
    shutil.copytree(runs / "tiny-00000001", sweep / "tiny-00000001")
    (sweep / "rows.txt").write_text("tiny-00000001\n")
    events = RunDir(sweep / "tiny-00000001").events / "001-shell.jsonl"
    events.write_text(events.read_text().replace(', "commit": "0123abc"', ""))
    for told in ("not in these logs; 'hpc sync --with code' brings it", "9876fed"):
        report(sweep.parent)
        text = (tmp_path / "out" / "EXPERIMENTS.md").read_text()
        assert f"| Commit | {told} |" in text and "| Sweep | tiny-sweep-1 |" in text
        (sweep / "code").mkdir(exist_ok=True)
        (sweep / "code" / "commit.txt").write_text("9876fed\n")


def test_what_an_evaluation_found_is_compared(runs: Path) -> None:
    for place, dice in enumerate((0.5, 0.75)):
        told = {"metrics": {"dice": dice, "odd": None}, "intervals": {"dice": [0.25, 0.875]}, "samples": 4}
        told |= {"checkpoint": "g001-s00000002", "bootstrap": {"confidence": 0.95}}
        run = RunDir(runs / f"tiny-0000000{place}")
        run.predictions.mkdir(exist_ok=True)
        write_json(run.prediction("test", ".json"), told)
    report(runs)
    text = (runs.parent / "out" / "EXPERIMENTS.md").read_text()
    assert "### Evaluation test: 4 samples, g001-s00000002" in text and "| odd | higher is better | – | – |" in text
    assert "| dice | higher is better | 0.75 (+0.25) | 0.25 to 0.875 |" in text
    assert "| test dice (higher is better) |" in text


def test_the_baseline_is_named_by_hand(runs: Path) -> None:
    told = json.loads(report(runs, "tiny-00000002", "--baseline", "00000001", "--json").stdout)
    assert [one["run"] for one in told["runs"]] == ["tiny-00000001", "tiny-00000002"], "which belongs to them"
    assert told["runs"][1]["baseline"] == "tiny-00000001" and told["runs"][1]["changes"] == {"train.seed": "2"}
    assert told["runs"][1]["best"] == read_json(RunDir(runs / "tiny-00000002").result)["best"]
    assert "to the baseline, tiny-00000001." in (runs.parent / "out" / "EXPERIMENTS.md").read_text()
    assert "no run 'none'" in report(runs, "--baseline", "none", code=1).exception.args[0]
    own = runs / "tiny-00000001" / "figures"
    assert "would show this one" in report(runs, "-o", str(own), code=1).exception.args[0]


def test_a_long_run_is_thinned_and_keeps_its_facts(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "long-1")
    run.path.mkdir()
    for step in range(1, 1001):
        metrics = {"loss": 1 / step if step != 701 else -1.0, "odd": None}
        line = {"generation": 1 + (step > 500), "step": step, "epoch": step, "split": "validation", "metrics": metrics}
        append_line(run.metrics, {**line, "samples_per_second": {"train": step}, "waiting_share": step / 1000})
    found = read(run)
    assert len(found.metrics) == 2 and found.best["step"] == 701 and found.last["step"] == 1000
    assert (found.speed["train"], found.waiting_share, found.attempts) == (500.5, 0.5005, 2)
    (curve,) = found.curves
    assert len(curve.steps) == CURVE_POINTS + 1 and (curve.steps[0], curve.steps[-1]) == (1, 1000)
    assert curve.values[curve.steps.index(701)] == -1, "the best one stays, wherever it lies"
    assert found.slim().curves == found.curves and found.slim().speed == found.speed


def test_seconds_per_epoch_leave_out_what_lies_between_attempts() -> None:
    told = [(1, 1, 100.0), (1, 2, 110.0), (1, 4, 130.0), (2, 5, 900.0), (2, 6, 912.0), (2, 7, None), (2, 8, "x")]
    lines = [{"generation": g, "epoch": epoch, "step": epoch, "time": time} for g, epoch, time in told]
    run = RunData("a", metrics=lines)
    assert run.epoch_seconds == run.slim().epoch_seconds == 10
    assert RunData("a", metrics=lines[3:4]).epoch_seconds is None


def test_a_report_without_runs_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert "no run to report" in str(report(tmp_path / "runs", code=1).exception)


def test_the_commit_of_a_snapshot(tmp_path: Path) -> None:
    assert payload.commit(tmp_path) == ""
    (tmp_path / "commit.txt").write_text("0123\n")
    assert payload.commit(tmp_path) == "0123"
    (tmp_path / "changes.diff").touch()
    assert payload.commit(tmp_path) == "0123 with changes"


def test_ones_own_model_is_its_file_and_what_that_imports(tmp_path: Path) -> None:
    model = "file:/runs/a-1/code/own/net.py:Net"
    assert payload.own_code(tmp_path, model) == payload.own_code(tmp_path, "timm:vit") == ""
    (tmp_path / "own").mkdir()
    codes = []
    texts = ("from layers import A", "import other"), ("from .layers import A", ""), ("from .layers import A", "B = 1")
    for text, layers in texts:
        (tmp_path / "own" / "net.py").write_text(text)
        (tmp_path / "own" / "layers.py").write_text(layers)
        codes.append(payload.own_code(tmp_path, model))
        (tmp_path / "own" / "script.py").write_text(f"not imported: {layers}")
        assert payload.own_code(tmp_path, model) == codes[-1]
    assert len(set(codes)) == 3 and {len(code) for code in codes} == {8}


def test_wall_time_of_events(tmp_path: Path) -> None:
    events = [{"time": time, "event": kind, "generation": generation} for time, kind, generation in (
        (1, "submit", 0), (10, "start", 1), (25, "signal", 1), (100, "start", 2), (140, "end", 2), (900, "submit", 0)
    )]  # fmt: skip
    assert RunData("a", events=events).wall_seconds == 55 and RunData("a").wall_seconds is None
    assert RunData("a", events=events, used={"seconds": 50}).wall_seconds == 50


def test_monitored_metrics_come_first_whatever_the_task() -> None:
    def run(name: str, **scores: float) -> RunData:
        return RunData(name, {"train": {"monitor": name}}, {}, {"best": {"metrics": scores}, "monitor": name})

    runs = [run("accuracy", loss=1, f1=0.5, accuracy=0.9), run("dice", loss=2, iou=0.3, dice=0.4)]
    assert metric_names(runs) == ["accuracy", "dice", "loss", "f1", "iou"]
