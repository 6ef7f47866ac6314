"""Figures of counts and scores: not blank, readable from 2 to 200 classes, with what is missing, and exact."""

import numpy as np
import pytest
from sklearn import metrics

from hpc.journal.captions import CAPTIONS
from hpc.metrics import by_difficulty
from jobs import palette
from jobs.figures import calibration, canvas, classes, matrices, progress, ranking, rates, text
from jobs.figures.drawings import CURVES, History, drawings, plans
from jobs.tasks import measures
from jobs.tasks.contract import Stored
from tests.drawn import assert_drawn, ink, words

ODD = ["background", "caudal anterior cingulate left", "Großhirnrinde", "кора", "$x_1$ cost $5", "_hidden", "犬と猫"]
ODD += ["a" * 60, "a" * 60 + "b", "", "two\nlines"]
TITLE = "validation, best epoch 12: balanced_accuracy 0.912 (commonest class alone 0.380)"


def names_of(num):
    return (ODD + [f"structure number {k} of the left hemisphere" if k % 3 else f"c{k}" for k in range(num)])[:num]


def counts_of(num, empty=True):
    rng = np.random.default_rng(num)
    matrix = rng.poisson(0.3, (num, num)) + np.diag(rng.integers(1, 300, num))
    if empty:
        matrix[num // 2] = 0
    return matrix


def scored(num_classes, samples=120, several=False):
    """Targets without class 1 (or (N, K) labels), and probabilities."""
    rng = np.random.default_rng(num_classes + samples)
    scores = rng.random((samples, num_classes))
    targets = rng.integers(0, num_classes, samples)
    targets[targets == 1] = 0
    scores[np.arange(samples), targets] += 0.6
    if several:
        return (scores > 0.8).astype(np.uint8), np.clip(scores * rng.random(scores.shape), 0, 1)
    return targets, scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize(("num", "normalised"), [(2, False), (7, True), (41, False), (200, True)])
def test_confusion_matrices_read_with_any_number_of_classes(num, normalised):
    figure = matrices.confusion_matrix(counts_of(num), names_of(num), TITLE, normalised)
    assert_drawn(figure)
    shown = {label.get_text().replace(r"\$", "$").strip() for label in words(figure)}
    if num <= matrices.NAMES_FIT:
        assert {"background", "Großhirnrinde", "кора", "$x_1$ cost $5", "_hidden"} & set(names_of(num)) <= shown
    else:
        assert "the 24 commonest confusions of 200 classes" in shown and "one class does not occur" in shown


def test_a_confusion_matrix_shows_its_numbers_and_says_what_does_not_occur():
    matrix = np.array([[1_234_567, 20], [0, 0]])
    counts = [label.get_text() for label in words(matrices.confusion_matrix(matrix, ["a", "b"], "t"))]
    assert "1.2M" in counts and "20" in counts
    share = matrices.confusion_matrix(np.array([[3, 1], [0, 0]]), ["a", "b"], "t", True)
    assert {"0.75", "0.25"} <= {label.get_text() for label in words(share)}
    shown, axes = assert_drawn(share), share.axes[0]
    at = axes.transData.transform([(0, 1), (1, 1)]).round().astype(int)
    greys = [shown[shown.shape[0] - y, x] for x, y in at]
    assert np.abs(np.array(greys, int) - 230).max() <= 2, "no class b: grey, not 0"
    empty = matrices.confusion_matrix(np.zeros((3, 3), int), ["a", "b", "c"], "nothing")
    assert ink(canvas.rendered(empty)) > 0


def test_the_commonest_confusions_come_first():
    matrix = np.diag(np.full(100, 50))
    matrix[3, 7], matrix[90, 2] = 40, 9
    matrix[5] = 0
    matrix[5, 6] = 2
    by_count = matrices._confusions(matrix.astype(float), names_of(100), normalised=False)
    assert by_count[0].startswith("3 кора → 7 ") and by_count[0].endswith("40 of 90") and by_count[1].startswith("90 ")
    assert matrices._confusions(matrix.astype(float), names_of(100), normalised=True)[0].endswith("2 of 2")


@pytest.mark.parametrize("num", [1, 41])
def test_matrices_of_labels(num):
    found = np.random.default_rng(0).integers(0, 3000, (num, 2, 2))
    found[0, 1] = 0
    assert_drawn(matrices.label_matrices(found, names_of(num), TITLE))


@pytest.mark.parametrize(("num", "several"), [(2, False), (7, True), (41, False), (200, False)])
def test_curves_of_scores_read_with_any_number_of_classes(num, several):
    targets, scores = scored(num, several=several)
    for draw in (rates.roc, rates.precision_recall):
        assert_drawn(draw(targets, scores, names_of(num), TITLE))
    assert_drawn(calibration.calibration(targets, scores, TITLE))


@pytest.mark.parametrize("kind", ["random", "ties", "sorted", "two values", "one positive"])
def test_points_are_scikit_learns(kind):
    rng = np.random.default_rng(3)
    truth, scores = rng.integers(0, 2, 200), rng.random(200).astype(np.float32)
    scores = {"ties": scores.round(1), "two values": scores > 0.5, "sorted": np.sort(scores)}.get(kind, scores)
    if kind == "one positive":
        truth = np.arange(200) == 17
    expected = metrics.roc_curve(truth, scores, drop_intermediate=False)
    for ours, theirs in zip(ranking.roc_points(truth, scores), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    precision, recall, thresholds = ranking.precision_recall_points(truth, scores)
    for ours, theirs in zip(
        (precision, recall, thresholds), metrics.precision_recall_curve(truth, scores), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert ranking.average_precision(precision, recall) == pytest.approx(metrics.average_precision_score(truth, scores))
    x, y, _ = ranking.roc_points(truth, scores)
    assert ranking.area(x, y) == pytest.approx(metrics.roc_auc_score(truth, scores))


def test_legends_say_the_metrics_that_the_task_reports():
    targets, scores = scored(5)
    targets = np.where(targets == 4, 3, targets)
    found = rates._each(rates.ranked(targets, scores), rates._roc_curve)
    assert [curve.number for curve in found] == [0, 2, 3], "no curve of classes that do not occur"
    for curve in found:
        assert curve.area == pytest.approx(measures.roc_auc(targets == curve.number, scores[:, curve.number]))
        assert np.trapezoid(curve.on_grid, rates._GRID) == pytest.approx(curve.area, abs=0.003)
    found = rates._each(rates.ranked(targets, scores), rates._precision_recall_curve)
    for curve in found:
        assert curve.area == pytest.approx(measures.average_precision(targets == curve.number, scores[:, curve.number]))
    legend = [label.get_text() for label in words(rates.precision_recall(targets, scores, list("abcde"), "t"))]
    assert f"mean of 3 {np.mean([curve.area for curve in found]):.3f}" in legend and "prevalence 0.333" in legend


def test_what_is_not_finite_is_left_out_and_told():
    targets, scores = scored(4)
    broken = scores.copy()
    broken[5, 2] = np.nan
    kept = np.arange(len(scores)) != 5
    ours, theirs = rates.ranked(targets, broken), rates.ranked(targets[kept], scores[kept])
    assert ours.note == "1 of 120 samples are left out: not finite" and (ours.truth == theirs.truth).all()
    assert_drawn(rates.roc(targets, np.full_like(scores, np.nan), names_of(4), TITLE))
    assert_drawn(calibration.calibration(targets, np.full_like(scores, np.nan), TITLE))


def test_many_scores_are_thinned_and_that_is_told(monkeypatch):
    monkeypatch.setattr(rates, "MOST_SCORES", 100)
    found = rates.ranked(*scored(4))
    assert len(found.truth) == 24 and found.note == "every 5th sample"


def test_the_reliability_diagram_has_the_tasks_error():
    targets, scores = scored(6, 300)
    error = measures.calibration_error(scores.argmax(1) == targets, scores.max(1))
    told = " ".join(label.get_text() for label in words(calibration.calibration(targets, scores, "t")))
    assert f"expected calibration error {error:.4f}" in told
    edges = np.arange(16) / 15
    bins = ranking.reliability(edges, edges > 0.5)
    assert bins.error == pytest.approx(measures.calibration_error(edges > 0.5, edges))


def lines_of(epochs, names, broken=()):
    rng = np.random.default_rng(1)
    return [
        {
            "epoch": epoch,
            "step": 20 * epoch,
            "train": {name: rng.random() for name in names[:3]},
            "metrics": {name: None if name in broken else rng.random() for name in names},
        }
        for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize(("task", "epochs"), [("classification", 3), ("multilabel", 120), ("segmentation", 1)])
def test_curves_mark_the_best_epoch_and_the_baseline(task, epochs):
    steps = np.arange(1, 20 * epochs + 1), np.linspace(0.1, 0, 20 * epochs)
    lines = lines_of(epochs, CURVES[task])
    figure = progress.curves(lines, CURVES[task], epochs, {"accuracy": 0.4}, TITLE, steps)
    assert_drawn(figure)
    told = {label.get_text() for label in words(figure)}
    assert {f"best epoch {epochs}", "train", "validation", "learning rate", *CURVES[task]} <= told
    assert ("baseline" in told) == ("accuracy" in CURVES[task])


def test_curves_of_what_is_missing_say_so():
    lines = lines_of(2, ("loss", "map"), broken=("map",))
    lines[0]["train"]["loss"] = float("nan")
    del lines[1]["train"]["map"], lines[0]["train"]["map"]
    figure = progress.curves(lines, ("loss", "map", "unknown"), 2, {}, "t")
    assert len(figure.axes) == 2 and "undefined" in {label.get_text() for label in words(figure)}
    assert_drawn(progress.curves([], ("loss",), None, {}, TITLE))


@pytest.mark.parametrize("steps", [1, 50, 30_000])
def test_batch_losses(steps):
    values = np.random.default_rng(0).gamma(2, 1, steps)
    values[steps // 2] = 1e9
    if steps > 1:
        values[0] = np.nan
    assert_drawn(progress.batch_loss((np.arange(1, steps + 1), values), 10, TITLE))


def test_the_running_mean_is_of_the_last_steps_that_are_finite():
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    np.testing.assert_allclose(progress._running_mean(values, 2), [1, 2, 3, 5, 6])
    assert np.isnan(progress._running_mean(np.array([np.nan, 1.0]), 1)[0])


def rows_of(num):
    rng = np.random.default_rng(num)
    keys = ("precision", "recall", "f1", "ap", "auc")
    rows = [{"name": name, "support": 5, **{key: rng.random() for key in keys}} for name in names_of(num)]
    rows[-1] |= {"support": 0, "recall": 0.0, "ap": None}
    return rows


@pytest.mark.parametrize("num", [2, 41, 200])
def test_the_table_of_classes_reads_with_any_number(num):
    figure = classes.per_class_table("classification", rows_of(num), TITLE)
    assert_drawn(figure)
    assert any("the 45 most difficult of 200 classes" in label.get_text() for label in words(figure)) == (num == 200)


def test_classes_stand_by_difficulty():
    rows = [
        {"name": n, "support": s, "recall": r, "f1": 0.5} for n, s, r in [("a", 3, 0.9), ("b", 0, 0.0), ("c", 3, 0.2)]
    ]
    assert by_difficulty("classification", rows) == [2, 0, 1], "what does not occur is last"
    assert by_difficulty("multilabel", [{"name": "a", "support": 1, "ap": 0.3}, {"name": "b", "support": 1}]) == [0, 1]
    assert by_difficulty("segmentation", [{"support": 1, "dice": d} for d in (0.5, None, 0.1)]) == [2, 0, 1]


@pytest.mark.parametrize("num", [2, 200])
def test_dice_by_sample(num):
    true = np.random.default_rng(0).integers(0, 50, (9, num)).astype(float)
    true[:, 1] = 0
    rows = np.concatenate([np.floor(true * 0.7), true, true], axis=1)
    assert_drawn(classes.dice_by_sample(rows, names_of(num), TITLE))
    dice = classes.sample_dice(rows)
    assert np.isnan(dice[:, 1]).all() and dice[0, 0] == 2 * np.floor(0.7 * true[0, 0]) / (2 * true[0, 0])


def test_one_sample_is_enough():
    targets, scores = np.array([1]), np.array([[0.2, 0.8]])
    for draw in (rates.roc, rates.precision_recall):
        assert_drawn(draw(targets, scores, ["a", "b"], TITLE))
    assert_drawn(calibration.calibration(targets, scores, TITLE))
    assert_drawn(classes.dice_by_sample(np.array([[1.0, 0, 2, 0, 1, 0]]), ["a", "b"], TITLE))


def test_names_are_told_apart_and_taken_as_they_stand():
    shown = text.labels(names_of(30))
    assert len(set(shown)) == 30 and max(map(len, shown)) <= text.LONGEST + 2
    assert (
        shown[4] == r"\$x_1\$ cost \$5" and shown[5] == " _hidden" and shown[6] == "class 6" and shown[9] == "class 9"
    )
    assert text.compact(950) == "950" and text.compact(12_345) == "12k" and text.compact(3_400_000) == "3.4M"
    assert text.cut("abcdefghij", 6) == "abc…ij"


def test_names_in_a_script_that_the_font_lacks_are_numbered_never_boxes(caplog):
    names = ["liver", "肝臓", "tumour 腫瘍 2", "why?"]
    assert text.labels(names) == ["liver", "class 1", "2: tumour ?? 2", "why?"]
    assert text.readable(names)[1] == "class 1" and "□" not in "".join(text.readable(names))
    told = [record.message for record in caplog.records]
    assert len(told) == 1 and "1 is 肝臓" in told[0] and "why?" not in told[0]


def test_dice_where_no_sample_has_a_class_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(canvas, "say_nothing_to_draw", lambda figure, title, why: said.append(why) or figure)
    classes.dice_by_sample(np.zeros((3, 6)), ["a", "b"], TITLE)
    classes.dice_by_sample(np.zeros((0, 6)), ["a", "b"], TITLE)
    assert said == ["no sample has a class, or was given one"] * 2


def test_colours_of_classes_differ_for_all_eyes():
    places = palette.seen(np.array([palette.class_colour(number) for number in range(12)], float))
    apart = np.linalg.norm(places[:, None] - places[None], axis=3).min(axis=2)
    assert apart[~np.eye(12, dtype=bool)].min() > 0.07
    errors = [palette.FALSE_POSITIVE, palette.FALSE_NEGATIVE, palette.OTHER_CLASS, palette.IGNORED]
    places = palette.seen(np.array(errors, float))
    assert np.linalg.norm(places[:, None] - places[None], axis=3).min(axis=2)[~np.eye(4, dtype=bool)].min() > 0.12
    assert len({palette.class_colour(number) for number in range(palette.MOST)}) == palette.MOST
    assert palette.class_colour(0) == (0, 114, 178) and palette.dash(0) != palette.dash(6)


class Scores:
    def __init__(self, task, num):
        self.matrix = counts_of(num) if task != "multilabel" else np.full((num, 2, 2), 5)
        self.baseline = {"accuracy": 0.3}
        self._rows = rows_of(num)

    def per_class(self):
        return self._rows


def evaluated(task, num=3):
    targets, scores = scored(num, 12, several=task == "multilabel")
    if task == "segmentation":
        targets, scores = None, np.ones((12, 3 * num))
    return Scores(task, num), Stored(np.arange(12), targets, scores, np.ones(12, np.float32))


@pytest.mark.parametrize("task", CURVES)
def test_the_figures_of_a_task_have_captions_and_are_the_same_each_time(task):
    scores, stored = evaluated(task)
    steps = np.arange(1, 41), np.ones(40)
    history = History(lines_of(2, CURVES[task]), 2, "loss", steps, steps)
    made = drawings(task, scores, stored, names_of(3), TITLE, history)
    assert set(made) <= set(CAPTIONS) and {"curves", "batch_loss", "per_class"} <= set(made)
    assert list(made) == sorted(made, key=[*CAPTIONS].index), "in the order of the report"
    again = drawings(task, scores, stored, names_of(3), TITLE, history)
    assert all(canvas.png(figure) == canvas.png(again[name]) for name, figure in made.items())
    assert "roc" not in plans(task, scores, None, names_of(3)) and "curves" not in plans(
        task, scores, None, names_of(3)
    )


def test_a_figure_that_fails_is_left_out_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(rates, "roc", lambda *_: 1 / 0)
    scores, stored = evaluated("classification")
    made = drawings("classification", scores, stored, names_of(3), only=["roc", "calibration"])
    assert list(made) == ["calibration"] and [record.message for record in caplog.records] == [
        "figure roc is left out: ZeroDivisionError: division by zero"
    ]
