"""Event files written by torch's SummaryWriter: framing, damage, the canonical series of a resumed run, fsck."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event as ProtoEvent
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as tensorboard_crc32c
from torch.utils.tensorboard import SummaryWriter

from hpc.errors import UserError
from hpc.logs import crc32c, fsck, series
from hpc.logs.event import Event, EventError, decode, last_step, scalars_of
from hpc.logs.records import Ending, RecordReader, frame, scan

FIRST, SECOND = "events.out.tfevents.1700000000.node9.7.0", "events.out.tfevents.1700000100.node10.5.0"


def write_attempt(folder: Path, name: str, start: int, stop: int, attempt: int, sparse: int | None = None) -> Path:
    """One attempt as the job writes it, under a name of our own (two real ones would fall into one second)."""
    before = set(folder.glob("*"))
    writer = SummaryWriter(str(folder), purge_step=start)
    for step in range(start, stop):
        writer.add_scalar("loss", step + attempt / 10, step, walltime=1000.0 * attempt + step)
    if sparse is not None:
        writer.add_scalar("eval/accuracy", attempt, sparse, new_style=True)
        writer.add_image("confusion", np.full((3, 4, 5), attempt, np.uint8), sparse)
    writer.close()
    (made,) = set(folder.glob("*")) - before
    return made.rename(folder / name)


@pytest.fixture
def resumed(tmp_path: Path) -> Path:
    """Steps 0-19 with an evaluation at 16, resumed at 16 until 29 with an evaluation at 25."""
    write_attempt(tmp_path, FIRST, 0, 20, 1, sparse=16)
    write_attempt(tmp_path, SECOND, 16, 30, 2, sparse=25)
    return tmp_path


def read(path: Path) -> tuple[list[bytes], RecordReader]:
    reader = RecordReader(path)
    return [record.payload for record in reader], reader


# --- checksum -------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=600), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_crc_in_pure_python_is_crc32c(seed: bytes, repeat: int) -> None:
    data = (seed + b"x") * (repeat * repeat)
    assert crc32c.crc32c_python(data) == crc32c.crc32c(data) == tensorboard_crc32c(data)


def test_known_masked_checksums() -> None:
    assert crc32c.crc32c_python(b"123456789") == 0xE3069283  # RFC 3720's check value
    assert crc32c.masked_crc32c((24).to_bytes(8, "little")) == 0x224B7FA3
    assert crc32c.masked_crc32c(bytes(8)) == 0x07980329


def test_without_google_crc32c_the_files_are_read_all_the_same(resumed: Path) -> None:
    code = (
        "import sys; sys.modules['google_crc32c'] = None\n"
        "from pathlib import Path; from hpc.logs import crc32c, fsck\n"
        "assert crc32c.crc32c is crc32c.crc32c_python\n"
        f"print([f.state.value for f in fsck.check(Path({str(resumed)!r}))])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "['complete', 'complete']", done.stderr


def test_reading_needs_neither_torch_nor_tensorboard() -> None:
    code = (
        "import sys, hpc.logs.series, hpc.logs.fsck\n"
        "print(sorted({'torch', 'numpy', 'h5py', 'tensorboard', 'google.protobuf'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


# --- framing --------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=5), st.data())
@settings(max_examples=80, deadline=None)
def test_any_cut_gives_the_whole_records_before_it(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], data: st.DataObject
) -> None:
    frames = [frame(payload) for payload in payloads]
    whole = b"".join(frames)
    ends = [0, *np.cumsum([len(one) for one in frames]).tolist()]
    cut = data.draw(st.integers(0, len(whole)))
    path = tmp_path_factory.mktemp("cut") / "f"
    path.write_bytes(whole[:cut])
    read_back, reader = read(path)
    count = sum(end <= cut for end in ends) - 1
    assert read_back == payloads[:count]
    assert (reader.valid, reader.size, reader.rest) == (ends[count], cut, cut - ends[count])
    assert reader.ending is (Ending.COMPLETE if cut in ends else Ending.TORN)


@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=4), st.data())
@settings(max_examples=80, deadline=None)
def test_no_flipped_bit_passes(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], data: st.DataObject
) -> None:
    frames = [frame(payload) for payload in payloads]
    content = bytearray(b"".join(frames))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "f"
    path.write_bytes(content)
    read_back, reader = read(path)
    bad = next(k for k in range(len(frames)) if place < sum(map(len, frames[: k + 1])))
    assert read_back == payloads[:bad]
    assert (reader.ending, reader.valid) == (Ending.FLIPPED, sum(map(len, frames[:bad])))


@given(st.lists(st.binary(min_size=1, max_size=90), max_size=6), st.data())
@settings(max_examples=80, deadline=None)
def test_the_fast_roads_see_what_the_careful_reader_sees(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], data: st.DataObject
) -> None:
    content = bytearray(b"".join(map(frame, payloads)))
    for _ in range(data.draw(st.integers(0, 2)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("fast") / "f"
    path.write_bytes(content + bytes(data.draw(st.sampled_from([0, 0, 7, 30]))))
    stop = data.draw(st.none() | st.integers(0, len(content)))
    careful = RecordReader(path, 0, stop)
    expected = [record.payload for record in careful]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpc.logs.records._BUFFER", data.draw(st.integers(2, 200)))
        fast = RecordReader(path, 0, stop)
        assert [payload for found in fast.payloads() for payload in found] == expected
        told = scan(path, 0, stop)
    assert (fast.valid, fast.records, fast.ending, fast.size) == (told.valid, told.records, told.ending, told.size)
    assert (told.valid, told.records, told.ending, told.size) == (
        careful.valid, careful.records, careful.ending, careful.size
    )  # fmt: skip


def test_scalars_are_decoded_as_protobuf_does() -> None:
    payloads = []
    for step in (0, 1, 127, 128, 16_383, 16_384, 2**21, 2**40, -1):
        for tags in ([], ["loss"], ["a", "b/c", "ü" * 50], ["x" * 121], ["y" * 90, "z" * 90]):
            proto = ProtoEvent(wall_time=step + 0.5, step=step)
            for number, tag in enumerate(tags):
                proto.summary.value.add(tag=tag, simple_value=number + step / 4)
            payloads += [proto.SerializeToString()] * 2
    found = list(scalars_of(payloads))
    assert sum(isinstance(one, tuple) for one in found) >= 2 * 8 * 3
    for payload, one in zip(payloads, found, strict=True):
        proto = ProtoEvent.FromString(payload)
        expected = tuple((v.tag, proto.step, proto.wall_time, v.simple_value) for v in proto.summary.value)
        assert one == (expected if isinstance(one, tuple) else decode(payload))
        assert last_step(payload) == (proto.step if proto.summary.value else None)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_mangled_scalar_is_decoded_as_the_slow_road_does(data: st.DataObject) -> None:
    proto = ProtoEvent(wall_time=2.0, step=300)
    for tag in ("loss", "rate"):
        proto.summary.value.add(tag=tag, simple_value=0.5)
    good = proto.SerializeToString()
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    mangled = bytes(bad[: data.draw(st.integers(1, len(bad)))])
    try:
        slow = decode(mangled)
    except EventError:
        with pytest.raises(EventError):
            list(scalars_of([good, mangled]))
        return
    _, fast = scalars_of([good, mangled])
    if isinstance(fast, tuple):
        assert repr(fast) == repr(tuple((v.tag, slow.step, slow.wall_time, v.scalar) for v in slow.values))
    else:
        assert repr(fast) == repr(slow)


def test_every_byte_of_the_last_two_records_may_be_the_last(resumed: Path) -> None:
    path = resumed / SECOND
    content = path.read_bytes()
    ends = [record.end for record in RecordReader(path)]
    for cut in range(ends[-3], len(content)):
        path.write_bytes(content[:cut])
        _, reader = read(path)
        whole = len(ends) - 2 + (cut >= ends[-2])
        expected = Ending.COMPLETE if cut in ends else Ending.TORN
        assert (reader.records, reader.ending) == (whole, expected), cut
        path.write_bytes(content[cut:])
        assert read(path)[1].ending is not Ending.COMPLETE or cut in ends, "a reader must not find its way by chance"
    path.write_bytes(content)
    assert [record.offset for record in RecordReader(path, start=ends[4])] == ends[4:-1], "resumes at any record's end"


def test_every_byte_of_the_last_two_records_is_guarded(resumed: Path) -> None:
    path = resumed / SECOND
    content = path.read_bytes()
    ends = [record.end for record in RecordReader(path)]
    for place in range(ends[-3], len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        _, reader = read(path)
        assert (reader.ending, reader.valid) == (Ending.FLIPPED, ends[-3] if place < ends[-2] else ends[-2]), place


@pytest.mark.parametrize("count", [8, 11, 12, 16, 5000])
def test_zeros_behind_the_last_record_are_a_hole(resumed: Path, count: int) -> None:
    path = resumed / FIRST
    size = path.stat().st_size
    os.truncate(path, size + count)
    _, reader = read(path)
    assert (reader.ending, reader.valid, reader.rest) == (Ending.ZEROS, size, count)


def test_a_hole_that_begins_inside_a_record(tmp_path: Path) -> None:
    path, payload = tmp_path / "f", os.urandom(20_000)
    content = frame(b"first") + frame(payload) + frame(b"last")
    for begin, length in ((3_000, 20_000), (4_096, 4_096), (25, 40_000)):
        holed = content[:begin] + bytes(min(length, len(content) - begin)) + content[begin + length :]
        path.write_bytes(holed)
        read_back, reader = read(path)
        assert (read_back, reader.ending) == ([b"first"], Ending.ZEROS), begin


# --- events ---------------------------------------------------------------------------------------------------------


def test_decodes_what_tensorboards_own_protobuf_reads(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path), purge_step=3) as writer:
        writer.add_scalar("old", 0.1, 3)
        writer.add_scalar("new", 0.1, 4, new_style=True)
        writer.add_scalar("double", 0.1, 5, new_style=True, double_precision=True)
        writer.add_scalar("negative", -1.5, -1)
        writer.add_scalar("nan", math.nan)
        writer.add_scalar("großer Name/ü", 1e30, 2**40)
        writer.add_text("text", "no number", 6)
        writer.add_histogram("histogram", np.arange(9), 7)
        writer.add_image("image", np.zeros((3, 4, 5), np.uint8), 8)
    (path,) = series.event_files(tmp_path)
    payloads, _ = read(path)
    events = [decode(payload) for payload in payloads]
    for payload, event in zip(payloads, events, strict=True):
        proto = ProtoEvent.FromString(payload)
        assert (event.wall_time, event.step, event.file_version) == (proto.wall_time, proto.step, proto.file_version)
        assert event.start == proto.HasField("session_log")
        assert [value.tag for value in event.values] == [value.tag for value in proto.summary.value]
    found = {value.tag: value for event in events for value in event.values}
    assert found["old"].scalar == found["new"].scalar == pytest.approx(0.1, rel=1e-7)
    assert (found["double"].scalar, found["negative"].scalar) == (0.1, -1.5)
    assert math.isnan(found["nan"].scalar or 0.0)
    assert found["text/text_summary"].scalar is None and found["histogram"].scalar is None
    picture = found["image"].image
    assert picture and (picture.width, picture.height, picture.encoded[:4]) == (5, 4, b"\x89PNG")


@given(st.binary(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_an_event_or_an_event_error(payload: bytes) -> None:
    try:
        assert isinstance(decode(payload), Event)
    except EventError as error:
        assert "not an event" in str(error)


# --- series ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_one_value_per_step_and_no_orphan(resumed: Path) -> None:
    found = series.scalars(resumed)
    assert [(step, value) for step, _, value in found["loss"]] == [
        (step, pytest.approx(step + (0.1 if step < 16 else 0.2))) for step in range(30)
    ]
    assert found["loss"][15][1] == 1015.0 and found["loss"][16][1] == 2016.0  # wall times
    assert [(step, value) for step, _, value in found["eval/accuracy"]] == [(25, 2.0)]
    assert [step for step, _, _ in series.images(resumed)["confusion"]] == [25]
    accumulator = EventAccumulator(str(resumed), size_guidance={"scalars": 0})
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == list(range(30))


def test_three_attempts_each_take_back_what_the_one_before_lost(tmp_path: Path) -> None:
    write_attempt(tmp_path, FIRST, 0, 10, 1)
    write_attempt(tmp_path, SECOND, 8, 9, 2, sparse=20)
    write_attempt(tmp_path, "events.out.tfevents.1700000200.a.1.0", 4, 6, 3)
    found = series.scalars(tmp_path)
    assert [(step, round(value - step, 3)) for step, _, value in found["loss"]] == [
        (0, 0.1), (1, 0.1), (2, 0.1), (3, 0.1), (4, 0.3), (5, 0.3)
    ]  # fmt: skip
    assert "eval/accuracy" not in found and series.images(tmp_path) == {}


def test_files_come_in_the_order_of_their_attempts(tmp_path: Path) -> None:
    names = [FIRST, SECOND, "events.out.tfevents.1700000100.node10.5.2", "events.out.tfevents.1700000100.node10.5.10"]
    for name in [*reversed(names), ".events.out.tfevents.1700000001.rsync.Ab12Cd", "notes.txt"]:
        (tmp_path / name).touch()
    (tmp_path / "tfevents.folder").mkdir()
    assert [path.name for path in series.event_files(tmp_path)] == names


def test_a_damaged_file_gives_its_beginning_and_says_so(resumed: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = resumed / SECOND
    content = bytearray(path.read_bytes())
    with path.open("ab") as file:
        file.write(content[:20])
    assert len(series.scalars(resumed)["loss"]) == 30
    assert not caplog.records, "a torn tail is a run that is still writing"
    record = list(RecordReader(path))[6]
    content[record.offset + 14] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        steps = [step for step, _, _ in series.scalars(resumed)["loss"]]
    assert steps == list(range(19))
    assert f"flipped at byte {record.offset}" in caplog.text


def test_an_empty_folder_and_a_missing_one(tmp_path: Path) -> None:
    assert series.scalars(tmp_path) == {} and fsck.check(tmp_path) == []
    for function in (series.scalars, series.images, fsck.check):
        with pytest.raises(UserError, match=r"nowhere: no such folder.*hpc ls"):
            function(tmp_path / "nowhere")


# --- fsck -----------------------------------------------------------------------------------------------------------


def test_fsck_of_sound_files(resumed: Path) -> None:
    findings = fsck.check(resumed)
    assert [(one.file, one.records, one.last_step) for one in findings] == [(FIRST, 25, 19), (SECOND, 19, 29)]
    assert [one.size for one in findings] == [(resumed / name).stat().st_size for name in (FIRST, SECOND)]
    assert all(one.valid == one.size and not one.damaged for one in findings)
    assert fsck.exit_code(findings) == 0 and fsck.exit_code([]) == 0
    assert [len(row) for row in fsck.rows(findings)] == [len(fsck.TITLES)] * 2


def test_fsck_names_each_kind_of_damage(resumed: Path) -> None:
    sound = (resumed / FIRST).read_bytes()
    ends = [record.end for record in RecordReader(resumed / FIRST)]
    inner = resumed / "loss_train"
    inner.mkdir()
    damage = {
        "1.torn": sound[:-5],
        "2.zeros": sound + bytes(100),
        "3.flipped": sound[: ends[9] + 2] + b"\xff" + sound[ends[9] + 3 :],
        "4.foreign": sound + frame(b"\x07no event"),
        "5.empty": b"",
    }
    for suffix, content in damage.items():
        (inner / f"events.out.tfevents.170000000{suffix}").write_bytes(content)
    findings = {one.file.rpartition(".")[2]: one for one in fsck.check(resumed)}
    assert {kind: findings[kind].state.value for kind in ("torn", "zeros", "flipped", "foreign")} == {
        "torn": "torn", "zeros": "zeros", "flipped": "flipped header", "foreign": "foreign"
    }  # fmt: skip
    assert (findings["empty"].state, findings["empty"].last_step) == (fsck.State.COMPLETE, None)
    assert (findings["torn"].records, findings["torn"].valid) == (24, ends[-2])
    assert (
        f"byte {ends[9]}: a header with flipped bytes" in findings["flipped"].sentence
        and findings["flipped"].valid == ends[9]
    )
    assert findings["foreign"].valid == len(sound) and findings["foreign"].records == 25
    assert f"{len(sound) - 5 - ends[-2]} bytes lost after step" in findings["torn"].sentence
    assert fsck.exit_code([findings["torn"]]) == 1 and fsck.exit_code(findings.values()) == 1
    assert findings["torn"].file.startswith("loss_train/")
