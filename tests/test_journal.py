"""The journal: facts drawn from a run's files, Markdown and HTML, notes that survive, nothing unescaped."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hpc.errors import UserError
from hpc.journal import captions, cells, compare, notes
from hpc.journal.markdown import escape
from hpc.journal.report import RunData, write_report
from hpc.metrics import is_finite
from hpc.rundir import RunDir, append_line
from hpc.tables import printable

CLASSES = ["amygdala", "hippocampus", "thalamus"]
OWN_SCRIPTS: list[dict[str, str | None]] = [{"type": "application/json", "id": "data"}, {}]
NASTY = "<script>alert('x')</script> & | `code` *bold* _it_ [a](javascript:b) <!-- /notes -->"


def evaluation(epoch: int, accuracy: float, loss: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 75 * epoch,
        "checkpoint": f"g001-s{75 * epoch:08d}",
        "metrics": {"accuracy": accuracy, "f1_macro": accuracy - 0.05, "loss": loss},
    }


def result(accuracy: float = 0.91, loss: float = 0.31, recalls: tuple[float, ...] = (0.9, 0.5, 0.7)) -> dict[str, Any]:
    per_class = zip(CLASSES, recalls, strict=True)
    return {
        "finished": True,
        "task": "classification",
        "class_names": CLASSES,
        "steps": 375,
        "epochs": 5,
        "best": evaluation(4, accuracy, loss),
        "last": evaluation(5, accuracy - 0.01, loss + 0.02),
        "monitor": "accuracy",
        "direction": "max",
        "majority": 0.1667,
        "samples_per_second": {"train": 31.04, "validation": 80.2},
        "waiting_share": 0.0123,
        "attempts": 2,
        "per_class": [
            {"name": name, "support": 40, "precision": 0.8, "recall": recall, "f1": 0.6} for name, recall in per_class
        ],
        "confusion_matrix": [[36, 3, 1], [10, 20, 10], [6, 6, 28]],
    }


EXPERIMENT = {
    "task": "classification",
    "model": {"name": "resnet3d"},
    "train": {"monitor": "accuracy"},
    "launch": {"instance": "cedia-a100-40gb", "nodes": 2, "gpus": 4, "tasks_per_node": None},
}
EVENTS = [
    {"time": 1.0, "event": "submit", "generation": 0},
    {"time": 2.0, "event": "start", "generation": 1},
    {"time": 2.1, "event": "start", "generation": 1},
    {"time": 3.0, "event": "signal", "generation": 1},
    {"time": 3.1, "event": "signal", "generation": 1},
    {"time": 4.0, "event": "requeue", "generation": 1},
    {"time": 5.0, "event": "start", "generation": 2},
    {"time": 6.0, "event": "end", "generation": 2},
]


def line(generation: int, step: int, accuracy: float, split: str = "validation") -> dict[str, Any]:
    metrics = {"accuracy": accuracy, "loss": 1 - accuracy}
    return {"generation": generation, "step": step, "epoch": step // 75, "split": split, "metrics": metrics}


def png(path: Path, shade: int = 0) -> Path:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header, pixel = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0), zlib.compress(bytes([0, shade]))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b""))
    return path


def finished(run: str, **options: Any) -> RunData:
    return RunData(run, EXPERIMENT, options.pop("delta", {}), result(**options), (), EVENTS)


def table(text: str, heading: str, run: str = "") -> list[list[str]]:
    """The cells of the table behind `heading` (in the section of `run`) of EXPERIMENTS.md, without the rule."""
    part = text[text.index(f"## {run}") :] if run else text
    part = part[part.index(heading) :].split("\n\n")[1]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in part.splitlines()]
    return [rows[0], *rows[2:]]


class Page(HTMLParser):
    """Texts, tags and attributes of a page; fails where tags do not close in order."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    @property
    def scripts(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "script"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# --- facts of one run -----------------------------------------------------------------------------------------------


def test_states_of_runs_without_a_result() -> None:
    assert RunData("a").state == "not started"
    assert RunData("a", metrics=[line(1, 75, 0.5)]).state == "no result yet"
    states = [RunData("a", events=EVENTS[:count]).state for count in (1, 2, 5, 6, 8)]
    assert [state.split(",")[0] for state in states] == [
        "submitted", "started", "stopping", "requeued", "ended without a result"
    ]  # fmt: skip
    failed = {"time": 1, "event": "end", "code": 1, "reason": "failed with exit code 1"}
    assert RunData("a", events=[failed]).state == "ended without a result (failed with exit code 1)"
    assert RunData("a", events=[failed]).short_state == "ended without a result", "the overview has no room for why"
    assert RunData("a", events=[failed, {"time": 2, "event": "cancel"}]).state == "cancelled"
    assert RunData("a", result=result(), events=EVENTS[:2]).state == "finished"


def test_attempts_count_generations_not_ranks() -> None:
    run = RunData("a", EXPERIMENT, events=EVENTS)
    assert (run.attempts, run.preemptions, run.requeues, run.tasks) == (2, 1, 1, 8)
    assert RunData("a", {"launch": {"nodes": 2, "gpus": None, "tasks_per_node": None}}).tasks == 2


def test_metrics_of_a_run_drop_what_a_resume_took_back(tmp_path: Path) -> None:
    lines = [line(1, 75, 0.5), line(1, 150, 0.9), line(1, 225, 0.99), line(2, 150, 0.6), line(2, 150, 0.7)]
    folder = RunDir(tmp_path)
    for one in [*lines, line(2, 300, 1.0, split="test")]:
        append_line(folder.metrics, one)
    run = RunData("a", metrics=folder.read_metrics())
    assert [(one["step"], one["metrics"]["accuracy"]) for one in run.validations] == [(75, 0.5), (150, 0.7)]
    assert (run.best["step"], run.last["step"]) == (150, 150)


def test_speed_of_a_running_run_is_the_median_of_what_was_measured() -> None:
    speeds = [(10.0, 0.0), (90.0, 50.0), (30.0, 70.0)]
    lines = [
        {**line(1, 75 * k, 0.5), "samples_per_second": {"train": train, "validation": other}, "waiting_share": k / 100}
        for k, (train, other) in enumerate(speeds, start=1)
    ]
    run = RunData("a", metrics=lines)
    assert (run.speed, run.waiting_share) == ({"train": 30.0, "validation": 60.0}, 0.02)
    assert (RunData("a").speed, RunData("a").waiting_share) == ({}, None)


def test_best_of_a_running_run_follows_its_monitor() -> None:
    lines = [line(1, 75, 0.5), line(1, 150, 0.9), line(1, 225, float("nan")), line(1, 300, 0.8)]
    for monitor in ("accuracy", "loss"):
        run = RunData("a", {"train": {"monitor": monitor}}, metrics=lines)
        assert (run.best["step"], run.last["step"], run.lower) == (150, 300, monitor == "loss")


@pytest.mark.parametrize(
    ("metric", "lower"),
    [("loss", True), ("val/loss", True), ("hamming_loss", True), ("accuracy", False), ("iou", False), ("floss", False)],
)
def test_direction_by_name(metric: str, lower: bool) -> None:
    assert compare.lower_is_better(metric) is lower


def test_numbers_and_differences() -> None:
    values = [0.91, 1 / 6, 12345.678, 3, 0.0, 1e-7, float("nan"), None, "g001", True]
    expected = ["0.91", "0.1667", "12346", "3", "0", "1e-07", "–", "–", "g001", "True"]
    assert [compare.number(value) for value in values] == expected
    assert compare.difference(0.59, 0.57) == "+0.02"
    assert compare.difference(0.57, 0.59) == "-0.02"
    assert compare.difference(0.590001, 0.59) == "="
    assert compare.difference(25000.0, 10.0) == "+24990"
    assert compare.difference(float("nan"), 0.5) == compare.difference(None, 0.5) == ""
    assert (compare.tone(0.3, 0.4, lower=True), compare.tone(0.3, 0.4, lower=False)) == ("better", "worse")
    assert compare.tone(0.4, 0.4, lower=True) == ""


def test_an_integer_beyond_all_floats_is_a_text() -> None:
    """Whoever wrote it: JSON has such numbers."""
    huge = 10**400
    assert cells.cell(huge).sort == str(huge) and compare.difference(huge, 1) == compare.difference(1, huge) == ""
    assert not is_finite(huge) and not is_finite(-huge) and is_finite(10**300)


# --- the two pages --------------------------------------------------------------------------------------------------


def test_one_run(tmp_path: Path) -> None:
    figures = {"curves": png(tmp_path / "k.png", 2), "confusion_matrix": png(tmp_path / "c.png", 1)}
    run = RunData("resnet3d-1a2b3c4d", EXPERIMENT, {"train": {"seed": 3}}, result(), (), EVENTS, figures)
    text_path, web_path = write_report([run], tmp_path / "out")
    text, web = text_path.read_text(), web_path.read_text()
    facts = dict(table(text, "### Facts", "resnet3d")[1:])
    assert facts["Differs from its base in"] == "train.seed=3"
    assert facts["Best"] == "epoch 4, step 300" and facts["Trained"] == "5 epochs, 375 steps"
    assert facts["Attempts"] == "2 (1 stopped by a signal, 1 requeued)"
    assert (facts["Train samples/s"], facts["Validation samples/s"]) == ("31.04", "80.2")
    assert (facts["Instance"], facts["Nodes"], facts["Tasks"]) == ("cedia-a100-40gb", "2", "8")
    assert facts["Waiting for data"].startswith("1.2%") and facts["Commonest class alone"] == "accuracy 0.1667"
    scores = table(text, "### Training and validation", "resnet3d")
    assert scores[0][2:] == [f"{word} {split} (epoch {epoch})" for word, epoch in (("Best", 4), ("Last", 5))
                             for split in ("train", "validation")]  # fmt: skip
    assert scores[1] == ["accuracy", "higher is better", "–", "0.91", "–", "0.9"]
    assert [row[0] for row in table(text, "### Classes", "resnet3d")[1:]] == ["hippocampus", "thalamus", "amygdala"]
    assert "baseline" not in text and "### Confusion matrix" not in text, "the figure shows it"
    for link in re.findall(r"!\[\w+\]\((.+)\)", text):
        assert (tmp_path / "out" / link).is_file()
    inlined = re.findall(r"data:image/png;base64,([^\"]+)", web)
    assert [base64.b64decode(one) for one in inlined] == [path.read_bytes() for path in figures.values()]


OTHER_TASKS = {
    "multilabel": (
        {"map": 0.62, "hamming": 0.1},
        {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "ap": None, "auc": 0.75, "calibration_error": 0.1},
        ["Recall", "Precision", "F1", "ROC AUC", "Calibration error"],
        [[[3, 1], [2, 4]]] * 3,
    ),
    "segmentation": (
        {"dice": 0.8, "iou": 0.7},
        {"precision": 0.5, "recall": 0.25, "dice": 1 / 3, "iou": 0.2},
        ["Recall", "Precision", "Dice", "IoU"],
        [[5, 0, 0], [0, 5, 0], [1, 0, 5]],
    ),
}


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_a_run_of_another_task(task: str, tmp_path: Path) -> None:
    metrics, row, titles, matrix = OTHER_TASKS[task]
    name = next(iter(metrics))
    told = result() | {"task": task, "monitor": name, "baseline": {name: 0.25}, "confusion_matrix": matrix}
    told |= {"best": {"epoch": 4, "step": 300, "metrics": metrics}, "last": {}}
    key, scores = "dice" if "dice" in row else "f1", (0.3, None, 0.2)
    rows = zip(CLASSES, scores, strict=True)
    told |= {"per_class": [{"name": one, "support": 4, **row, "recall": 0.5, key: score} for one, score in rows]}
    del told["majority"]
    text = write_report([RunData("a-1", EXPERIMENT, {}, told)], tmp_path)[0].read_text()
    assert dict(table(text, "### Facts", "a-1")[1:])["Commonest class alone"] == f"{name} 0.25"
    directions = {line[0]: line[1] for line in table(text, "### Training and validation", "a-1")[1:]}
    assert directions[name] == "higher is better" and directions.get("hamming", "lower is better") == "lower is better"
    assert table(text, "### Classes", "a-1")[0] == ["Class", "Support", *titles]
    assert [line[0] for line in table(text, "### Classes", "a-1")[1:]] == [CLASSES[k] for k in (2, 0, 1)], "as drawn"
    if task == "multilabel":
        assert table(text, "### Labels", "a-1")[1] == [CLASSES[0], "4", "1", "2", "3"]
    else:
        assert table(text, "### Confusion matrix", "a-1")[3] == [CLASSES[2], "1", "0", "5"]


def test_an_unfinished_run_is_judged_by_its_tasks_metric() -> None:
    metrics = {"step": 75, "epoch": 1, "split": "validation", "metrics": {"accuracy": 0.9, "dice": 0.3, "loss": 1.0}}
    run = RunData("a", {"task": "segmentation", "train": {"monitor": None}}, {}, {}, [metrics])
    assert (run.monitor, run.lower) == ("dice", False)


def test_differences_to_the_first_run(tmp_path: Path) -> None:
    runs = [finished("base-1"), finished("other-2", accuracy=0.93, loss=0.36, recalls=(0.9, 0.6, 0.4))]
    runs.append(
        RunData("young-3", {**EXPERIMENT, **{f"k{k}": k for k in range(8)}}, {}, {}, [line(1, 75, 0.5)], EVENTS[:2])
    )
    text_path, web_path = write_report(runs, tmp_path)
    text = text_path.read_text()
    overview = table(text, "Differences in brackets")
    assert overview[0][4:7] == [
        "accuracy (higher is better)", "f1_macro (higher is better)", "loss (lower is better)"
    ]  # fmt: skip
    assert [row[4] for row in overview[1:]] == ["0.91", "0.93 (+0.02)", "0.5 (-0.41)"]
    assert [row[6] for row in overview[1:]] == ["0.31", "0.36 (+0.05)", "0.5 (+0.19)"]
    assert overview[3][1] == "started, no result yet" and overview[3][5] == "–"
    assert [row[-1] for row in overview[1:]] == [
        "the baseline",
        "nothing",
        "k0=0, k1=1, k2=2, k3=3, k4=4, k5=5, 2 more below",
    ]
    changed = table(text, "### Changed from the baseline", "young-3")
    assert changed[0] == ["Setting", "base-1", "This run"] and changed[8] == ["k7", "–", "7"] and len(changed) == 9
    classes = [row[::2][:2] for row in table(text, "### Classes", "other-2")[1:]]
    assert classes == [["thalamus", "0.4 (-0.3)"], ["hippocampus", "0.6 (+0.1)"], ["amygdala", "0.9 (=)"]]
    matrix = table(text, "### Confusion matrix", "other-2")
    assert matrix == [["True class / predicted", *CLASSES], ["amygdala", "36", "3", "1"],
                      ["hippocampus", "10", "20", "10"], ["thalamus", "6", "6", "28"]]  # fmt: skip
    web = web_path.read_text()
    assert '<span class="change better">(+0.02)</span>' in web and '<span class="change worse">(+0.05)</span>' in web
    anchors = {tag[1].get("id") for tag in Page(web).tags if tag[0] == "section"}
    assert {tag[1]["href"] for tag in Page(web).tags if tag[0] == "a"} == {"#main", *(f"#{one}" for one in anchors)}


def test_runs_of_different_tasks_are_not_compared(tmp_path: Path) -> None:
    """Their losses have nothing to do with each other: each is compared with the first of its own task."""
    maps = [RunData(f"map-{k}", EXPERIMENT, {}, result(loss=k) | {"task": "segmentation"}) for k in (2, 3)]
    text_path, web_path = write_report([finished("base-1", loss=1), *maps], tmp_path)
    text, web = text_path.read_text(), web_path.read_text()
    assert "Differences in brackets are to the first run of the same task, map-2." in text
    parts = [table(text, f"Task {task}:") for task in ("classification", "segmentation")]
    losses = [row[part[0].index("loss (lower is better)")] for part in parts for row in part[1:]]
    assert losses == ["1", "2", "3 (+1)"]
    for run, loss in (("map-2", "2"), ("map-3", "3 (+1)")):
        assert table(text, "### Training and validation", run)[2][3] == loss
    assert "## map-2 (baseline)" in text and "base-1 (baseline)" not in text
    assert web.count('class="tag">baseline') == 1 and web.count('class="change worse">(+1)') == 2
    text_path, web_path = write_report([finished("base-1"), maps[0]], tmp_path / "two")
    assert "Each run is of another task" in text_path.read_text() and "is better</span>" not in web_path.read_text()


def test_a_run_that_has_nothing_yet(tmp_path: Path) -> None:
    text_path, web_path = write_report([RunData("empty-1")], tmp_path)
    facts = table(text_path.read_text(), "### Facts", "empty-1")
    assert facts[1] == ["State", "not started"] and "### Validation" not in text_path.read_text()
    assert "not started" in Page(web_path.read_text()).texts


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    run = RunData("a-1", EXPERIMENT, {}, result(), figures={"curves": png(tmp_path / "f.png")})
    web = write_report([run], tmp_path / "out")[1].read_text()
    page = Page(web)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "base"}
    assert page.scripts == OWN_SCRIPTS
    sources = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    assert sources and all(str(value).startswith(("data:image/png", "#")) for value in sources)
    assert "default-src 'none'" in web and "light-dark(" in web and "url(" not in web.replace("url(#", "")


