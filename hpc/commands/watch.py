"""Commands that tell what runs do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from hpc.commands.common import AsJson, RunName, RunNames, Runs, app, expanded, print_json, say, table, width
from hpc.errors import UserError

if TYPE_CHECKING:
    from hpc.ledger import Status
    from hpc.rundir import RunDir
    from hpc.sweepdir import SweepDir
    from hpc.why import Answer, Group

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")]
Tail = Annotated[int | None, typer.Option("--tail", min=0, help="Only the last N lines of each file.", metavar="N")]
Rank = Annotated[int | None, typer.Option("--rank", min=0, help="Only the task of this rank.", metavar="K")]


@app.command("ls", rich_help_panel="Watch")
def list_runs(
    names: RunNames = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="A line for each row of each sweep.")] = False,
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """List runs and sweeps: state, job, epoch, step, best metric; of a sweep that is named, its rows."""
    from hpc import ledger
    from hpc.rundir import all_runs, runs_folder
    from hpc.sweepdir import SweepDir

    folder = runs_folder(runs)
    targets = [ledger.find(folder, name) for name in names or []]
    found = expanded(targets) if names else list(all_runs(folder))
    if not found and not as_json:
        say(f"no runs in {folder}; start one with 'hpc submit EXPERIMENT.yaml'")
        return
    statuses = ledger.statuses(found)
    if as_json:
        _list_json(found, statuses)
    elif len(targets) == 1 and isinstance(targets[0], SweepDir):
        _list_rows(found, statuses)
    else:
        _list_all(statuses, everything or bool(names))


def _list_json(found: list[RunDir], statuses: list[Status]) -> None:
    from hpc.records import read_delta

    both = zip(found, statuses, strict=True)
    print_json([{**status.as_dict(), "path": str(run.path), "delta": read_delta(run)} for run, status in both])


def _list_rows(found: list[RunDir], statuses: list[Status]) -> None:
    from hpc import listing, tables

    tables.print_rows(listing.row_lines(found, statuses), width(), listing.DROP_OF_ROWS)
    say(f"\n{listing.sweep_line('', statuses)['rows']}")
    if best := listing.best_in_words(statuses):
        say(f"best {best}")


def _list_all(statuses: list[Status], everything: bool) -> None:
    from hpc import listing, tables

    alone = [status for status in statuses if everything or not status.sweep]
    sweeps: dict[str, list[Status]] = {}
    for status in statuses:
        if status.sweep and not everything:
            sweeps.setdefault(status.sweep, []).append(status)
    tables.print_rows(listing.run_lines(alone, width()), width(), listing.DROP_OF_RUNS)
    if alone and sweeps:
        say()
    lines = [listing.sweep_line(name, rows) for name, rows in sweeps.items()]
    tables.print_rows(lines, width(), listing.DROP_OF_SWEEPS)


@app.command(rich_help_panel="Watch")
def show(name: RunName, runs: Runs = None, as_json: AsJson = False) -> None:
    """Show one run: state, metrics per epoch, events, use of the machine. Of a sweep: its axes, rows and best row."""
    from hpc import ledger
    from hpc.rundir import runs_folder
    from hpc.sweepdir import SweepDir

    target = ledger.find(runs_folder(runs), name)
    if isinstance(target, SweepDir):
        _show_sweep(target, as_json)
    else:
        _show_run(target, as_json)


def _show_run(run: RunDir, as_json: bool) -> None:
    from hpc import ledger, steptimes, usage
    from hpc.metrics import decimals
    from hpc.rundir import read_json

    status, metrics, events = ledger.status(run), run.read_metrics(), run.read_events()
    if as_json:
        state = read_json(run.state)
        found = {"status": status.as_dict(), "state": state, "metrics": metrics, "events": events}
        print_json({**found, "autotune": read_json(run.autotune)})
        return
    say(f"{run.path}\n{status.state}  {status.detail}".rstrip())
    names = sorted(metrics[0]["metrics"] if metrics else [], key=lambda name: (name != status.monitor, name != "loss"))
    rows = [
        [str(m["epoch"]), str(m["step"]), m["split"], *(decimals(m["metrics"].get(name)) for name in names)]
        for m in metrics
    ]
    table(["epoch", "step", "split", *names], rows)
    for event in events:
        fields = "  ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "event"))
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        say(f"{clock}  {event['event']:<10}  {fields}")
    for line in [*steptimes.lines(steptimes.typical(metrics)), *usage.card(run)]:
        say(line)
    if choice := read_json(run.autotune).get("choice"):
        say("autotune: " + ", ".join(f"{key} {value}" for key, value in choice.items()))


def _show_sweep(sweep: SweepDir, as_json: bool) -> None:
    from hpc import ledger, listing

    axes = sweep.axes()
    rows = sweep.rows()
    statuses = ledger.statuses(rows)
    best = listing.best_row(statuses)
    if as_json:
        told = [{**status.as_dict(), "row": number} for number, status in enumerate(statuses)]
        print_json({"sweep": sweep.name, "path": str(sweep.path), "axes": axes, "best_row": best, "rows": told})
        return
    say(str(sweep.path))
    for key, values in axes.items():
        shown = [*values[:8], "...", values[-1]] if len(values) > 10 else values
        say(f"{key} = {', '.join(map(str, shown))}")
    say()
    _list_rows(rows, statuses)
    if best is not None:
        say(f"see it: hpc show {statuses[best].run}")


@app.command(rich_help_panel="Watch")
def why(name: RunName, runs: Runs = None, as_json: AsJson = False) -> None:
    """Explain the state of a run or sweep in words, and say what to type next."""
    from hpc import ledger
    from hpc import why as explanations
    from hpc.rundir import runs_folder
    from hpc.sweepdir import SweepDir

    target = ledger.find(runs_folder(runs), name)
    if isinstance(target, SweepDir):
        groups = explanations.explain_sweep(target)
        print_json([group.as_dict() for group in groups]) if as_json else _say_groups(target, groups)
        return
    answer = explanations.explain(target)
    if as_json:
        print_json(answer.as_dict())
        return
    say(f"{answer.run} is {answer.state}")
    _say_answer(answer)


def _say_lines(lines: list[str], indent: str = "") -> None:
    import textwrap

    wrap = textwrap.TextWrapper(min(width(), 110), indent, indent, break_long_words=False, break_on_hyphens=False)
    for line in lines:
        say(wrap.fill(line))


def _say_answer(answer: Answer) -> None:
    _say_lines(answer.lines)
    if answer.quote:
        say(f"\n{answer.source}" if answer.source else "")
        say("\n".join(f"    {line}" for line in answer.quote))
    if answer.attempts:
        say("\nbefore that")
        say("\n".join(f"    {line}" for line in answer.attempts))
    say("\nnext")
    say("\n".join(f"    {command}" for command in answer.commands))


def _say_groups(sweep: SweepDir, groups: list[Group]) -> None:
    from hpc.why import rows_in_words

    for group in groups:
        answer = group.answer
        cause = f": {answer.cause}" if answer.cause != answer.state else ""
        say(f"{rows_in_words(group.rows)} {answer.state}{cause}")
        if answer.state not in ("finished", "running"):
            first = [f"The first of them, {answer.run}:"] if len(group.rows) > 1 else []
            _say_lines([*first, *answer.lines], "    ")
    open_states = {"failed", "lost", "stopped", "cancelled", "planned"}
    bad = next((group for group in groups if group.answer.state in open_states), None)
    say("\nnext")
    if bad:
        say(f"    hpc why {bad.answer.run}")
        say(f"    hpc resume {sweep.name}")
    else:
        say(f"    hpc ls {sweep.name}")


@app.command(rich_help_panel="Watch")
def watch(
    names: RunNames = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and leave.")] = False,
    runs: Runs = None,
) -> None:
    """Live runs: progress, time left, loss and metric, samples/s, what the queue says. Ctrl-C leaves."""
    from hpc import ledger
    from hpc import watch as view
    from hpc.rundir import runs_folder

    folder = runs_folder(runs)
    targets = [ledger.find(folder, name) for name in names or []]
    view.watch(folder, expanded(targets) if names else None, once, width())


@app.command(rich_help_panel="Watch")
def logs(name: RunName, follow: Follow = False, tail: Tail = None, rank: Rank = None, runs: Runs = None) -> None:
    """Print what a run's tasks wrote to stdout and stderr."""
    from hpc import foreground, ledger
    from hpc.rundir import runs_folder
    from hpc.sweepdir import SweepDir

    target = ledger.find(runs_folder(runs), name)
    if isinstance(target, SweepDir):
        _list_rows(target.rows(), ledger.statuses(target.rows()))
        raise UserError(f"{target.name} is a sweep: each row has logs of its own; hpc logs {target.rows()[0].name}")
    foreground.print_logs(target, follow, tail, rank)
