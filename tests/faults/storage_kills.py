"""SIGKILL while checkpoints are written and deleted: at every storage call, at random, and with two writers."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

from hpc.errors import UserError
from jobs import checkpoint
from tests.faults.shim import BETWEEN_PATHS, WRITES, After, Before, Call, KillAt, Shim
from tests.faults.storage_states import STEPS, Place, Saving, forked, quick, spawned, states

Key = tuple[int, int]
"""Generation and step."""
Script = Callable[[Place, "Board"], None]


class Board:
    """Two numbers that a killed process leaves: the last save that it was promised."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16)

    def tell(self, generation: int, step: int) -> None:
        self._memory[:16] = struct.pack("qq", generation, step)

    @property
    def told(self) -> Key:
        generation, step = struct.unpack("qq", self._memory[:16])
        return generation, step


def calls_of(script: Script, place: Place, board: Board, after: After = lambda call, error: None) -> list[Call]:
    """The storage calls of an undisturbed pass."""
    calls: list[Call] = []
    with Shim(place.run, calls.append, after):
        script(place, board)
    return calls


def points(calls: list[Call]) -> list[KillAt]:
    """A kill in place of each call, and one in the middle of each write. Before a close nothing is other than after."""
    wanted = [call for call in calls if call.name != "close"]
    return [KillAt(call.number) for call in wanted] + [
        KillAt(call.number, True) for call in wanted if call.name in WRITES
    ]


def crash(place: Place, script: Script, board: Board, before: Before, after: After = lambda call, error: None) -> None:
    def play() -> None:
        with Shim(place.run, before, after):
            script(place, board)

    code = forked(play, place.run / "child.txt")
    assert code == -signal.SIGKILL, f"{before} did not kill: {code}"


def key(found: checkpoint.Checkpoint) -> Key:
    return int(found.manifest["generation"]), found.step


def found_in(place: Place) -> Key:
    """(0, 0) where there never was one: then the run starts."""
    started = place.checkpoints.is_dir() and any(checkpoint.newest_first(place.checkpoints))
    return key(place.load()) if started or place.quarantine.exists() else (0, 0)


def goes_on(place: Place, generation: int) -> None:
    """The next attempt cleans up, saves, and finds what it saved."""
    checkpoint.sweep(place.checkpoints)
    assert not place.asides(), f"left aside: {place.asides()}"
    with Saving(place, generation) as saving:
        saving.save(STEPS)
    assert key(place.load()) == (generation, STEPS)
    assert not place.asides(), f"left aside: {place.asides()}"


# B1: at every storage call.

SAVES: list[Key] = [(generation, step) for generation, first in ((1, 1), (2, 7)) for step in range(first, first + 6)]
FROM_NONE: list[Key] = [(0, 0), *SAVES]
BEST = checkpoint.name_of(1, 2)


def attempt(place: Place, board: Board, generation: int) -> None:
    """Six of twelve saves, k = 2, the second one is the best; first it cleans up."""
    checkpoint.sweep(place.checkpoints)
    with Saving(place, generation) as saving:
        for number, (mine, step) in enumerate(SAVES):
            if mine == generation:
                saving.save(step, BEST)
                board.tell(generation, step)
                newest = {checkpoint.name_of(*saved) for saved in SAVES[max(0, number - 1) : number + 1]}
                saving.settled(newest | ({BEST} if number else set()))


def two_attempts(place: Place, board: Board) -> None:
    attempt(place, board, 1)
    attempt(place, board, 2)


def kill_at_every_call(folder: Path, number: int) -> str:
    count, lost = 0, 0
    with quick(folder) as memory:
        whole, before = Place.new(memory / "whole"), memory / "before"
        for generation in (1, 2):
            shutil.copytree(whole.run, before)
            play = partial(attempt, generation=generation)
            kills = points(calls_of(play, whole, Board()))
            for kill in kills:
                board, place = Board(), Place(memory / "run")
                shutil.copytree(before, place.run)
                board.tell(*FROM_NONE[6 * (generation - 1)])
                crash(place, play, board, kill)
                lost += _found_after(kill, place, board)
            count += len(kills)
            shutil.rmtree(before)
    assert count >= 300, f"{count} crash points prove little"
    return f"{count} crash points, all load; the save in hand was lost in {lost}"


def _found_after(kill: KillAt, place: Place, board: Board) -> bool:
    """Whether the save in hand was lost; the one before never is."""
    told, found = board.told, found_in(place)
    assert found in FROM_NONE[FROM_NONE.index(told) :][:2], f"{kill}: {told} was saved, {found} is found"
    assert not place.quarantine.exists(), f"{kill}: a good run has something in quarantine"
    goes_on(place, 3)
    place.remove()
    return found == told


# B2: at random.


def save_for_ever(place: Place, board: Board) -> None:
    for generation in count(1):
        checkpoint.sweep(place.checkpoints)
        with Saving(place, generation) as saving:
            for step in range(1, STEPS + 1):
                saving.save(step)
                board.tell(generation, step)


