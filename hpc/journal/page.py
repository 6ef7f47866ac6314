"""The report as one HTML page that needs nothing else: figures, style, script and curves inside, no network.

Of many runs the foremost figures only (content.INLINED); the others are files beside it, as in the Markdown.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.journal.content import Cell, Curve, Report, Section, evenly
from hpc.journal.markdown import figure_file
from hpc.tables import printable

if TYPE_CHECKING:
    from markupsafe import Markup

_HERE = Path(__file__).parent
_OPEN = 3  # runs that are shown unfolded
_POINTS = 20_000  # of all curves together, about 150 kB
_FEWEST = 40  # points of a curve, however many runs there are
_IN_SCRIPT = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"})


def render(report: Report) -> str:
    """The text of index.html; everything that comes from runs and notes is escaped by the template engine."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    source = (_HERE / "page.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown).from_string(source)
    return template.render(
        report=report,
        style=Markup(style),
        script=Markup(script),
        policy=Markup(_policy(style, script)),
        data=Markup(_json(_curves(report.sections))),
        key_of=_sort_key,
        places={section.run: place for place, section in enumerate(report.sections, start=1)},
        file_of=figure_file,
        open_runs=_OPEN,
    )


def _shown(value: Any) -> Any:
    """Words on one line; what is escaped already, as notes, keeps its lines."""
    return printable(value) if type(value) is str else value


def _policy(style: str, script: str) -> str:
    """Nothing but this page's own style and script runs, and nothing is fetched."""
    return (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _json(value: Any) -> str:
    """Text that can stand in a script element: no tag can end it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).translate(_IN_SCRIPT) if value else ""


def _sort_key(cell: Cell) -> Markup:
    """Attribute of a cell: a number to sort by, an empty one for what stands last, none where the text serves."""
    from markupsafe import Markup

    key = cell.sort
    if isinstance(key, str):
        return Markup("") if key == cell.text and not cell.change else Markup(' data-text="{}"').format(key)
    if key is None or math.isnan(key):
        return Markup(' data-number=""')
    shown = repr(key) if math.isfinite(key) else ("Infinity" if key > 0 else "-Infinity")
    return Markup(' data-number="{}"').format(shown)


def _curves(sections: Sequence[Section]) -> dict[str, Any] | None:
    """What the script draws: names once, steps and epochs once for all curves that share them; None without curves."""
    curves = [curve for section in sections for curve in section.curves]
    if not curves:
        return None
    most = max(_FEWEST, _POINTS // len(curves))
    metrics = list(dict.fromkeys(curve.metric for curve in curves))
    splits = list(dict.fromkeys(curve.split for curve in curves))
    axes: dict[tuple[tuple[float, ...], tuple[float, ...]], int] = {}
    runs = []
    for section in sections:
        lines = []
        for curve in section.curves:
            kept = _kept(curve, most, section.best_step)
            axis = tuple(_picked(curve.steps, kept)), tuple(_picked(curve.epochs, kept))
            place = axes.setdefault(axis, len(axes))
            values = [_short(value) for value in _picked(curve.values, kept)]
            lines.append([metrics.index(curve.metric), splits.index(curve.split), place, values])
        runs.append({"name": printable(section.run), "best": [section.best_step, section.best_epoch], "lines": lines})
    return {"metrics": [*map(printable, metrics)], "splits": splits, "axes": list(axes), "runs": runs}


def _kept(curve: Curve, most: int, best_step: float | None) -> list[int]:
    """Places of at most about `most` points: evenly spread, with the first, the last and the best one."""
    best = {k for k, step in enumerate(curve.steps) if step == best_step}
    return sorted(evenly(len(curve.steps), most) | best)


def _picked(sequence: Sequence[Any], places: Iterable[int]) -> list[Any]:
    return [sequence[place] for place in places]


def _short(value: float | None) -> float | None:
    """Five digits: what a reader of a curve can tell apart."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
