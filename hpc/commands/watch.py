"""Commands that tell what runs do."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from hpc.commands.common import AsJson, RunName, Runs, app, print_json, say, table, width

_NARROW, _NAME, _DETAIL, _GAP = 100, 32, 12, 2
"""Widths: of a terminal that shows less; of a name and of a detail where there is little room; between two columns."""


@app.command("ls", rich_help_panel="Watch")
def list_runs(runs: Runs = None, as_json: AsJson = False) -> None:
    """List all runs: state, job, epoch, step, best metric."""
    from hpc import ledger
    from hpc.rundir import all_runs, runs_folder

    folder = runs_folder(runs)
    found = ledger.statuses(list(all_runs(folder)))
    if as_json:
        print_json([status.as_dict() for status in found])
    elif not found:
        say(f"no runs in {folder}; start one with 'hpc submit EXPERIMENT.yaml'")
    else:
        table(*_fitted([_row(status) for status in found], width()))


def _row(status: Any) -> dict[str, str]:
    from hpc.units import short_time

    return {
        "run": status.run,
        "state": status.state,
        "epoch": str(status.epoch),
        "step": str(status.step),
        "best": status.metric,
        "attempts": str(status.attempts),
        "job": f"{status.cluster} {status.job}".strip(),
        "changed": f"{short_time(status.age_s)} ago",
        "": " ".join(status.detail.split()),
    }


def _fitted(rows: list[dict[str, str]], width: int) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of one line each: in a narrow terminal columns are left out, and long texts are cut."""
    sizes = {title: max(len(title), *(len(row[title]) for row in rows)) for title in rows[0]}
    shown = [title for title in sizes if width >= _NARROW or title not in ("attempts", "job", "changed")]
    if sum(sizes.values()) + _GAP * len(sizes) > width:
        sizes["run"] = min(sizes["run"], _NAME)
    for title in ("changed", "attempts", "job", "epoch", "best", "step", ""):
        detail = min(sizes[""], _DETAIL) if "" in shown else 0
        if sum(sizes[t] for t in shown if t) + detail + _GAP * (len(shown) - 1) > width and title in shown:
            shown.remove(title)
    room = {title: sizes[title] for title in shown}
    for title, shorten in (("", _cut), ("run", _cut_middle)):
        if title in room:
            taken = sum(room[t] for t in shown if t != title) + _GAP * (len(shown) - 1)
            room[title] = min(room[title], max(width - taken, 0))
            rows = [{**row, title: shorten(row[title], room[title])} for row in rows]
    return shown, [[row[title] for title in shown] for row in rows]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 3, 0)] + "..."


def _cut_middle(name: str, room: int) -> str:
    """A run's name with its id, by which it is found."""
    return name if len(name) <= room else f"{name[: max(room - 11, 0)]}..{name[-9:]}"


@app.command(rich_help_panel="Watch")
def show(name: RunName, runs: Runs = None, as_json: AsJson = False) -> None:
    """Show one run: state, metrics per epoch, events, files."""
    from hpc import ledger
    from hpc.rundir import find_run, read_json, runs_folder

    run = find_run(runs_folder(runs), name)
    status, metrics, events = ledger.status(run), run.read_metrics(), run.read_events()
    if as_json:
        state = read_json(run.state)
        print_json({"status": status.as_dict(), "state": state, "metrics": metrics, "events": events})
        return
    say(f"{run.path}\n{status.state}  {status.detail}".rstrip())
    columns = ["epoch", "step", "split", *(metrics[0]["metrics"] if metrics else [])]
    rows = [
        [str(m["epoch"]), str(m["step"]), m["split"], *(f"{value:.4f}" for value in m["metrics"].values())]
        for m in metrics
    ]
    table(columns, rows)
    for event in events:
        fields = "  ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "event"))
        say(f"{_clock(event['time'])}  {event['event']:<10}  {fields}")


def _clock(when: float) -> str:

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


@app.command(rich_help_panel="Watch")
def logs(
    name: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    runs: Runs = None,
) -> None:
    """Print what a run's tasks wrote to stdout and stderr."""
    from hpc import foreground
    from hpc.rundir import find_run, runs_folder

    foreground.print_logs(find_run(runs_folder(runs), name), follow)
