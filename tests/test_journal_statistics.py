"""Means over seeds: intervals and tests against scipy's, and which test is made of which groups."""

from __future__ import annotations

import math
import statistics as plain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hpc.journal import compose, groups, statistics
from hpc.journal.content import Table
from hpc.journal.rundata import RunData

FREEDOMS = [1, 2, 3, 4.7, 9, 30.3, 199, 5000.5]
VALUES = st.lists(st.floats(-1e3, 1e3).map(lambda value: round(value, 3)), min_size=2, max_size=12)


@pytest.mark.parametrize("freedom", FREEDOMS)
def test_p_values_and_quantiles_are_scipys(freedom: float) -> None:
    for t in (0.0, 1e-9, 0.3, 1.0, 2.1, 5.5, 17.0, 120.0, -2.1, math.inf):
        assert statistics.p_value(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-9, abs=1e-300)
    for share in (0.5, 0.6, 0.9, 0.975, 0.995, 0.9999, 0.025):
        assert statistics.t_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-9, abs=1e-12)
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="no quantile"):
            statistics.t_quantile(share, freedom)


@pytest.mark.filterwarnings("ignore:Precision loss")
@given(VALUES, VALUES)
@settings(max_examples=100, deadline=None)
def test_tests_and_intervals_are_scipys(values: list[float], others: list[float]) -> None:
    half, scatter = statistics.interval(values), plain.stdev(values)
    wanted = stats.t.ppf(0.975, len(values) - 1) * scatter / math.sqrt(len(values))
    assert half == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    welch = statistics.welch(values, others)
    if scatter > 1e-6 or plain.stdev(others) > 1e-6:
        known = stats.ttest_ind(values, others, equal_var=False)
        assert (welch.p, welch.freedom) == (pytest.approx(known.pvalue, rel=1e-6, abs=1e-12), pytest.approx(known.df))
    size = min(len(values), len(others))
    pairs = values[:size], others[:size]
    if plain.stdev(mine - theirs for mine, theirs in zip(*pairs, strict=True)) > 1e-6:
        wanted_p = stats.ttest_rel(*pairs).pvalue
        assert statistics.paired(*pairs).p == pytest.approx(wanted_p, rel=1e-6, abs=1e-12)


def test_what_does_not_scatter_is_not_tested() -> None:
    assert statistics.interval([0.5]) is None and statistics.interval([0.5, 0.5]) == 0
    alike = statistics.paired([0.1 + 0.2, 0.4 + 0.2, 0.7 + 0.2], [0.1, 0.4, 0.7])
    assert alike.p is None and alike.change == pytest.approx(0.2), "their differences are rounding"
    assert statistics.welch([0.5, 0.5], [0.4, 0.4]).p is None


# --- groups ---------------------------------------------------------------------------------------------------------


def made(run: str, seed: int | None, accuracy: float | None, rate: float = 0.1, **more: Any) -> RunData:
    experiment = {"name": "net", "task": "classification", "train": {"seed": seed, "lr": rate}}
    metrics = {"accuracy": accuracy, "mine": 1.0}
    result = {"finished": True, "task": "classification", "monitor": "accuracy", "best": {"metrics": metrics}}
    return RunData(run, experiment, {}, more.pop("result", result), **more)


def row(table: Table | None, place: int) -> dict[str, str]:
    assert table is not None
    texts = [
        f"{cell.text} [{cell.change}] {cell.tone}".strip() if cell.change else cell.text for cell in table.rows[place]
    ]
    return dict(zip([head.text for head in table.heads], texts, strict=True))


def test_seeds_are_one_group_and_tested_in_pairs() -> None:
    mine, theirs = [0.91, 0.95, 0.89], [0.88, 0.90, 0.88]
    runs = [made(f"a-{seed}", seed, value) for seed, value in enumerate(theirs)]
    runs += [made(f"b-{seed}", seed, mine[seed], rate=0.2) for seed in (2, 0, 1)]
    table = compose.compose(runs, {}).groups
    first, second = row(table, 0), row(table, 1)
    assert (first["Group"], first["Seeds"], first["Finished"]) == ("net", "0, 1, 2", "3 of 3")
    half = stats.t.ppf(0.975, 2) * plain.stdev(theirs) / math.sqrt(3)
    assert first["accuracy"] == f"0.8867 ± {half:.2g}" and first["Differs in"] == "the baseline"
    p = stats.ttest_rel(mine, theirs).pvalue
    assert second["accuracy"].endswith(f"[+0.03, p = {p:.2g}] better") and second["Group"] == "net, train.lr=0.2"
    assert second["Test"] == "paired t-test, n = 3 seeds" and second["Differs in"] == "train.lr=0.2"
    assert second["mine"] == "1 ± 0 [=]", "a metric that nobody here knows, and that is the same"


