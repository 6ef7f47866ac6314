"""`hpc sync`: once, again and again with what is behind on the screen, or from cron; what each prints and ends with."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hpc.logs.ends import IDLE_S, Place, Unreachable
from hpc.logs.sync import Busy, Carried, DestinationFailed, Line, Round, Session
from hpc.tables import cut, cut_middle
from hpc.units import short_time

_LONGEST_PAUSE_S = 60.0
_SHOWN = 20
"""Lines of runs on the screen; those that have ended and are here are left out first."""


class TimeUp(BaseException):
    """--at-most is over. No library that takes any Exception for a failed request may take this for one."""


class Shower(Protocol):
    """Where the rounds are told."""

    def told(self, done: Round) -> None: ...

    def lost(self, why: str, pause_s: float) -> None: ...


def once(source: Place, dest: Place, carried: Carried, batch: bool, quiet: bool) -> int:
    """One round; exit code 1 where something could not be carried."""
    try:
        session = Session(source, dest, carried, batch)
        try:
            done = session.round()
        finally:
            session.close()
    except Busy as error:
        return 0 if quiet else _failed(str(error))
    except (DestinationFailed, Unreachable) as error:
        return _failed(str(error))
    if not quiet:
        for note in done.notes:
            print(note)
        print(summary(done))
    for problem in done.problems:
        print(problem, file=sys.stderr)
    return int(bool(done.problems))


def _failed(words: str) -> int:
    print(words, file=sys.stderr)
    return 1


def follow(source: Place, dest: Place, carried: Carried, every_s: float) -> int:
    """Rounds until Ctrl-C; what is lost is taken up again. The first round must succeed."""
    session: Session | None = Session(source, dest, carried)
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pause_s = 1.0
    try:
        with _screen(console, f"{source} -> {dest}", every_s) as shower:
            while True:
                try:
                    session = session or Session(source, dest, carried, batch=not console.is_terminal)
                    shower.told(session.round())
                    pause_s = 1.0
                    if every_s > IDLE_S / 2:  # a far end does not wait so long
                        session.close()
                        session = None
                    time.sleep(every_s)
                except (Unreachable, DestinationFailed, Busy) as error:
                    if session:
                        session.close()
                    session = None
                    shower.lost(str(error), pause_s)
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    except KeyboardInterrupt:
        return 0
    finally:
        if session:
            session.close()


def repeat(call: Callable[[], int], every_s: float) -> int:
    """Feed a sink again and again until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            call()
            time.sleep(every_s)
    except KeyboardInterrupt:
        return 0


@contextmanager
def bounded(seconds: float | None) -> Iterator[None]:
    """Raises TimeUp when the time is over; what has been carried by then is kept."""

    def over(*_: object) -> None:
        raise TimeUp

    if seconds is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def summary(done: Round) -> str:
    """One round in a line."""
    live = [line for line in done.lines if not line.ended]
    words = [f"{len(done.lines)} runs" + (f", {len(live)} not ended" if live else ""), news(done)]
    if damaged := [line for line in done.lines if line.damaged]:
        words.append(f"{len(damaged)} damaged: hpc fsck {damaged[0].run.rpartition('/')[2]}")
    behind = [line for line in done.lines if line.behind and not line.damaged]
    if behind:
        worst = max(behind, key=lambda line: line.behind)
        words.append(f"{worst.run} is {size(worst.behind)} behind")
    elif live and (newest := min((line.here_s for line in live if line.here_s is not None), default=None)) is not None:
        words.append(f"newest record {short_time(newest)} old")
    return "; ".join(words)


def news(done: Round) -> str:
    """What a round carried."""
    if not done.records and not done.others:
        return f"nothing new ({done.seconds:.1f} s)"
    return f"{size(done.size)} new in {done.records} records, {done.others} other files ({done.seconds:.1f} s)"


def size(count: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


@contextmanager
def _screen(console: Console, title: str, every_s: float) -> Iterator[Shower]:
    if not console.is_terminal:
        yield _Lines()
        return
    with Live(console=console, screen=False, auto_refresh=False) as live:
        yield _Table(live, console, title, every_s)


class _Lines:
    """One line a round, where there is no terminal."""

    def __init__(self) -> None:
        self._known: list[str] = []
        """What was told of the round before."""

    def told(self, done: Round) -> None:
        for note in done.notes:
            if note not in self._known:
                self._say(note)
        self._say(summary(done))
        for problem in done.problems:
            if problem not in self._known:
                print(problem, file=sys.stderr, flush=True)
        self._known = done.notes + done.problems

    def lost(self, why: str, pause_s: float) -> None:
        self._say(f"{why}; again in {short_time(pause_s)}")

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class _Table:
    """The runs with what is behind, on a terminal."""

    def __init__(self, live: Live, console: Console, title: str, every_s: float) -> None:
        self._live, self._console, self._title, self._every_s = live, console, title, every_s
        self._last = Round()

    def told(self, done: Round) -> None:
        self._last = done
        runs = f"{len(done.lines)} runs" if done.lines else "no runs yet"
        self._draw(
            f"{time.strftime('%H:%M:%S')}  {runs}; {news(done)}; every {short_time(self._every_s)}, Ctrl-C ends", ""
        )

    def lost(self, why: str, pause_s: float) -> None:
        self._draw(f"{time.strftime('%H:%M:%S')}  {why}; again in {short_time(pause_s)}", "yellow")

    def _draw(self, footer: str, style: str) -> None:
        width = self._console.width
        table = Table.grid(padding=(0, 2, 0, 0))
        titles = ("run", "state", "step", "records", "newest there", "here", "behind")
        for number, _ in enumerate(titles):
            table.add_column(no_wrap=True, justify="left" if number < 2 else "right")
        table.add_row(*(Text(title, style="bold") for title in titles))
        done = self._last
        shown = sorted(done.lines, key=lambda line: (line.ended, -line.behind, line.there_s or 0))[:_SHOWN]
        for line in shown:
            table.add_row(*_cells(line, max(width - 60, 12)))
        left = len(done.lines) - len(shown)
        parts: list[Table | Text] = [Text(cut(self._title, width), style="dim"), table]
        parts += [Text(f"and {left} more", style="dim")] if left else []
        parts += [Text(cut(words, width), style="yellow") for words in (*done.notes, *done.problems)]
        self._live.update(Group(*parts, Text(cut(footer, width), style=style)), refresh=True)


def _cells(line: Line, room: int) -> list[Text]:
    ages = ["-" if age is None else short_time(age) for age in (line.there_s, line.here_s)]
    step = "-" if line.last_step is None else str(line.last_step)
    state = "ended" if line.ended else line.phase or "-"
    behind = Text(size(line.behind) if line.behind else "-", style="yellow" if line.behind else "green")
    cells = [Text(cut_middle(line.run, room)), Text(state), Text(step), Text(str(line.records))]
    return [*cells, *(Text(age) for age in ages), behind]
