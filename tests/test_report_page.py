"""The report's page in a real browser: read, sorted, zoomed and filtered on a desktop and a phone, light and dark."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from hpc.journal import page
from hpc.journal.content import INLINED, Cell, Curve, Figure, Head, Report, Section, Table
from hpc.journal.report import RunData, write_report
from tests.browser import DESKTOP, PHONE, Browser, chromium, require

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\u2028'\"&amp;"
EPOCHS = 40
CHART = "#curves svg.curves"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    require()
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


def png(path: Path, size: int) -> Path:
    """A grey picture of at least `size` bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 320, 240, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x90" * 320) * 240)
    extra = chunk(b"tEXt", b"Comment\0" + b"x" * size)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def curves(run: int) -> tuple[Curve, ...]:
    epochs = tuple(float(epoch) for epoch in range(1, EPOCHS + 1))
    steps = tuple(75 * epoch for epoch in epochs)
    rise = tuple(0.9 - 0.5 * math.exp(-epoch / (5 + run)) for epoch in epochs)
    fall = tuple(2.0 * math.exp(-epoch / 8) + 0.01 for epoch in epochs)
    made = {("accuracy", "train"): rise, ("accuracy", "validation"): (None, *rise[1:]), ("loss", "validation"): fall}
    return tuple(Curve(metric, split, steps, epochs, values) for (metric, split), values in made.items())


def number(value: float | None) -> Cell:
    return Cell("–") if value is None else Cell(f"{value:.4g}", sort=value)


def words(text: str) -> Cell:
    return Cell(text, sort=text)


def section(name: str, k: int, figures: Sequence[Figure] = (), notes: str = "") -> Section:
    facts = Table("Facts", (Head("Fact"), Head("Value")), tuple((words(f), words(name)) for f in ("a", "b")), (0, 1))
    rows = tuple((words(f"class {c}"), number(c * 10), number(0.5 + c / 7)) for c in range(6))
    classes = Table("Classes", (Head("Class"), Head("Support"), Head("Recall")), rows)
    return Section(name, (facts, classes), tuple(figures), notes, k == 0, "classification", curves(k), 36.0, 2700.0)


def report(runs: int, scores: Sequence[float | None] = (), **options: Any) -> Report:
    """A report with an accuracy for each run."""
    names = [f"resnet3d-190-{k:08x}" for k in range(runs)]
    of = [*scores, *(0.5 + k / 1000 for k in range(runs))][:runs]
    rows = tuple(
        (words(name), number(score), number(10.0 * k), words("seed=1, optimizer.lr=0.0003, batch_size=4"))
        for k, (name, score) in enumerate(zip(names, of, strict=True))
    )
    heads = (Head("Run"), Head("accuracy", "higher is better"), Head("Step"), Head("Differs in"))
    sections = tuple(section(name, k) for k, name in enumerate(names))
    return Report(Table("Runs", heads, rows, (0, 3)), options.pop("sections", sections), {}, **options)


PAGES = count()


def written(folder: Path, made: Report) -> Path:
    path = folder / f"page-{next(PAGES)}" / "index.html"
    path.parent.mkdir()
    path.write_text(page.render(made), encoding="utf-8")
    return path


def column(browser: Browser, place: int) -> list[str]:
    return browser.texts(f".long tbody tr > :nth-child({place})")


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_opens_without_a_complaint_or_a_request(
    browser: Browser, tmp_path: Path, size: tuple[int, int], dark: bool
) -> None:
    shown = written(tmp_path, report(5, groups=Table("Over seeds", (Head("Group"),), ((words("g"),),))))
    browser.open(shown, size, dark)
    assert browser.find("h1").text == "Report: 5 runs" and len(column(browser, 1)) == 6
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.run("document.querySelector('#run-5').scrollIntoView({behavior: 'instant'})")
    drawn = "return document.querySelectorAll('#run-5 path.line').length"
    browser.wait(lambda: browser.run(drawn) == 2)
    assert browser.run("return document.documentElement.scrollWidth") <= size[0]
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
    )
    assert browser.logs() == [] and browser.requests() == [shown.as_uri()]


