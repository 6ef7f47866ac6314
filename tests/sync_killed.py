"""Syncs over ssh that are killed (SIGKILL) at random bytes, one after the other, while the run goes on.

    python -m tests.sync_killed box:/path/runs /path/home ROUNDS SEED

Each round is a process of its own that dies in the middle of a write, of an answer, or at some moment. The source
grows between them, with torn tails, a second and a third attempt. Prints one JSON line: how they ended.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from hpc.logs import agent
from hpc.logs.ends import RemoteEnd, place_of
from hpc.logs.sync import Carried, Session
from tests.syncing import FIRST, SECOND, THIRD, attempt, visible

STEPS = 60
"""Of each attempt; the next one begins 10 steps before its end."""


def life() -> dict[str, bytes]:
    """The event files of a run that was preempted twice."""
    spans = {FIRST: (0, STEPS, 1), SECOND: (STEPS - 10, 2 * STEPS, 2), THIRD: (2 * STEPS - 10, 3 * STEPS, 3)}
    return {name: attempt(*span) for name, span in spans.items()}


def one(source: str, home: str, kill: str, limit: float) -> None:
    """A child: one sync that ends by its own SIGKILL."""
    pwrite, receive = os.pwrite, RemoteEnd._receive
    left = [limit]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_some(handle: int, data: bytes, at: int) -> int:
        if len(data) >= left[0]:
            pwrite(handle, data[: int(left[0])], at)
            die()
        left[0] -= len(data)
        return pwrite(handle, data, at)

    def receive_some(self: RemoteEnd, size: int) -> bytes:
        left[0] -= size
        if left[0] < 0:
            die()
        return receive(self, size)

    if kill == "write":
        agent.os.pwrite = write_some  # type: ignore[attr-defined]
    elif kill == "answer":
        RemoteEnd._receive = receive_some  # type: ignore[method-assign]
    else:
        signal.signal(signal.SIGALRM, lambda *_: die())
        signal.setitimer(signal.ITIMER_REAL, max(limit, 1e-3))
    session = Session(place_of(source), place_of(home), Carried(), batch=True)
    session.round()
    session.close()


def grow(tensorboard: Path, share: float) -> None:
    """The run at some share of its life, cut at any byte; an older file is whole when a newer one is there."""
    files = life()
    left = int(share * sum(map(len, files.values())))
    for name, content in files.items():
        if left <= 0:
            return
        path = tensorboard / name
        had = path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            file.write(content[had : max(had, left)])
        left -= len(content)


def check(runs: Path, home: Path) -> str:
    """What is wrong at the destination; nothing of it may be but beginnings of the source's files."""
    sources = visible(runs)
    for name, content in visible(home).items():
        if not sources.get(name, b"").startswith(content):
            return f"{name}: {len(content)} bytes are not the source's"
    return ""


def main() -> None:
    source, home, rounds, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    rng, runs = random.Random(seed), Path(source.partition(":")[2])
    (tensorboard,) = runs.glob("*/tb")
    ends: dict[str, int] = {}
    for number in range(rounds):
        grow(tensorboard, (number + 1) / rounds)
        kill = rng.choice(("write", "write", "answer", "moment"))
        most = {"write": 600, "answer": 12_000, "moment": 0.5}[kill]
        child = os.fork()
        if child == 0:
            try:
                one(source, home, kill, rng.random() * most)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        word = f"{kill}: killed" if os.WIFSIGNALED(status) else f"{kill}: whole"
        ends[word] = ends.get(word, 0) + 1
        if wrong := check(runs, Path(home)):
            print(json.dumps({"round": number, "kill": kill, "wrong": wrong}), flush=True)
            sys.exit(1)
        (runs / "killed").write_text(f"{number + 1} {time.time()}")
    print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    main()