def kill_at_random(folder: Path, number: int) -> str:
    chance, board, place = random.Random(number), Board(), Place.new(folder / "run")
    states(1)  # before the fork
    child = spawned(lambda: save_for_ever(place, board), folder / "child.txt")
    try:
        while board.told == (0, 0) and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.4))
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, (folder / "child.txt").read_text()
    asides, found = place.asides(), key(place.load())
    generation, step = board.told
    following = (generation, step + 1) if step < STEPS else (generation + 1, 1)
    assert found in (board.told, following), f"{board.told} was saved, {found} is found"
    goes_on(place, found[0] + 1)
    return f"killed after {(generation - 1) * STEPS + step} saves{', within one' if asides else ''}"


# B8: the newest is corrupt, and the writer is killed as it deletes.


def spoil(path: Path) -> None:
    """Flip a bit in its largest file."""
    largest = max(path.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


BAD = {checkpoint.name_of(1, step) for step in (3, 5, 6)}
LEFT = [{1}, {1, 2}, {1, 2, 3}, {2, 3, 4}, {2, 3, 4, 5}, {2, 3, 4, 5, 6}, {4, 5, 6, 7}]
"""After each save, with k = 2: bad ones do not count."""


def spoil_on_commit(call: Call, error: OSError | None) -> None:
    if call.name in BETWEEN_PATHS and call.target and call.target.name in BAD:
        spoil(call.target)


def newest_goes_bad(place: Place, board: Board) -> None:
    """Steps 3, 5 and 6 go bad as soon as they have their name, before anything is deleted for their sake."""
    with Saving(place, 1) as saving:
        for step, left in enumerate(LEFT, start=1):
            name = saving.save(step)
            if name not in BAD:
                board.tell(1, step)
            saving.settled({checkpoint.name_of(1, number) for number in left})


def kill_while_deleting(folder: Path, number: int) -> str:
    deleting = (*BETWEEN_PATHS, "unlink", "rmdir")
    with quick(folder) as memory:
        calls = calls_of(newest_goes_bad, Place.new(memory / "whole"), Board(), spoil_on_commit)
        kills = [KillAt(call.number) for call in calls if call.name in deleting]
        for kill in kills:
            board, place = Board(), Place.new(memory / "run")
            crash(place, newest_goes_bad, board, kill, spoil_on_commit)
            found = found_in(place)
            assert found >= board.told, f"{kill}: {board.told} was good, {found} is found"
            goes_on(place, 2)
            place.remove()
    return f"{len(kills)} kills, a good one is left each time"


# B10: two generations in one folder.


def save_fifth(place: Place, generation: int, fence: Callable[[], None] = lambda: None) -> None:
    with Saving(place, generation, fence=fence) as saving:
        saving.save(5)


def refuse() -> None:
    raise UserError("the run is held by generation 2")


def two_writers(folder: Path, number: int) -> str:
    """Generation 1 is killed, or sleeps, at each call of a save, while generation 2 saves the same step."""
    with quick(folder) as memory:
        calls = calls_of(lambda place, board: save_fifth(place, 1), Place.new(memory / "whole"), Board())
        for kill in points(calls):
            place = Place.new(memory / "run")
            crash(place, lambda place, board: save_fifth(place, 1), Board(), kill)
            save_fifth(place, 2)
            assert key(place.load()) == (2, 5), f"{kill}: generation 2 is not found"
            goes_on(place, 3)
            place.remove()
        for sleep in [call.number for call in calls if call.name != "close"]:
            for told in (True, False):
                _overtaken(Place.new(memory / "run"), sleep, told)
    return f"{len(points(calls))} kills, {2 * len(calls)} sleeps: never a mix"


def _overtaken(place: Place, sleep: int, told: bool) -> None:
    """Generation 1 sleeps at a call, generation 2 starts and saves; `told`: its fence says so when it wakes."""
    what = f"asleep at call {sleep}, {'fenced' if told else 'not fenced'}"
    slept: list[set[str]] = []
    memory = place.run / "names"

    def overtake(call: Call) -> None:
        if call.number == sleep:
            slept.append(first_ones(place))
            memory.write_text("\n".join(slept[0]))
            assert forked(lambda: _second(place), place.run / "child.txt") == 0

    def first() -> None:
        with Shim(place.run, overtake), suppress(UserError, checkpoint.StorageError):
            save_fifth(place, 1, lambda: refuse() if slept and told else None)

    assert forked(first, place.run / "child.txt") == 0, what
    assert key(place.load()) == (2, 5), what
    new = first_ones(place) - set(memory.read_text().split())
    assert not (told and new), f"{what}: it was fenced, and committed {new}"
    place.remove()


def first_ones(place: Place) -> set[str]:
    return {path.name for path in place.checkpoints.glob("g001-*")}


def _second(place: Place) -> None:
    checkpoint.sweep(place.checkpoints)
    save_fifth(place, 2)
