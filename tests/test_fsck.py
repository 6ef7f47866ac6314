"""Damage to event files, by kind and by chance: what is salvaged, and the repair of a run's files."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event as ProtoEvent
from typer.testing import CliRunner

from hpc import ledger
from hpc.attempt import begin, record_submission
from hpc.cli import app
from hpc.errors import UserError
from hpc.logs import fsck, repair, series
from hpc.logs.records import HEADER, RecordReader, frame
from hpc.logs.salvage import Fault, _Walk, survey
from hpc.rundir import RunDir
from tests.test_logs import FIRST, SECOND

ROUNDS = 2000 if os.environ.get("HPC_SOAK") else 150


def events(count: int, first: int = 0, extra: int = 0) -> list[bytes]:
    """Payloads of `count` scalars; every seventh has a text of `extra` bytes beside it."""
    made = []
    for step in range(first, first + count):
        proto = ProtoEvent(wall_time=1e9 + step, step=step)
        proto.summary.value.add(tag="loss", simple_value=step / 2)
        if extra and step % 7 == 3:
            proto.summary.value.add(tag="text").tensor.string_val.append(random.Random(step).randbytes(extra))
        made.append(proto.SerializeToString())
    return made


def salvaged(path: Path) -> list[bytes]:
    content = path.read_bytes()
    whole = b"".join(content[begin:end] for begin, end in survey(path).kept)
    copy = path.with_name("salvaged")
    copy.write_bytes(whole)
    reader = RecordReader(copy)
    payloads = [record.payload for record in reader]
    assert reader.valid == len(whole), "only whole records are kept"
    return payloads


@pytest.mark.parametrize(
    ("damage", "fault", "kept"),
    [
        (lambda f: [*f[:9], f[9][:20]], Fault.TORN, 9),
        (lambda f: [*f[:4], bytes(len(f[4])), *f[5:]], Fault.ZEROS, 9),
        (lambda f: [*f[:4], f[4][:20] + b"\xff" + f[4][21:], *f[5:]], Fault.PAYLOAD, 9),
        (lambda f: [*f[:4], b"\xff" + f[4][1:], *f[5:]], Fault.HEADER, 9),
        (lambda f: [*f, *f[6:]], Fault.DUPLICATE, 10),
        (lambda f: [*f[:4], frame(b"\x07no event"), *f[4:]], Fault.FOREIGN, 10),
        (lambda f: [*f[:4], f[4][:20], *f[5:]], None, 9),
        (lambda f: [*f[:2], f[2][:30], bytes(5000), f[7][9:], *f[8:]], None, 4),
    ],
)
def test_each_kind_of_damage_costs_what_it_hit(tmp_path: Path, damage, fault: Fault | None, kept: int) -> None:  # type: ignore[no-untyped-def]
    payloads = events(10)
    path = tmp_path / FIRST
    path.write_bytes(b"".join(damage([frame(payload) for payload in payloads])))
    found = survey(path)
    (one,) = found.damages
    assert fault is None or one.fault is fault
    back = salvaged(path)
    assert len(back) == found.records == kept and set(back) <= set(payloads)
    if fault in (Fault.ZEROS, Fault.PAYLOAD, Fault.HEADER):
        assert (one.after_step, one.before_step, found.first) == (3, 5, 4)


def test_a_record_inside_a_flipped_payload_is_no_record(tmp_path: Path) -> None:
    inner = ProtoEvent(wall_time=1.0, step=999)
    outer = ProtoEvent(wall_time=2.0, step=1)
    outer.summary.value.add(tag="t").tensor.string_val.append(frame(inner.SerializeToString() + bytes(10)))
    frames = [frame(payload) for payload in [*events(3), outer.SerializeToString(), *events(3, 5)]]
    frames[3] = frames[3][: HEADER + 2] + b"\x55" + frames[3][HEADER + 3 :]
    path = tmp_path / FIRST
    path.write_bytes(b"".join(frames))
    assert salvaged(path) == [*events(3), *events(3, 5)]


def _harm(content: bytearray, chance: random.Random, ends: list[int]) -> set[int]:
    """One damage; the numbers of the records that it hit."""
    begin = chance.randrange(len(content))
    length = chance.choice([1, 3, 40, 700])
    end = min(begin + length, len(content))
    if chance.random() < 0.5:
        content[begin:end] = bytes(end - begin)
    else:
        content[begin] ^= 1 << chance.randrange(8)
        end = begin + 1
    return {k for k in range(len(ends) - 1) if ends[k] < end and begin < ends[k + 1]}


def test_chance_damage_loses_what_it_hit_alone_and_invents_nothing(tmp_path: Path) -> None:
    chance = random.Random(8)
    payloads = events(40, extra=900)
    frames = [frame(payload) for payload in payloads]
    ends = [sum(map(len, frames[:k])) for k in range(len(frames) + 1)]
    path = tmp_path / FIRST
    for round_ in range(ROUNDS):
        content, hit = bytearray(b"".join(frames)), set[int]()
        for _ in range(chance.randrange(1, 5)):
            hit |= _harm(content, chance, ends)
        cut = chance.randrange(len(content) // 2, len(content) + 1)
        path.write_bytes(content[:cut])
        back = salvaged(path)
        sure = [payload for k, payload in enumerate(payloads) if k not in hit and ends[k + 1] <= cut]
        assert [one for one in back if one in set(sure)] == sure, f"round {round_} lost a whole record"
        assert set(back) <= set(payloads), f"round {round_} invented a record"


def test_the_fast_road_finds_what_the_careful_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some records, so that both roads meet damage, repetition, pictures' late steps and other events."""
    chance = random.Random(5)
    monkeypatch.setattr("hpc.logs.records._BUFFER", 2000)
    taken = []
    fast = _Walk._take_all
    for _ in range(ROUNDS):
        payloads = events(120, first=chance.choice([0, 100, 20_000, 1 << 40]), extra=chance.choice([0, 50]))
        for _ in range(chance.randrange(4)):
            begin = chance.randrange(len(payloads))
            other = chance.choice(
                [events(1), payloads[: chance.randrange(60)], [b"\x09other"], payloads[begin : begin + 9]]
            )
            payloads[begin:begin] = other
        content = bytearray(b"".join(map(frame, payloads)))
        if chance.random() < 0.5:
            content[chance.randrange(len(content))] ^= 8
        path = tmp_path / FIRST
        path.write_bytes(content)
        monkeypatch.setattr(_Walk, "_take_all", lambda *of: taken.append(fast(*of)) or taken[-1])
        found = survey(path)
        monkeypatch.setattr(_Walk, "_take_all", lambda *_: False)
        assert survey(path) == found
    assert {True, False} == set(taken)