def test_numbers_on_the_page_are_those_of_the_result(browser: Browser, tmp_path: Path) -> None:
    def result(accuracy: float) -> dict[str, Any]:
        best = {
            "epoch": 3,
            "step": 225,
            "checkpoint": "g001-s00000225",
            "metrics": {"accuracy": accuracy, "loss": 0.3125},
        }
        return {"finished": True, "task": "classification", "best": best, "last": best, "monitor": "accuracy"}

    results = {"a-11111111": result(0.8125), "b-22222222": result(0.9375)}
    runs = [RunData(run, {"task": "classification"}, result=one) for run, one in results.items()]
    _, path = write_report(runs, tmp_path)
    browser.open(path)
    overview = "document.querySelector('.long')"
    heads = browser.run(
        f"return [...{overview}.querySelectorAll('thead th')].map(h => h.innerText.split('\\n')[0].trim())"
    )
    rows = f"[...{overview}.querySelectorAll('tbody tr')]"
    shown = browser.run(f"return {rows}.map(r => [...r.cells].map(c => (c.firstChild?.textContent ?? '').trim()))")
    for run, cells in zip(results, shown, strict=True):
        told = dict(zip(heads, cells, strict=True))
        best = results[run]["best"]
        assert told["Run"] == run and float(told["Best epoch"]) == best["epoch"]
        assert {name: float(told[name]) for name in ("accuracy", "loss")} == best["metrics"]
    assert browser.texts(".change.better")[0] == "(+0.125)"
    browser.find('a[href="#run-2"]').click()
    assert browser.run("return document.querySelector('#run-2').closest('details').open")
    assert browser.logs() == []


def test_hostile_words_are_only_words(browser: Browser, tmp_path: Path) -> None:
    hostile = Curve(HOSTILE, HOSTILE, (1.0, 2.0), (1.0, 2.0), (0.5, 0.6))
    sections = [section(f"{k}{HOSTILE}", k, notes=HOSTILE) for k in range(2)]
    sections = [Section(**{**vars(one), "curves": (hostile,), "group": HOSTILE}) for one in sections]
    rows = tuple((Cell(one.run, "+1", "better", one.run), Cell("1", sort="'\" onmouseover=x")) for one in sections)
    overview = Table(HOSTILE, (Head(HOSTILE, HOSTILE), Head("n")), rows)
    made = Report(overview, tuple(sections), {HOSTILE: HOSTILE}, introduction=HOSTILE, baseline=HOSTILE)
    browser.open(written(tmp_path, made))
    for details in browser.driver.find_elements("css selector", "details:not([open]) summary"):
        details.click()
    browser.find(".long thead button").click()
    browser.find(CHART).send_keys("\ue014")
    assert browser.find("#curves .hint").text.count("<script>") == 2
    assert browser.run("return [window.hacked, document.images.length, document.scripts.length]") == [None, 0, 2]
    assert browser.find(".long tbody a").text.startswith(f"0{HOSTILE[:40]}")
    assert browser.logs() == []


def test_reads_without_its_script(browser: Browser, tmp_path: Path) -> None:
    browser.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(written(tmp_path, report(5)))
        assert "drawn by a script" in browser.find("#curves").text and browser.find("h1").text
        assert not browser.driver.find_elements("css selector", "button, input, select")
        browser.find(".long tbody tr:nth-child(4) a").click()
        assert browser.find("#run-4 caption").is_displayed(), "the browser unfolds what a link leads into"
    finally:
        browser.cdp("Emulation.setScriptExecutionDisabled", value=False)


def test_landmarks_captions_and_names(browser: Browser, tmp_path: Path) -> None:
    picture = Figure.of("roc", png(tmp_path / "roc.png", 10))
    browser.open(written(tmp_path, report(1, sections=(section("a", 0, [picture]),))))
    asked = """
      const all = (s) => [...document.querySelectorAll(s)];
      return {lang: document.documentElement.lang, main: all('main').length, h1: all('h1').length,
        tables: all('table').filter(t => !t.caption?.textContent || !t.tHead).length,
        heads: all('th:not([scope])').length, pictures: all('img').filter(i => !i.alt.includes('roc of a')).length,
        inputs: all('input, select').filter(i => !i.labels.length && !i.ariaLabel).length,
        buttons: all('button').filter(b => !b.innerText.trim()).length,
        charts: all('svg.curves').filter(s => !s.ariaLabel || s.tabIndex !== 0).length,
        ids: all('[id]').length - new Set(all('[id]').map(e => e.id)).size}"""
    assert browser.run(asked) == {
        "lang": "en", "main": 1, "h1": 1, "tables": 0, "heads": 0, "pictures": 0, "inputs": 0, "buttons": 0,
        "charts": 0, "ids": 0,
    }  # fmt: skip
    browser.press("\ue004")
    assert browser.run("return document.activeElement.innerText") == "Skip to the content"
    assert browser.run("return document.activeElement.getBoundingClientRect().left") >= 0, "visible when it is reached"


