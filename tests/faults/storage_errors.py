"""Calls that fail, and power that goes: the disk says no once or for good, a sync fails, un-synced changes are lost."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from jobs import checkpoint
from jobs.saving import Saver
from tests.faults import storage_powercut
from tests.faults.shim import SYNCS, WRITES, Call, FailAt, Shim
from tests.faults.storage_kills import Board, Key, calls_of, goes_on, key, two_attempts
from tests.faults.storage_powercut import Disk, Tree, by_chance, everything, nothing
from tests.faults.storage_states import STEPS, Place, Saving, quick

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
PATIENCE = 5
"""Failed saves in a row, after which the run ends."""
MOST_ASIDE = 1
"""Temporary folders that may be left."""


# B4: the n-th call fails.


def fail_every_call(folder: Path, number: int) -> str:
    with quick(folder) as memory:
        first = Place.new(memory / "first")
        with Saving(first, 1) as saving:
            saving.save(1)
        whole = Place(memory / "whole")
        shutil.copytree(first.run, whole.run)
        calls = calls_of(_second_save, whole, Board())
        plays = [(call.number, code) for call in calls for code in CODES]
        for at, code in plays:
            for play in (_once, _for_one_save, _for_ever):
                place = Place(memory / "run")
                shutil.copytree(first.run, place.run)
                try:
                    play(place, at, code)
                except AssertionError as error:
                    raise AssertionError(
                        f"{errno.errorcode[code]} at call {at} ({calls[at - 1].name}): {error}"
                    ) from error
                place.remove()
        short = [call.number for call in calls if call.name in WRITES]
        for at in short:
            _short(first, Place(memory / "run"), at)
        shutil.copytree(first.run, memory / "run")
        _slow_log(Place(memory / "run"))
    return f"{len(calls)} calls x {len(CODES)} errors x 3, {len(short)} short writes"


def _second_save(place: Place, board: Board) -> None:
    with Saving(place, 2, keep=1) as saving:
        saving.save(2)


def _once(place: Place, at: int, code: int) -> None:
    """The same snapshot is saved once more, at once."""
    failing = FailAt(at, code)
    with Shim(place.run, failing), Saving(place, 2, keep=1) as saving:
        saving.save(2)
    assert failing.failed, "nothing failed"
    assert not saving.saver.failed, f"{saving.saver.failed} count as failed"
    assert key(place.load()) == (2, 2), "the save was lost"
    assert len(place.asides()) <= MOST_ASIDE, f"left aside: {place.asides()}"
    goes_on(place, 3)


def _for_one_save(place: Place, at: int, code: int) -> None:
    """Both tries fail: training goes on, somebody is told, and the next save tries again."""
    failing, broken = FailAt(at, code, forever=True), True
    with Shim(place.run, lambda call: failing(call) if broken else None), Saving(place, 2, keep=1) as saving:
        saving.save(2, wait=False)
        with suppress(checkpoint.StorageError):
            saving.saver.wait()
        durable = not saving.saver.failed
        assert durable or saving.reports.count("save-failed") == 2, f"reported: {saving.reports}"
        found = key(place.load())
        assert found == (2, 2) or (found == (1, 1) and not durable), f"{found} is found; promised: {durable}"
        assert len(place.asides()) <= MOST_ASIDE, f"left aside: {place.asides()}"
        broken = False
        saving.save(3)
    assert key(place.load()) == (2, 3), "the next save was not made"
    assert not place.asides(), f"left aside: {place.asides()}"


def _for_ever(place: Place, at: int, code: int) -> None:
    """Every save fails: the fifth ends the run, and the last good one is there."""
    failing, step = FailAt(at, code, forever=True), 1
    with Shim(place.run, failing):
        saving = Saving(place, 2, keep=1).__enter__()
        try:
            for step in range(2, STEPS):
                saving.save(step, wait=False)
                with suppress(checkpoint.StorageError):
                    saving.saver.wait()
            raise AssertionError("it never gave up")
        except checkpoint.StorageError as error:
            assert error.errno == code and "\n" not in str(error), f"{error!r}"
        assert len(saving.saver.failed) == PATIENCE, f"it gave up at step {step}, after {saving.saver.failed}"
        with suppress(checkpoint.StorageError):
            saving.saver.close()
    last = step - 1 - PATIENCE  # the save of `step` was refused at once
    wanted, found = (2, last) if last > 1 else (1, 1), place.load()
    # A whole one that was not promised is no harm: its rename could be neither synced nor taken back.
    assert key(found) == wanted or found.name in saving.saver.failed, f"{wanted} was saved, {found.name} is found"
    assert len(place.asides()) <= MOST_ASIDE, f"left aside: {place.asides()}"
    goes_on(place, 3)


def _short(first: Place, place: Place, at: int) -> None:
    """A write that takes only half of its bytes is no error: the rest must follow."""
    shutil.copytree(first.run, place.run)
    half = lambda call: len(call.content) // 2 if call.number == at else None  # noqa: E731
    with Shim(place.run, half), Saving(place, 2, keep=1) as saving:
        saving.save(2)
    assert key(place.load()) == (2, 2), f"write {at} was short, and its rest is lost"
    assert not place.quarantine.exists()
    place.remove()


class _Slow(logging.Handler):
    """A log that is as slow as the disk: it takes a line when the training has gone on."""

    def __init__(self, gone_on: threading.Event) -> None:
        super().__init__()
        self._gone_on = gone_on

    def emit(self, record: logging.LogRecord) -> None:
        if "written again" in record.getMessage():
            self._gone_on.wait(10)


def _slow_log(place: Place) -> None:
    """What follows a save must not take the next one for it: its buffer is filled again meanwhile."""
    failing, broken, gone_on = FailAt(1, errno.ENOSPC, forever=True), True, threading.Event()
    handler, log = _Slow(gone_on), logging.getLogger(Saver.__module__)
    with Shim(place.run, lambda call: failing(call) if broken else None), Saving(place, 2) as saving:
        saving.save(2, wait=False)
        with suppress(checkpoint.StorageError):
            saving.saver.wait()
        broken = False
        log.addHandler(handler)
        saving.save(3)
        last = saving.save(4, wait=False)
        gone_on.set()
    log.removeHandler(handler)
    assert key(place.load()) == (2, 4)
    faults = saving.reports.count("save-failed") - 2
    assert not faults and last not in saving.saver.failed, f"{last} was saved, and is reported as failed"
    place.remove()


# B3: the power goes.


def power_cut(folder: Path, number: int) -> str:
    with quick(folder) as memory:
        place = Place.new(memory / "whole")
        disk = recorded(place, lambda board: two_attempts(place, board))
        states, cuts = 0, 0
        for told in through(disk):
            cuts += 1
            for tree in _states(disk, number + cuts):
                states += 1
                _loads(Place.new(memory / "run"), tree, told, again=states % 20 == 0)
    assert cuts >= 150, f"{cuts} cuts prove little"
    return f"{cuts} cuts, {states} different states, all load what was promised"


def recorded(place: Place, script: Callable[[Board], None], fails: Callable[[Call], None] = lambda call: None) -> Disk:
    """What a script did to a disk. Nothing may have been written by other ways: the replay must give the same files."""
    disk = Disk(place.run)

    class Marking(Board):
        def tell(self, generation: int, step: int) -> None:
            disk.mark(f"{generation} {step}")

    with Shim(place.run, fails, disk.record):
        script(Marking())
    for entry in disk.trace:
        disk.play(entry)
    assert disk.now() == storage_powercut.read(place.run), "something was written that the shim does not see"
    return disk


def through(disk: Disk) -> Iterator[Key]:
    """Go through the record call by call; gives the last save that was promised."""
    disk.rewind()
    told: Key = (0, 0)
    for entry in disk.trace:
        disk.play(entry)
        if isinstance(entry, str):
            generation, step = map(int, entry.split())
            told = generation, step
        yield told


def _states(disk: Disk, seed: int) -> list[Tree]:
    """Different states that the disk may be in now."""
    choices = (nothing, everything, by_chance(2 * seed), by_chance(2 * seed + 1))
    return list({storage_powercut.digest(tree): tree for tree in map(disk.after_power_cut, choices)}.values())


def _loads(place: Place, tree: Tree, told: Key, again: bool) -> None:
    storage_powercut.write(tree, place.run)
    if told == (0, 0) and checkpoint.load_newest(place.checkpoints, place.quarantine) is None:
        place.remove()
        return
    found = key(place.load())
    assert found >= told, f"{told} was promised, {found} is found"
    if again:
        goes_on(place, 3)
    place.remove()


# B11: a sync fails once.


def failed_syncs(folder: Path, number: int) -> str:
    """Each sync of two saves in turn fails, and what it was to keep is gone; then the power goes."""
    with quick(folder) as memory:

        def script(place: Place, board: Board) -> None:
            with Saving(place, 1) as saving:
                for step in (1, 2):
                    saving.save(step)  # a failed sync is no failed save: it is written once more
                    saving.settled({checkpoint.name_of(1, number) for number in range(1, step + 1)})
                    board.tell(1, step)

        syncs = [call for call in calls_of(script, Place.new(memory / "whole"), Board()) if call.name in SYNCS]
        for sync in syncs:
            place = Place.new(memory / "run")
            disk = recorded(place, lambda board, place=place: script(place, board), FailAt(sync.number, errno.EIO))
            place.remove()
            told = (0, 0)
            for told in through(disk):
                for tree in _states(disk, sync.number) if told != (0, 0) else []:
                    _loads(Place.new(memory / "run"), tree, told, again=False)
            assert told == (1, 2), f"{told} is the last that was promised"
    return f"{len(syncs)} syncs failed, each save was written again and outlives a power cut"