def test_missing_and_foreign_figures_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    run = RunData("a-1", figures={"gone": tmp_path / "gone.png", "text": tmp_path / "text.png"})
    text, web = (path.read_text() for path in write_report([run], tmp_path / "out"))
    for name in ("gone", "text"):
        assert f"Figure {name}: the file is missing or no PNG." in text and f"Figure {name}:" in web
    assert "![" not in text and "<img" not in web


def test_figures_stand_in_their_order_with_captions(tmp_path: Path) -> None:
    names = ["worst_samples", "mine", "roc_test", "roc", "curves", "confusion_matrix_test"]
    run = RunData("a-1", EXPERIMENT, {}, result(), figures={name: png(tmp_path / f"{name}.png") for name in names})
    text_path, web_path = write_report([run], tmp_path / "out")
    order = re.findall(r"!\[(.+)\]", text_path.read_text())
    assert [name.replace("\\", "") for name in order] == [
        "curves", "roc", "worst_samples", "confusion_matrix_test", "roc_test", "mine"
    ]  # fmt: skip
    shown = Page(web_path.read_text()).texts
    assert captions.CAPTIONS["roc"] in shown and f"{captions.CAPTIONS['roc']} (test)" in shown and "mine" in shown


def test_a_page_of_many_runs_stays_small_and_refers_to_the_other_figures(tmp_path: Path) -> None:
    sizes = {"curves": 30_000, "confusion_matrix": 20_000, "roc": 30_000, "predictions": 60_000}
    for name, size in sizes.items():
        path = png(tmp_path / f"{name}.png")
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    figures = {name: tmp_path / f"{name}.png" for name in sizes}
    runs = [RunData(f"run-{number}", EXPERIMENT, {}, result(), figures=figures) for number in range(20)]
    page_path = write_report(runs, tmp_path / "out")[1]
    assert page_path.stat().st_size < 2_000_000
    page = Page(page_path.read_text())
    assert sum(tag == "img" for tag, _ in page.tags) == 40, "the foremost two of each run"
    links = [str(attrs["href"]) for tag, attrs in page.tags if tag == "a" and "figures/" in str(attrs["href"])]
    assert len(links) == 40 and all((tmp_path / "out" / link).is_file() for link in links)


