"""Bytes that change on the disk: each mutation of each file is found, and the checkpoint before it is loaded."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from jobs import checkpoint
from tests.faults.storage_kills import goes_on, key
from tests.faults.storage_states import Place, Saving

PAGE = 4096


def flip(path: Path, other: Path, chance: random.Random) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, other: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def zero_page(path: Path, other: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = chance.randrange(0, len(content), PAGE)
    content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
    path.write_bytes(content)


def zero_tail(path: Path, other: Path, chance: random.Random) -> None:
    """Delayed allocation that was lost: the size is right."""
    content = path.read_bytes()
    kept = chance.randrange(len(content.rstrip(b"\0")))
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


def remove(path: Path, other: Path, chance: random.Random) -> None:
    path.unlink()


def swap(path: Path, other: Path, chance: random.Random) -> None:
    """With the same file of the checkpoint before; of the manifest: a stale one."""
    shutil.copy(other, path)


def exchange(path: Path, other: Path, chance: random.Random) -> None:
    """With another file of the same checkpoint."""
    neighbour = chance.choice(sorted(file for file in path.parent.iterdir() if file != path))
    aside = path.with_name("aside")
    path.rename(aside)
    neighbour.rename(path)
    aside.rename(neighbour)


def grow(path: Path, other: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(chance.randbytes(1 + chance.randrange(PAGE)))


Mutation = Callable[[Path, Path, random.Random], None]
MUTATIONS: list[Mutation] = [flip, truncate, zero_page, zero_tail, remove, swap, exchange, grow]


# B6


def two_saves(folder: Path) -> Place:
    place = Place.new(folder)
    with Saving(place, 1) as saving:
        for step in (4, 8):
            saving.save(step)
    return place


def twenty(folder: Path, number: int) -> str:
    for mutation in range(20 * number, 20 * number + 20):
        mutate(folder / str(mutation), mutation)
    return "20 mutations, 0 silent"


def mutate(folder: Path, number: int) -> str:
    """One mutation of one file; `number` counts through both, and is the seed of the rest."""
    place = two_saves(folder)
    newest, before = checkpoint.newest_first(place.checkpoints)
    files = sorted(path.name for path in newest.iterdir())
    mutation, name = MUTATIONS[number % len(MUTATIONS)], files[number // len(MUTATIONS) % len(files)]
    content = (newest / name).read_bytes()
    mutation(newest / name, before / name, random.Random(number))
    changed = not (newest / name).exists() or (newest / name).read_bytes() != content
    what = f"{mutation.__name__} of {name}"
    assert changed, f"{what}: nothing was changed, the case proves nothing"
    assert key(place.load()) == (1, 4), f"{what}: silent"
    bad = place.quarantine / newest.name
    assert Path(name).stem in (bad / "reason.txt").read_text() or mutation is exchange, (
        f"{what}: the reason does not name it"
    )
    assert [path.name for path in place.checkpoints.iterdir()] == [before.name]
    goes_on(place, 2)
    return what
