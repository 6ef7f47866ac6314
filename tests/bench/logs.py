"""How fast event files are read, beside bare loops: `python -m tests.bench.logs [--only ROW]` (`make bench-logs`).

A million scalar points, four tags, written as torch's SummaryWriter frames them (one scalar per event) in a warm file.
A bare loop over frames is struct and google_crc32c on a buffered file, nothing kept; a bare parse is the bare loop and
TensorBoard's own protobuf (`Event.FromString`), reading tag, step, time and value. CPU seconds, the better of two.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event

from hpc.logs.fsck import check_file
from hpc.logs.records import RecordReader, frame, scan
from hpc.logs.series import read_points, scalars

POINTS, TAGS = 1_000_000, ("loss/train", "lr", "grad/norm", "images_per_s")


def write(path: Path, points: int) -> None:
    with path.open("wb") as file:
        for step in range(points // len(TAGS)):
            for tag in TAGS:
                event = Event(wall_time=1e9 + step, step=step)
                event.summary.value.add(tag=tag, simple_value=step / 2)
                file.write(frame(event.SerializeToString()))


def bare(path: Path, take: Callable[[bytes], object] | None = None) -> int:
    """The loop that everybody writes: verified frames, each payload handed to `take`."""
    count, crc = 0, google_crc32c.value
    with path.open("rb") as file:
        while header := file.read(12):
            length, stored = struct.unpack("<QI", header)
            assert _masked(crc(header[:8])) == stored
            payload = file.read(length)
            assert _masked(crc(payload)) == struct.unpack("<I", file.read(4))[0]
            if take:
                take(payload)
            count += 1
    return count


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def bare_parse(path: Path) -> list[tuple[str, int, float, float]]:
    found: list[tuple[str, int, float, float]] = []

    def take(payload: bytes) -> None:
        event = Event.FromString(payload)
        found.extend((value.tag, event.step, event.wall_time, value.simple_value) for value in event.summary.value)

    bare(path, take)
    return found


def fast_parse(path: Path) -> list[tuple[str, int, float, float]]:
    return [point for one in read_points(path) if isinstance(one, tuple) for point in one]


def accumulate(path: Path) -> int:
    reader = EventAccumulator(str(path.parent), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    return len(reader.Tags()["scalars"])


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds, the better of two."""
    times = []
    for _ in range(2):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def main() -> None:
    rows: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object]]] = {
        "scan": ("scan, beside a bare loop over frames", scan, bare),
        "records": ("RecordReader, beside a bare loop", lambda path: sum(1 for _ in RecordReader(path)), bare),
        "fsck": ("fsck of a file, beside a bare loop", lambda path: check_file(path, path.parent), bare),
        "decode": ("verified scalars for replay, beside a bare parse", fast_parse, bare_parse),
        "series": ("the canonical series, beside a bare parse", lambda path: scalars(path.parent), bare_parse),
        "accumulator": ("TensorBoard's EventAccumulator, beside a bare parse", accumulate, bare_parse),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=rows, metavar="ROW", help=f"one of {', '.join(rows)}")
    parser.add_argument("--points", type=int, default=POINTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.out.tfevents.1700000000.bench.1.0"
        write(path, given.points)
        print(f"{given.points} points, {path.stat().st_size / 1e6:.1f} MB; speed: bare loop's seconds / ours")
        for name in [given.only] if given.only else rows:
            title, ours, theirs = rows[name]
            mine, plain = seconds(lambda ours=ours: ours(path)), seconds(lambda theirs=theirs: theirs(path))
            print(f"{name:12} {title:55} {mine:7.2f} s, bare {plain:6.2f} s: {plain / mine:5.2f}", flush=True)


if __name__ == "__main__":
    main()
