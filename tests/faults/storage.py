"""B1 to B11 and G1: what disks, kills and intruders do to checkpoints. Each is played in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults import storage_cli, storage_damage, storage_errors, storage_kills, storage_pickles
from tests.faults.fault import Fault
from tests.faults.storage_states import staged

Play = Callable[[Path, int], str]


def alone(play: Play) -> Play:
    """For what forks, or replaces functions of `os`."""
    return partial(staged, play)


FAULTS = [
    Fault(
        "B1",
        "kill -9 in place of each storage call, and in the middle of each write; 12 saves, k = 2",
        "the checkpoint before or the new one loads bit for bit, and the next attempt saves",
        alone(storage_kills.kill_at_every_call),
    ),
    Fault(
        "B2",
        "kill -9 at a random time of a process that saves without a pause",
        "the last one that was promised loads, or the one after it",
        alone(storage_kills.kill_at_random),
        here=10,
        soak=500,
    ),
    Fault(
        "B3",
        "the power goes at each call: of what was not synced any part is lost",
        "what loads is whole, and never older than what was promised",
        alone(storage_errors.power_cut),
        soak=20,
    ),
    Fault(
        "B4",
        "each call fails (ENOSPC, EDQUOT, EIO, EROFS) once, for one save, and for ever; short writes",
        "saved again at once; training goes on, the old one stays, one folder aside at most; the fifth time it ends",
        alone(storage_errors.fail_every_call),
    ),
    Fault(
        "B5", "RLIMIT_FSIZE at any byte", "the old one stays, and the next save works", alone(storage_cli.file_limit)
    ),
    Fault(
        "B5",
        "hpc train on a file system that fills, and on one without room",
        "trains on and saves again when there is room; refused at the start with exit code 74",
        storage_cli.full_disk,
        soak=5,
    ),
    Fault(
        "B6",
        "20 of: a bit flipped, cut short, a page or the tail zeroed, removed, swapped, stale, grown; each file in turn",
        "0 silent: the one before is loaded, the bad one is in quarantine with its reason",
        alone(storage_damage.twenty),
        here=5,
        soak=100,
    ),
    Fault(
        "B7",
        "hpc resume of a run whose checkpoints are all corrupt",
        "exit code 74, nothing is deleted, nothing starts afresh",
        storage_cli.all_corrupt,
        soak=5,
    ),
    Fault(
        "B8",
        "k = 2, the newest goes bad as it is saved, kill -9 at each call of a deletion",
        "the last verified one is never deleted",
        alone(storage_kills.kill_while_deleting),
    ),
    Fault(
        "B9",
        "hpc train on a disk whose writes sleep, SIGTERM within a save",
        "the training stands still for less than a tenth of a save; the last state is on the disk, exit code 75",
        storage_cli.slow_disk,
        soak=5,
    ),
    Fault(
        "B10",
        "two generations save into one folder: the first is killed, or sleeps, at each call",
        "one or the other loads, never a mix; the first writes nothing once it is fenced",
        alone(storage_kills.two_writers),
    ),
    Fault(
        "B11",
        "each fsync fails once with EIO and loses the file's bytes; then the power goes",
        "never a success after a failed fsync: the file is written anew",
        alone(storage_errors.failed_syncs),
    ),
    Fault(
        "G1",
        "a pickle in each file that is read: checkpoints (sums forged, too), weights, volumes, run folder",
        "never executed",
        alone(storage_pickles.planted_pickles),
    ),
]