def test_everything_is_escaped(tmp_path: Path) -> None:
    told = result()
    told["class_names"] = [NASTY, "b", "c"]
    told["per_class"][0]["name"] = NASTY
    told["best"]["metrics"][NASTY] = 0.5
    figures = {NASTY: png(tmp_path / "f.png"), "../../out": tmp_path / "f.png"}
    run = RunData(NASTY, {"model": {"name": NASTY}}, {NASTY: NASTY}, told, figures=figures)
    text_path, web_path = write_report([run, finished("b-2")], tmp_path / "deep" / "out")
    page = Page(web_path.read_text())
    assert page.scripts == OWN_SCRIPTS
    assert page.texts.count(NASTY) >= 6
    assert len(list((tmp_path / "deep" / "out" / "figures").iterdir())) == 2
    rendered = MarkdownIt("commonmark").enable("table").render(text_path.read_text())
    assert "<script" not in rendered and 'javascript:b"' not in rendered and "<em>" not in rendered
    assert len(set(map(len, table(text_path.read_text().replace("\\|", "/"), "Differences")))) == 1
    assert set(notes.read(text_path)) == {notes.INTRODUCTION, NASTY, "b-2"}


def test_line_ends_and_tabs_split_no_row(tmp_path: Path) -> None:
    odd = "a\nb\r\n\tc \u2028`d` | e\x1b[2J"
    told = result()
    told["best"]["metrics"][odd] = 0.5
    runs = [RunData(odd, {"model": {"name": odd}}, {}, told), finished("b-2")]
    text_path, web_path = write_report(runs, tmp_path)
    text, shown = text_path.read_text(), r"a\nb\r\n\tc \u2028`d` | e\x1b[2J"
    assert [len(row) for row in table(text.replace("\\|", "/"), "Differences")] == [11, 11, 11]
    assert shown in "".join(Page(MarkdownIt("commonmark").enable("table").render(text)).texts)
    page = Page(web_path.read_text())
    assert page.texts.count(shown) >= 5 and not any(odd in words for words in page.texts)


