"""`hpc watch`: what runs do, live; the work of each refresh is bounded.

Every 2 s the files of live runs are looked at, and read where they have changed; every 10 s all runs, and squeue.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hpc import pending
from hpc.ledger import Scheduler, Seen, Status, count_states, look
from hpc.progress import Pace, Series, bar, sparkline
from hpc.records import Reader
from hpc.rundir import RunDir, all_runs
from hpc.tables import cut, cut_middle
from hpc.units import short_time

_REFRESH_S, _ASK_S = 2.0, 10.0
_RECENT_S = 3600.0
"""So long a run that has ended is shown."""
_MOST_WAITING, _MOST_ENDED = 8, 6
_STYLES = {"finished": "green", "failed": "red", "lost": "red", "cancelled": "yellow", "stopped": "yellow"}


class Watcher:
    """What is known of the watched runs; `update` brings it up to date."""

    def __init__(self, runs: Path, chosen: Sequence[RunDir] | None = None) -> None:
        """`chosen`: these runs, whatever their state; else all of the folder, those that ended lately."""
        self._folder, self._chosen = runs, chosen
        self._scheduler, self._reader = Scheduler(_ASK_S), Reader(keep=True)
        self._looked_at = float("-inf")
        self._seen: dict[Path, Seen] = {}
        self._series: dict[Path, Series] = {}
        self._paces: dict[Path, Pace] = {}

    def update(self) -> None:
        """Look at the live runs, and at all of them when that is due."""
        now = time.monotonic()
        if now - self._looked_at >= _ASK_S:
            self._looked_at = now
            runs = list(self._chosen) if self._chosen is not None else all_runs(self._folder)
            self._seen = {seen.run.path: seen for seen in look(runs, self._scheduler, self._reader)}
        else:
            live = [seen.run for seen in self._seen.values() if seen.status.live]
            self._seen |= {seen.run.path: seen for seen in look(live, self._scheduler, self._reader)}

    @property
    def over(self) -> bool:
        """Whether the chosen runs have all ended."""
        return self._chosen is not None and not any(seen.status.live for seen in self._seen.values())

    def running(self) -> list[Seen]:
        return [seen for seen in self._seen.values() if seen.status.state == "running"]

    def waiting(self) -> list[Seen]:
        return [seen for seen in self._seen.values() if seen.status.live and seen.status.state != "running"]

    def ended(self) -> list[Seen]:
        """Runs that have ended, the last ones first."""
        over = [seen for seen in self._seen.values() if not seen.status.live and seen.status.state != "planned"]
        recent = [seen for seen in over if self._chosen is not None or seen.status.age_s < _RECENT_S]
        return sorted(recent, key=lambda seen: seen.status.age_s)

    def statuses(self) -> list[Status]:
        return [seen.status for seen in self._seen.values()]

    def progress(self, seen: Seen) -> tuple[Series, Pace]:
        """Metrics and pace of a running run, brought up to date."""
        series = self._series.setdefault(seen.run.path, Series(seen.run))
        pace = self._paces.setdefault(seen.run.path, Pace(seen.run))
        series.update()
        if seen.records and seen.records.state:
            pace.update(seen.records)
        return series, pace


class Frame:
    """One picture of what a watcher knows, for a terminal of this size."""

    def __init__(self, watcher: Watcher, width: int, height: int | None, plain: bool) -> None:
        """`height`: None for no limit. `plain`: ASCII only."""
        self._watcher, self._width, self._plain = watcher, width, plain
        self._height = height or 10**6

    def render(self) -> Group:
        waiting, ended = self._waiting(), self._ended()
        blocks = (waiting[:_MOST_WAITING], ended[:_MOST_ENDED])
        room = self._height - 2 - sum(len(block) + 1 for block in blocks if block)
        running = self._watcher.running()
        shown = running[: max(room // 2, 1)]
        parts: list[Any] = [self._running(shown)] if shown else []
        if len(running) > len(shown):
            parts.append(Text(f"and {len(running) - len(shown)} more running", style="dim"))
        for block, all_lines in zip(blocks, (waiting, ended), strict=True):
            if block:
                left = len(all_lines) - len(block)
                more = [Text(f"and {left} more", style="dim")] if left else []
                parts += [*([Text()] if parts else []), *block, *more]
        return Group(*parts, *([Text()] if parts else []), self._footer())

    def _running(self, shown: Sequence[Seen]) -> Table:
        """Two lines a run: name, bar, time left, loss; phase, steps, speed, metric."""
        table = Table.grid(padding=(0, 2, 0, 0), expand=False)
        spare = max(self._width - 80, 0)
        name, meter, curve = 22 + spare // 4, 10 + spare // 4, 7 + spare // 3
        for size in (name, meter + 6, 12, curve + 17):
            table.add_column(width=size, no_wrap=True, overflow="crop")
        for seen in shown:
            status = seen.status
            series, pace = self._watcher.progress(seen)
            share = status.step / status.steps if status.steps else 0.0
            left, speed = pace.left_s(status.steps, time.time()), series.samples_per_second()
            phase = f"{status.detail}{f' on {status.node}' if status.node else ''}"
            table.add_row(
                _lines((cut_middle(status.run, name), "bold"), (cut(phase, name), "dim")),
                _lines(
                    (f"{bar(share, meter, self._plain)} {100 * share:3.0f} %", "green"),
                    (f"{status.step}/{status.steps or '?'} steps", "dim"),
                ),
                _lines(
                    (f"{short_time(left)} left" if left is not None else "", ""),
                    (f"{speed:.4g}/s" if speed else "", "dim"),
                ),
                _lines(
                    (self._curve("loss", series.loss(), curve), "cyan"),
                    (self._curve(status.monitor, series.metric(status.monitor), curve), "magenta"),
                ),
            )
        return table

    def _curve(self, name: str, values: Sequence[float], width: int) -> str:
        if not values:
            return ""
        return f"{name[:8]:<8} {values[-1]:.4g}".ljust(16)[:16] + f" {sparkline(values, width, self._plain)}"

    def _waiting(self) -> list[Text]:
        """One line for each run, or for the rows of a sweep that wait for the same."""
        groups: dict[tuple[str, str, str], list[Seen]] = {}
        for seen in sorted(self._watcher.waiting(), key=lambda seen: not pending.hopeless(seen.status.detail)):
            name = seen.status.sweep or seen.status.run
            groups.setdefault((name, seen.status.state, seen.status.detail), []).append(seen)
        return [
            self._line(f"{name} {_rows(several)}", state, _wait(several[0]), "")
            for (name, state, _), several in groups.items()
        ]

    def _ended(self) -> list[Text]:
        return [
            self._line(seen.status.run, seen.status.state, _end(seen.status), _STYLES.get(seen.status.state, ""))
            for seen in self._watcher.ended()
        ]

    def _line(self, name: str, state: str, words: str, style: str) -> Text:
        room = 32 + max(self._width - 80, 0) // 4
        text = Text(f"{cut_middle(name.strip(), room):<{room}}  ", no_wrap=True)
        text.append(f"{state:<9}  ", style=style)
        return text.append(cut(" ".join(words.split()), max(self._width - room - 13, 0)), style="dim")

    def _footer(self) -> Text:
        counts = count_states(self._watcher.statuses()) or "no runs"
        return Text(f"{counts}{time.strftime('%H:%M:%S'):>10}", style="bold", no_wrap=True)


def _lines(*texts: tuple[str, str]) -> Text:
    return Text("\n").join([Text(text, style=style) for text, style in texts])


def _rows(several: Sequence[Seen]) -> str:
    return f"({len(several)} row{'s'[: len(several) > 1]})" if several[0].status.sweep else ""


def _wait(seen: Seen) -> str:
    if seen.job is None:
        return seen.status.detail
    start = f"from {pending.moment(seen.job.start)}: " if seen.job.start else ""
    return f"{start}{pending.in_words(seen.status.detail).words}"


def _end(status: Status) -> str:
    return f"{short_time(status.age_s)} ago  {status.metric if status.state == 'finished' else status.detail}"


def watch(runs: Path, chosen: Sequence[RunDir] | None = None, once: bool = False, width: int = 80) -> None:
    """Show runs until Ctrl-C, or until the chosen ones have ended.

    With `once`, or where there is no terminal, one frame of `width` columns.
    """
    console = Console(highlight=False)
    plain = not (console.encoding or "").lower().startswith("utf")
    watcher = Watcher(runs, chosen)
    if once or not console.is_terminal:
        watcher.update()
        Console(width=width, highlight=False).print(Frame(watcher, width, None, plain).render())
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves the terminal as it was, too
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                watcher.update()
                live.update(Frame(watcher, console.width, console.height, plain).render(), refresh=True)
                if watcher.over:
                    break
                time.sleep(_REFRESH_S)
    except KeyboardInterrupt:
        return
    console.print(Frame(watcher, console.width, None, plain).render())