# --- sorting and filtering ------------------------------------------------------------------------------------------

SCORES = [0.9, 0.1, None, 0.5, 0.1, 10.0, 9.0]


def test_a_table_is_sorted_by_clicks_and_by_keys(browser: Browser, tmp_path: Path) -> None:
    browser.open(written(tmp_path, report(len(SCORES), SCORES)))
    names = column(browser, 1)
    button = browser.find(".long thead th:nth-child(2) button")
    button.click()
    assert column(browser, 2) == ["10", "9", "0.9", "0.5", "0.1", "0.1", "–"], "numbers as numbers, the best first"
    assert browser.find(".long th:nth-child(2)").get_attribute("aria-sort") == "descending"
    button.send_keys("\n")
    assert column(browser, 2) == ["0.1", "0.1", "0.5", "0.9", "9", "10", "–"], "a dash is last either way"
    assert column(browser, 1)[:2] == [names[1], names[4]], "equal ones stay in their order"
    assert browser.run("return document.activeElement.innerText") == "accuracy", "the focus stays"
    browser.press("\ue004", " ")
    assert column(browser, 3) == [str(10 * k) for k in range(len(SCORES))]
    assert browser.run("return document.querySelectorAll('.long th[aria-sort]').length") == 1
    browser.find(".long thead th:first-child button").click()
    assert column(browser, 1) == sorted(names)


def test_the_filter_leaves_what_fits(browser: Browser, tmp_path: Path) -> None:
    browser.open(written(tmp_path, report(30)))
    browser.find("input[type=search]").send_keys("0000001 SEED")
    assert len(column(browser, 1)) == len(browser.texts("details.run")) == 15
    assert browser.find(".count").text == "15 of 30 runs"
    assert browser.run("return document.querySelectorAll('#curves .legend li:not([hidden])').length") == 15
    assert drawn(browser) == (6, 6), "the first of those that are listed"
    browser.find("input[type=search]").send_keys(" nothing")
    assert column(browser, 1) == [] and browser.find(".count").text == "0 of 30 runs"
    assert drawn(browser) == (0, 0) and not browser.find(".long table").is_displayed()


def test_runs_that_were_ticked_by_hand_are_drawn_where_they_are_listed(browser: Browser, tmp_path: Path) -> None:
    browser.open(written(tmp_path, report(30)))
    assert drawn(browser) == (6, 6)
    browser.run("[...document.querySelectorAll('#curves .legend input')].slice(1, 9).forEach(box => box.click())")
    assert drawn(browser) == (4, 4)
    browser.find("input[type=search]").send_keys("seed 00000006")
    assert drawn(browser) == (1, 1)


def drawn(browser: Browser) -> tuple[int, int]:
    """Lines of the shared curves, and ticked runs among those that are listed."""
    lines = browser.run("return document.querySelectorAll('#curves svg.curves path.line').length")
    ticked = browser.run("return document.querySelectorAll('#curves .legend li:not([hidden]) input:checked').length")
    return lines, ticked


# --- curves ---------------------------------------------------------------------------------------------------------


def axis(browser: Browser) -> list[float]:
    """The marks under the curves."""
    script = (
        "return [...document.querySelectorAll('#curves svg.curves text[text-anchor=middle]')].map(t => t.textContent)"
    )
    return [float(text) for text in browser.run(script) if text not in ("epoch", "step")]


def wheel(browser: Browser, delta: int) -> None:
    browser.run(
        "const s = document.querySelector(arguments[0]), b = s.getBoundingClientRect();"
        "s.dispatchEvent(new WheelEvent('wheel', {deltaY: arguments[1], ctrlKey: true, clientX: b.left + b.width / 2,"
        " clientY: b.top + 100, bubbles: true, cancelable: true}))",
        CHART,
        delta,
    )