def test_other_seeds_are_not_paired_and_a_subset_is() -> None:
    base = [made(f"a-{seed}", seed, value) for seed, value in enumerate([0.5, 0.6, 0.8, 0.7])]
    values = {7: 0.6, 8: 0.8, 9: 0.9}
    other = [made(f"b-{seed}", seed, value, 0.2) for seed, value in values.items()]
    found = row(compose.compose([*base, *other], {}).groups, 1)
    p = stats.ttest_ind([*values.values()], [0.5, 0.6, 0.8, 0.7], equal_var=False).pvalue
    assert found["Test"] == "Welch's t-test, n = 3 and 4 seeds" and f"p = {p:.2g}" in found["accuracy"]
    some = [made(f"b-{seed}", seed, value, 0.2) for seed, value in {1: 0.7, 3: 0.71}.items()]
    found = row(compose.compose([*base, *some], {}).groups, 1)
    p = stats.ttest_rel([0.7, 0.71], [0.6, 0.7]).pvalue
    assert found["Test"] == "paired t-test, n = 2 seeds" and f"[+0.055, p = {p:.2g}]" in found["accuracy"]


def test_few_and_unfinished_seeds() -> None:
    base = [made("a-1", 1, 0.5), made("a-2", 2, 0.75), made("a-3", 3, 0.9, result={}), made("a-9", 2, 0.7)]
    one, none = made("b-1", 1, 0.8, 0.2), made("c-1", 1, None, 0.3)
    report = compose.compose([*base, one, none], {})
    found = [row(report.groups, place) for place in range(3)]
    assert found[0]["accuracy"].startswith("0.6 ± ") and found[0]["Finished"] == "3 of 4", (
        "the later of one seed counts"
    )
    assert (found[1]["accuracy"], found[1]["Test"]) == ("0.8 [+0.2] better", "no test: 1 seed")
    assert (found[2]["accuracy"], found[2]["Test"]) == ("–", "no test: no finished run")
    assert [section.group for section in report.sections] == ["net"] * 4 + ["", ""]
    assert compose.compose([base[0], one], {}).groups is None, "no two differ in their seed alone"


def test_the_named_baseline_is_that_of_its_task_alone() -> None:
    maps = [RunData(f"map-{k}", {"name": "m", "task": "segmentation", "train": {"seed": k}}) for k in (1, 2)]
    runs = [made("a-1", 1, 0.5), made("b-1", 1, 0.8, 0.2), *maps]
    report = compose.compose(runs, {}, "b-1")
    assert [section.run for section in report.sections if section.baseline] == ["b-1", "map-1"]
    place = [head.text for head in report.overview.heads].index("accuracy")
    assert [line[place].change for line in report.overview.rows[:2]] == ["-0.3", ""]
    assert report.overview.rows[0][place].sort == 0.5 and report.overview.rows[2][place].sort is None


def test_a_copy_of_ones_own_model_is_not_another_model_but_other_code_is() -> None:
    def own(run: str, seed: int, code: str) -> RunData:
        name = f"file:/runs/{run}/code/own/net.py:Net"
        return RunData(run, {"name": "n", "model": {"name": name}, "train": {"seed": seed}}, own_code=code)

    runs = [own("a", 0, "11"), own("b", 1, "11"), own("c", 2, "22"), own("d", 3, "")]
    assert [len(group.runs) for group in groups.grouped(runs, {"": runs[0]})] == [2, 1, 1]
    said = [line[-1].text for line in compose.compose(runs, {}).overview.rows]
    assert said == ["the baseline", "train.seed=1", "own code=22, train.seed=2", "train.seed=3"]
