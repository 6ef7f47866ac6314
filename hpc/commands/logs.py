"""Commands that bring logs home: sync and prune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hpc.commands.common import AsJson, Runs, app, print_json, say, table
from hpc.errors import UserError

_CRON_S = 600


@app.command(rich_help_panel="Results")
def sync(
    source: Annotated[str | None, typer.Argument(help="Runs folder here, or host:path.", metavar="[SRC]")] = None,
    dest: Annotated[
        str | None, typer.Argument(help="Runs folder here, host:path, or mlflow:URI.", metavar="[DEST]")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the runs until Ctrl-C.")] = False,
    every: Annotated[str, typer.Option(help="Between two rounds of --watch.", metavar="TIME")] = "10s",
    from_cron: Annotated[
        bool, typer.Option("--from-cron", help="Say nothing unless it fails; asks for no password.")
    ] = False,
    at_most: Annotated[
        str | None, typer.Option(help="Stop after so long (--from-cron: 10min).", metavar="TIME", show_default=False)
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--with", help="Carry these too: checkpoints, code, quarantine.", metavar="FOLDER"),
    ] = None,
    most: Annotated[str, typer.Option(help="Leave larger files that are no event files.", metavar="SIZE")] = "100MB",
    status: Annotated[bool, typer.Option("--status", help="What is confirmed where; 1 if behind.")] = False,
    forget: Annotated[
        str | None, typer.Option(help="With --status: ask no more what this sink has.", metavar="SINK")
    ] = None,
    as_json: AsJson = False,
    runs: Runs = None,
) -> None:
    """Bring runs home: event files record by record, so that an open TensorBoard follows; the rest by rsync."""
    if status:
        if dest is not None:
            raise UserError("--status looks at one folder of runs; leave DEST out")
        _status(Path(source) if source else runs, forget, as_json)
    if as_json or forget:
        raise UserError(f"{'--json' if as_json else '--forget'} goes with --status")
    if source is None or dest is None:
        raise UserError("name where from and where to: hpc sync SRC DEST; 'hpc sync --status' tells where things are")
    if watch and from_cron:
        raise UserError("--watch and --from-cron exclude each other: cron comes again by itself")
    limit_s = _seconds(at_most, "--at-most") if at_most else _CRON_S if from_cron else None
    raise typer.Exit(_sync(source, dest, _seconds(every, "--every") if watch else None, from_cron, limit_s, more, most))


def _sync(
    source: str,
    dest: str,
    every_s: float | None,
    cron: bool,
    limit_s: float | None,
    more: list[str] | None,
    most: str,
) -> int:
    from hpc.logs import following, sinks
    from hpc.logs.ends import Unreachable, place_of
    from hpc.logs.sync import Busy, Carried, DestinationFailed
    from hpc.units import gigabytes

    try:
        limit = int(gigabytes(most) * 1e9)
    except ValueError as error:
        raise UserError(f"--most: {error}") from None
    carried = Carried(_more(more), limit)
    sinks.refuse_others(source, dest)
    try:
        with following.bounded(limit_s):
            if sinks.is_sink(dest):
                return _feed(source, dest, every_s, cron)
            ends = place_of(source), place_of(dest)
            if every_s is None:
                return following.once(*ends, carried, batch=cron, quiet=cron)
            return following.follow(*ends, carried, every_s)
    except following.TimeUp:
        print(f"stopped after {limit_s:.0f} s (--at-most); the next sync goes on from here", file=sys.stderr)
    except (Unreachable, DestinationFailed, Busy) as error:
        print(error, file=sys.stderr)
    return 1


def _feed(source: str, uri: str, every_s: float | None, cron: bool) -> int:
    """Replay the runs into a tracker."""
    from hpc.logs import following, sinks
    from hpc.logs.ends import place_of
    from hpc.rundir import runs_folder

    place = place_of(source)
    if place.host:
        raise UserError(f"{source} is elsewhere: bring it here first (hpc sync {source} FOLDER), then FOLDER to {uri}")
    folder = runs_folder(Path(place.path))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of runs")

    before: list[str] = []

    def once() -> int:
        told: list[str] = []

        def tell(line: str) -> None:
            told.append(line)
            if not cron and line not in before:  # --watch says it once
                say(line)

        code = sinks.feed(folder, uri, (), tell)
        before[:] = told
        if cron and code:
            print(*told, sep="\n", file=sys.stderr)
        return code

    return once() if every_s is None else following.repeat(once, every_s)


def _more(names: list[str] | None) -> tuple[str, ...]:
    from hpc.errors import nearest
    from hpc.logs.sync import more_names

    known = more_names()
    for name in names or ():
        if name not in known:
            raise UserError(f"--with {name}: no such folder; {nearest(name, known)}")
    return tuple(dict.fromkeys(names or ()))


def _seconds(text: str, option: str) -> float:
    from hpc.units import seconds

    try:
        return seconds(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def _status(runs: Path | None, forget: str | None, as_json: bool) -> None:
    from hpc.logs import status
    from hpc.rundir import runs_folder

    folder = runs_folder(runs)
    if forget:
        print(status.forget(folder, forget), file=sys.stderr)
    found = status.look(folder)
    if as_json:
        print_json(found.as_dict())
    else:
        table(list(status.TITLES), status.rows(found))
        say(found.sentence)
    raise typer.Exit(found.exit_code)


@app.command(rich_help_panel="Results")
def prune(
    older_than: Annotated[str, typer.Option("--older-than", help="30d, 12h: since anything in it changed.")],
    only: Annotated[
        str | None, typer.Option(help="Only this part of each run: logs or checkpoints.", show_default=False)
    ] = None,
    sink: Annotated[str | None, typer.Option(help="Only what this sink has.", show_default=False)] = None,
    unasked: Annotated[
        bool, typer.Option("--unasked", help="Believe a sink that cannot be reached from here.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only show.")] = False,
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """Remove runs that a sink has confirmed as a whole and that are older than asked; shows first."""
    from hpc.logs import prune as pruning
    from hpc.logs.following import size
    from hpc.rundir import runs_folder
    from hpc.units import short_time

    folder, older_s = runs_folder(runs), _seconds(older_than, "--older-than")
    found = pruning.candidates(folder, older_s, only, sink, unasked)
    chosen = [one for one in found if not one.kept]
    if as_json:
        keys = ("name", "age_s", "size", "kept", "sink")
        print_json([{key: getattr(one, key) for key in keys} | {"files": len(one.files)} for one in found])
    else:
        rows = [[one.name, size(one.size), str(len(one.files)), short_time(one.age_s)] for one in found]
        words = [f"stays: {one.kept}" if one.kept else f"goes: {one.sink} has it" for one in found]
        table(list(pruning.TITLES), [[*row, word] for row, word in zip(rows, words, strict=True)])
    if yes:
        for line in pruning.remove(folder, chosen, older_s, only, unasked):
            print(line, file=sys.stderr if as_json else sys.stdout)
    elif not as_json:
        total = size(sum(one.size for one in chosen))
        say(
            f"{len(chosen)} of {len(found)} would go, {total}" + ("; --yes compares and removes them" if chosen else "")
        )