def test_curves_zoom_by_mouse_keys_and_wheel_and_reset(browser: Browser, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains

    browser.open(written(tmp_path, report(3)))
    chart, whole = browser.find(CHART), axis(browser)
    assert whole[-1] == EPOCHS
    reset = browser.driver.find_element("xpath", "//*[@id='curves']//button[.='Reset zoom']")
    assert not reset.is_enabled()
    ActionChains(browser.driver).move_to_element_with_offset(chart, -200, 0).click_and_hold().move_by_offset(
        150, 20
    ).release().perform()
    dragged = axis(browser)
    assert dragged != whole and dragged[-1] - dragged[0] < (whole[-1] - whole[0]) / 2
    reset.click()
    assert axis(browser) == whole and not reset.is_enabled()
    chart.send_keys("+++")
    assert axis(browser)[-1] < whole[-1]
    chart.send_keys("0")
    assert axis(browser) == whole
    for _ in range(4):
        wheel(browser, -100)
    assert axis(browser)[0] > whole[0] and axis(browser)[-1] < whole[-1]
    for _ in range(8):
        wheel(browser, 100)
    assert axis(browser) == whole and browser.logs() == []


def test_two_fingers_zoom_on_the_phone(browser: Browser, tmp_path: Path) -> None:
    browser.open(written(tmp_path, report(3)), PHONE)
    whole = axis(browser)
    browser.run(f"document.querySelector('{CHART}').scrollIntoView({{behavior: 'instant', block: 'center'}})")

    def touch(kind: str, *places: float) -> None:
        points = [{"x": x, "y": 420, "id": k} for k, x in enumerate(places)]
        browser.cdp("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    touch("touchStart", 180, 220)
    for spread in range(10, 80, 10):
        touch("touchMove", 180 - spread, 220 + spread)
    touch("touchEnd")
    zoomed = axis(browser)
    assert zoomed[0] > whole[0] and zoomed[-1] < whole[-1]
    assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]


def test_curves_are_read_compared_and_drawn_on_a_log_scale(browser: Browser, tmp_path: Path) -> None:
    made = report(12)
    browser.open(written(tmp_path, made))
    lines = "return document.querySelectorAll('#curves path.line').length"
    marks = "return document.querySelectorAll('#curves circle.best').length"
    look = "p.getAttribute('class') + p.getAttribute('stroke-dasharray')"
    looks = f"return [...document.querySelectorAll('#curves path.line')].map(p => {look})"
    assert (browser.run(lines), browser.run(marks)) == (6, 6), "the first runs, each with its best epoch"
    browser.driver.find_element("xpath", "//button[.='Tick all listed']").click()
    assert browser.run(lines) == 12 and len(set(browser.run(looks))) == 12
    browser.find(CHART).send_keys("\ue010")  # End
    expected = f"{made.sections[0].curves[1].values[-1]:.4g}"
    assert browser.texts("#curves .legend output")[0] == expected
    assert f"epoch {EPOCHS}: {made.sections[0].run} {expected}" in browser.find("#curves .hint").text
    browser.find("#curves .legend input").click()
    assert browser.run(lines) == 11
    metric, split, _ = browser.driver.find_elements("css selector", "#curves select")
    split.send_keys("both")
    assert browser.run(lines) == 22
    metric.send_keys("loss")
    assert browser.run(lines) == 11, "its training has no loss"
    browser.find("#curves input[type=checkbox]").click()
    marks_y = browser.run(
        "return [...document.querySelectorAll('#curves text[text-anchor=end]')].map(t => t.textContent)"
    )
    assert {"0.1", "1"} <= set(marks_y) and "log scale" in browser.find("#curves .title").text
    assert browser.logs() == []


# --- themes, paper, size --------------------------------------------------------------------------------------------


def test_the_theme_is_switched_and_kept(browser: Browser, tmp_path: Path) -> None:
    path = written(tmp_path, report(2))
    browser.open(path)
    button = browser.driver.find_element("xpath", "//button[.='Dark theme']")
    button.click()
    assert browser.run("return getComputedStyle(document.body).color") == "rgb(230, 233, 236)"
    browser.open(path)
    back = browser.driver.find_element("xpath", "//button[.='Light theme']")
    back.click()
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.run("localStorage.clear()")


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """As WCAG 2 has it."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_words_and_lines_stand_out_in_both_themes() -> None:
    style = (Path(page.__file__).parent / "page.css").read_text()
    pairs = {
        name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    }
    for theme in (0, 1):
        for back in ("back", "band"):
            for name in ("text", "soft", "link", "better", "worse"):
                assert contrast(pairs[name][theme], pairs[back][theme]) >= 4.5, (name, back, theme)
        for name in ("edge", *(f"curve-{k}" for k in range(8))):
            assert contrast(pairs[name][theme], pairs["back"][theme]) >= 3, (name, theme)
    assert "prefers-reduced-motion" in style and "@media print" in style and "url(" not in style


def test_on_paper_every_run_is_whole(browser: Browser, tmp_path: Path) -> None:
    browser.open(written(tmp_path, report(5)))
    browser.cdp("Emulation.setEmulatedMedia", media="print")
    assert browser.run("return document.querySelector('#run-5 caption').getBoundingClientRect().height") > 0
    assert not browser.find("#tools").is_displayed()
    browser.cdp("Emulation.setEmulatedMedia", media="")
    assert base64.b64decode(browser.cdp("Page.printToPDF")["data"]).startswith(b"%PDF")
    drawn = (
        "return [...document.querySelectorAll('.single svg.curves')].map(s => s.querySelectorAll('path.line').length)"
    )
    assert browser.run(drawn) == [2] * 5


def test_twenty_runs_are_below_two_megabytes(tmp_path: Path) -> None:
    """With as many pictures as are let into a page, and ten long curves of each run."""
    share = INLINED // 20
    longest = tuple(float(k) for k in range(200))
    long = tuple(
        Curve(f"metric {k}", split, longest, longest, tuple(math.sin(x + k) for x in longest))
        for k in range(5)
        for split in ("train", "validation")
    )
    made = report(20)
    pictures = [Figure.of("roc", png(tmp_path / f"{k}.png", share - 900)) for k in range(20)]
    sections = [
        Section(**{**vars(one), "curves": long, "figures": (picture,)})
        for one, picture in zip(made.sections, pictures, strict=True)
    ]
    text = page.render(Report(made.overview, tuple(sections), {}))
    assert text.count("data:image/png") == 20 and 0.9 * INLINED < sum(picture.size for picture in pictures) <= INLINED
    assert len(text.encode()) < 2_000_000


def test_a_thinned_curve_keeps_its_ends_and_its_best_point() -> None:
    steps = tuple(float(k) for k in range(200))
    made = report(1)
    [first] = made.sections
    long = tuple(Curve(f"m{k}", "validation", steps, steps, steps) for k in range(400))
    text = page.render(Report(made.overview, (Section(**{**vars(first), "curves": long, "best_step": 101.0}),), {}))
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)[0])
    kept = data["axes"][0][0]
    assert kept[0] == 0 and kept[-1] == 199 and 101.0 in kept and 40 <= len(kept) <= 52


def test_two_hundred_runs_open_and_answer(browser: Browser, tmp_path: Path, record_property: Any) -> None:
    path = written(tmp_path, report(200))
    browser.open(path)
    timing = browser.run(
        "const t = performance.getEntriesByType('navigation')[0]; return [t.domInteractive, t.loadEventEnd]"
    )
    assert len(column(browser, 1)) == 200 and browser.logs() == []
    megabytes = path.stat().st_size / 1e6
    record_property(
        "measured", f"page of 200 runs, {megabytes:.1f} MB: usable after {timing[0]:.0f} ms, load {timing[1]:.0f} ms"
    )


def test_runs_of_several_tasks_stand_in_a_table_each_with_their_own_metrics() -> None:
    heads = (Head("Run"), Head("auc"), Head("dice"))
    rows = tuple((Cell(f"r{k}"), Cell(auc), Cell(dice)) for k, (auc, dice) in enumerate([("0.5", "–"), ("–", "0.7")]))
    overview = Table("Runs", heads, rows, tasks=("multilabel", "segmentation"))
    sections = tuple(Section(f"r{k}", (), (), "", baseline=False) for k in range(2))
    text = page.render(Report(overview, sections, {}))
    first, second = (part.partition("</table>")[0] for part in text.split("<table>")[1:3])
    assert 'href="#run-1"' in first and "auc" in first and "dice" not in first and ">multilabel<" in first
    assert 'href="#run-2"' in second and "dice" in second and "auc" not in second and ">segmentation<" in second