@given(st.text(max_size=30))
@settings(max_examples=150, deadline=None)
def test_escaped_text_reads_as_it_was_written(text: str) -> None:
    words = printable(text).strip()
    assert not set(escape(words)) & {"<", ">"}
    shown = MarkdownIt("commonmark").enable("table").render(f"| a |\n| --- |\n| x{escape(words)}x |")
    page = Page(shown)
    assert f"x{words}x".replace("\x00", "\ufffd") in "".join(page.texts)


# --- notes ----------------------------------------------------------------------------------------------------------


def write_note(path: Path, run: str, text: str) -> None:
    page = path.read_text()
    path.write_text(page.replace(notes.block(run, ""), notes.block(run, text)))
    assert path.read_text() != page


def test_notes_survive_and_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    text_path, web_path = write_report([finished("a-1"), finished("b-2")], tmp_path)
    write_note(text_path, "a-1", f"## Why\n\n| x | y |\n{NASTY.replace('<!-- /notes -->', '')}\n\n  indented")
    pages = []
    for _ in range(2):
        write_report([finished("a-1", accuracy=0.5), finished("b-2")], tmp_path)
        pages.append((text_path.read_bytes(), web_path.read_bytes()))
    assert pages[0] == pages[1]
    kept = notes.read(text_path)
    assert kept["a-1"].startswith("## Why\n\n| x | y |\n<script>") and kept["a-1"].endswith("\n\n  indented\n")
    assert kept["b-2"] == "" and "0.5" in text_path.read_text()
    page = Page(web_path.read_text())
    assert kept["a-1"] in page.texts and page.scripts == OWN_SCRIPTS


