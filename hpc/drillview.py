"""What a terminal sees of a drill as it goes: a live line for each run; without a terminal, a line for each change."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from hpc.drilling import Way
from hpc.progress import bar
from hpc.tables import cut

_BAR, _NAME, _STEPS = 16, 11, 11
_LONGEST = 100
"""Characters of a line without a terminal."""
_EVERY_S = 0.2


class View:
    """On stderr; to be used as a context manager."""

    def __init__(self, ways: Sequence[Way]) -> None:
        self._ways = ways
        self._console = Console(stderr=True, highlight=False)
        self._plain = not (self._console.encoding or "").lower().startswith("utf")
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._told: dict[str, str] = {}
        self._began = time.monotonic()
        self._shown = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self.show(last=True)
            self._live.stop()

    def show(self, last: bool = False) -> None:
        """Bring it up to date, five times a second at most."""
        now = time.monotonic()
        if self._live is None:
            self._tell(now)
        elif last or now - self._shown >= _EVERY_S:
            self._shown = now
            self._live.update(Group(*map(self._line, self._ways)), refresh=True)

    def _tell(self, now: float) -> None:
        for way in self._ways:
            if self._told.get(way.name, "") != way.words:
                self._told[way.name] = way.words
                words = cut(way.words, _LONGEST)
                print(f"{now - self._began:6.1f} s  {way.name:<{_NAME}}  {words}", file=sys.stderr, flush=True)

    def _line(self, way: Way) -> Text:
        share = way.steps.last / way.total if way.total else 0.0
        done = len(way.sent)
        count = f"{done} of {len(way.injections)}  " if way.injections else ""
        steps = f"{way.steps.last}/{way.total or '?'}"
        style = {"": "", "finished": "green"}.get(way.ended, "red")
        text = Text(f"{way.name:<{_NAME}}  ", no_wrap=True)
        text.append(f"{bar(share, _BAR, self._plain)}  {steps:>{_STEPS}}  ", style="cyan")
        return text.append(cut(f"{count}{way.words}", max(self._console.width - text.cell_len, 0)), style=style)