def test_random_bytes_hold_no_record(tmp_path: Path) -> None:
    path = tmp_path / FIRST
    for seed in range(20):
        path.write_bytes(random.Random(seed).randbytes(3000) + bytes(seed * 100))
        assert survey(path).records == 0


def test_a_forged_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / FIRST
    head = frame(b"x" * 16)[:8]
    forged = (1 << 40).to_bytes(8, "little")
    from hpc.logs.crc32c import masked_crc32c

    path.write_bytes(b"".join(map(frame, events(3))) + forged + masked_crc32c(forged).to_bytes(4, "little") + head)
    with path.open("ab") as file:
        file.truncate(64 << 20)  # a hole
    tracemalloc.start()
    assert survey(path).records == 3
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "tiny-0123abcd")
    run.tensorboard.mkdir(parents=True)
    run.experiment.write_text("name: tiny\n")
    for name, first in ((FIRST, 0), (SECOND, 20)):
        (run.tensorboard / name).write_bytes(b"".join(map(frame, events(20, first))))
    return run


@pytest.fixture
def holder(run: RunDir) -> Iterator[subprocess.Popen[bytes]]:
    """A batch script that holds the run by its lease, and lives."""
    with subprocess.Popen(["sleep", "600"]) as shell:
        record_submission(run, "local", str(shell.pid))
        begin(run, shell.pid)
        yield shell
        shell.kill()


