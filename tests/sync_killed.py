"""Syncs over ssh that are killed (SIGKILL) at random bytes, one after the other, while the run goes on.

    python -m tests.sync_killed box:/path/runs /path/home ROUNDS SEED

Each round is a process of its own that dies in the middle of a write, a request or an answer, or at some moment: where
is drawn from what there is to write, and from what a whole sync asks, is answered and takes, so nearly all die at work.
The source grows between them, with torn tails, a second and a third attempt. Prints one JSON line: how they ended.
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
from hpc.logs.blocks import whole_records
from hpc.logs.ends import RemoteEnd, place_of
from hpc.logs.sync import Carried, Session
from tests.syncing import FIRST, SECOND, THIRD, attempt, visible

STEPS = 60
"""Of each attempt; the next one begins 10 steps before its end."""


def life() -> dict[str, bytes]:
    """The event files of a run that was preempted twice."""
    spans = {FIRST: (0, STEPS, 1), SECOND: (STEPS - 10, 2 * STEPS, 2), THIRD: (2 * STEPS - 10, 3 * STEPS, 3)}
    return {name: attempt(*span) for name, span in spans.items()}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def one(source: str, home: str, kill: str = "", limit: float = 0.0) -> dict[str, float]:
    """A child: one sync that ends by its own SIGKILL; what a whole one asked and was answered (bytes) and took (s)."""
    pwrite, send, receive = os.pwrite, RemoteEnd._send, RemoteEnd._receive
    done = {"write": 0.0, "ask": 0.0, "answer": 0.0}

    def take(what: str, size: int) -> int:
        """So many of these bytes are still allowed."""
        left = limit - done[what] if kill == what else size + 1
        done[what] += size
        return int(left) if left < size else size

    def write_some(handle: int, data: bytes, at: int) -> int:
        allowed = take("write", len(data))
        written = pwrite(handle, data[:allowed], at)
        return written if allowed == len(data) else die()  # type: ignore[func-returns-value, return-value]

    def send_some(self: RemoteEnd, data: bytes) -> None:
        if self.moved:  # not the agent itself, which is longer than all that follows
            allowed = take("ask", len(data))
            if allowed < len(data):
                send(self, data[:allowed])
                die()
        send(self, data)

    def receive_some(self: RemoteEnd, size: int) -> bytes:
        allowed = take("answer", size)
        if allowed < size:
            receive(self, allowed)
            die()
        return receive(self, size)

    agent.os.pwrite = write_some  # type: ignore[attr-defined]
    RemoteEnd._send, RemoteEnd._receive = send_some, receive_some  # type: ignore[method-assign]
    signal.signal(signal.SIGALRM, lambda *_: die())
    signal.setitimer(signal.ITIMER_REAL, max(limit, 1e-3) if kill == "moment" else 0)
    began = time.monotonic()
    session = Session(place_of(source), place_of(home), Carried(), batch=True)
    session.round()
    session.close()
    return {**done, "moment": time.monotonic() - began}


def child(source: str, home: str, kill: str = "", limit: float = 0.0) -> dict[str, float] | None:
    """What `one` tells; None where it was killed."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        try:
            os.write(writing, json.dumps(one(source, home, kill, limit)).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as told:
        text = told.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a sync ended with code {status}")
    return None if status else json.loads(text)


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


def unwritten(runs: Path, home: Path) -> int:
    """Bytes of whole records that the destination has not."""
    there = visible(home)
    return sum(
        max(whole_records(content).valid - len(there.get(name, b"")), 0) for name, content in visible(runs).items()
    )


def main() -> None:
    source, home, rounds, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    rng, runs = random.Random(seed), Path(source.partition(":")[2])
    (tensorboard,) = runs.glob("*/tb")
    child(source, str(home))  # the first has to connect
    usual = child(source, str(home)) or {}
    ends: dict[str, int] = {}
    for number in range(rounds):
        grow(tensorboard, (number + 1) / rounds)
        new = unwritten(runs, home)
        kill = rng.choice(("write", "write", "ask", "answer", "moment") if new else ("ask", "answer", "moment"))
        most = new if kill == "write" else usual[kill]
        told = child(source, str(home), kill, rng.random() * most)
        usual["moment"] = min(usual["moment"], told["moment"] if told else usual["moment"])
        word = f"{kill}: {'whole' if told else 'killed'}"
        ends[word] = ends.get(word, 0) + 1
        if wrong := check(runs, home):
            print(json.dumps({"round": number, "kill": kill, "wrong": wrong}), flush=True)
            sys.exit(1)
    print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    main()