def test_notes_of_runs_that_are_left_out_are_kept(tmp_path: Path) -> None:
    text_path, web_path = write_report([finished("a-1"), finished("b-2")], tmp_path)
    write_note(text_path, "a-1", "worth keeping")
    write_report([finished("b-2")], tmp_path)
    assert notes.read(text_path) == {"": "", "a-1": "worth keeping\n", "b-2": ""}
    assert "worth keeping\n" in Page(web_path.read_text()).texts
    write_report([finished("a-1")], tmp_path)
    section = text_path.read_text().split("## a-1")[1]
    assert "worth keeping" in section and "not in this report" not in section


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace("<!-- /notes -->", "", 1), r"line \d+.*other half"),
        (lambda text: text.replace("<!-- notes: a-1 -->", ""), r"line \d+.*other half"),
        (lambda text: "".join(text.rsplit("<!-- /notes -->", 1)), r"notes of b-2 have no <!-- /notes --> line"),
        (lambda text: text.removeprefix(notes.HEADER), r"not written by 'hpc report'.*-o"),
    ],
)
def test_a_report_whose_notes_could_be_lost_is_not_overwritten(tmp_path: Path, spoil: Any, message: str) -> None:
    text_path, web_path = write_report([finished("a-1"), finished("b-2")], tmp_path)
    text_path.write_text(spoil(text_path.read_text()))
    before = text_path.read_bytes(), web_path.read_bytes()
    with pytest.raises(UserError, match=message) as caught:
        write_report([finished("a-1", accuracy=0.5)], tmp_path)
    assert "\n" not in str(caught.value)
    assert (text_path.read_bytes(), web_path.read_bytes()) == before


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for runs, out, message in (
        ([], tmp_path, r"no run to report.*hpc ls"),
        ([RunData("a-1"), RunData("a-1")], tmp_path, "a-1: given more than once"),
        ([RunData("a-1")], tmp_path / "file", "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            write_report(runs, out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