def test_a_repair_keeps_the_name_moves_the_original_and_is_done_once(run: RunDir) -> None:
    path = run.tensorboard / FIRST
    content = bytearray(path.read_bytes())
    content[300] ^= 4
    path.write_bytes(content)
    ((before, kept),) = repair.repair(run)
    assert kept.read_bytes() == content and "tfevents" not in kept.name
    assert before.salvaged == 19 and "lost between steps" in before.sentence
    assert not any(one.damaged for one in fsck.check(run.tensorboard))
    assert [one.name for one in series.event_files(run.tensorboard)] == [FIRST, SECOND]
    assert repair.repair(run) == []
    reader = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    reader.Reload()
    assert len(reader.Scalars("loss")) == 39
    assert sorted(one.name for one in run.damaged_events.iterdir()) == [kept.name]


def test_what_holds_no_record_moves_away_and_a_link_stays(run: RunDir, tmp_path: Path) -> None:
    noise, link = run.tensorboard / f"{FIRST}.v2", run.tensorboard / f"{SECOND}.v2"
    noise.write_bytes(secrets.token_bytes(5000))
    (elsewhere := tmp_path / "elsewhere").write_bytes(frame(events(1)[0]) + b"torn")
    link.symlink_to(elsewhere)
    told = CliRunner().invoke(app, ["fsck", run.name, "--runs", str(run.runs), "--repair"])
    assert told.exit_code == 1 and "a link, left as it is" in told.stderr
    assert sorted(path.name for path in run.tensorboard.iterdir()) == [FIRST, SECOND, link.name]
    assert [one.stat().st_size for one in run.damaged_events.iterdir()] == [5000]
    assert link.is_symlink() and elsewhere.read_bytes().endswith(b"torn")


def test_a_live_run_is_not_repaired_and_its_torn_tail_is_no_damage(
    run: RunDir, holder: subprocess.Popen[bytes]
) -> None:
    path = run.tensorboard / SECOND
    path.write_bytes(torn := path.read_bytes()[:-3])
    told = CliRunner().invoke(app, ["fsck", run.name, "--runs", str(run.runs), "--json"])
    assert told.exit_code == 0 and not any(one["damaged"] for one in json.loads(told.stdout)["files"])
    with pytest.raises(UserError, match=r"is running.*hpc cancel"):
        repair.repair(run)
    assert path.read_bytes() == torn and not run.damaged_events.exists()
    holder.kill()
    holder.wait()
    assert fsck.exit_code(fsck.check(run.tensorboard, ledger.status(run).live)) == 1
    assert [before.salvaged for before, _ in repair.repair(run)] == [19]


REPAIRS = """
import sys
from hpc.logs.repair import repair
from hpc.rundir import RunDir
print("ready", flush=True)
repair(RunDir(sys.argv[1]))
"""


def test_a_repair_killed_at_any_moment_loses_nothing_and_a_second_one_ends_it(run: RunDir) -> None:
    chance, names = random.Random(3), (FIRST, SECOND)
    whole = [payload for first in (0, 4000) for payload in events(4000, first)]
    taken, halves = 0.0, 0
    for round_ in range(11):
        shutil.rmtree(run.quarantine, ignore_errors=True)
        damaged = {}
        for name, first in zip(names, (0, 4000), strict=True):
            content = bytearray(b"".join(map(frame, events(4000, first))))
            content[len(content) // 2] ^= 4
            damaged[name] = bytes(content)
            (run.tensorboard / name).write_bytes(content)
        command = [sys.executable, "-c", REPAIRS, str(run.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout and child.stdout.readline() == b"ready\n"
            began = time.monotonic()
            if round_:
                time.sleep(chance.random() * taken)
                child.kill()
            child.wait()
        taken = taken or time.monotonic() - began  # the first is left alone
        for name in names:  # the original is in its place, or kept whole beside
            places = [run.tensorboard / name, run.damaged_events / name.replace("tfevents", "events")]
            assert damaged[name] in [path.read_bytes() for path in places if path.exists()]
        halves += len(repair.repair(run)) > 0
        assert not any(one.damaged for one in fsck.check(run.tensorboard))
        kept = [record.payload for name in names for record in RecordReader(run.tensorboard / name)]
        assert len(kept) == len(whole) - 2 and set(kept) < set(whole)
        originals = {path.read_bytes() for path in run.damaged_events.iterdir()}
        assert originals == set(damaged.values())
        assert sorted(path.name for path in run.tensorboard.iterdir()) == sorted(names)
    assert halves > 0, "no kill came in time"
