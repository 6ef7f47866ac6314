"""hpc sync between two folders: what is delivered, in which order, under which name, and what an odd source brings."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.errors import UserError
from hpc.logs import agent, positions
from hpc.logs.deliver import DestinationFailed, Listed
from hpc.logs.ends import End, LocalEnd, Place
from hpc.logs.records import frame
from hpc.logs.sync import Busy, Carried, Round, Session
from hpc.rundir import ROWS, RunDir, all_runs
from tests.syncing import (
    FIRST,
    NEEDS_SETPRIV,
    ROOT,
    SECOND,
    THIRD,
    WITHOUT_RIGHTS,
    append,
    attempt,
    make_run,
    scalar,
    visible,
    write,
)

NAME = "tiny-1a2b3c4d"


def sync(runs: Path, home: Path, *more: str) -> Round:
    session = Session(Place("", str(runs)), Place("", str(home)), Carried(more))
    try:
        return session.round()
    finally:
        session.close()


def hpc(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpc.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_whole_records_come_and_the_tail_when_it_is_whole(runs: Path, home: Path) -> None:
    whole, last = attempt(0, 50, 1), scalar(50, 50.1)
    run = make_run(runs, first=whole + last[:20])
    first = sync(runs, home)
    assert (first.size, first.records, first.lines[0].behind, first.problems) == (len(whole), 52, 20, [])
    assert (first.lines[0].last_step, first.lines[0].records) == (49, 52)
    for cut in range(21, len(last)):
        write(run, FIRST, whole + last[:cut])
        assert sync(runs, home).size == 0
    write(run, FIRST, whole + last)
    assert sync(runs, home).size == len(last)
    assert visible(home) == visible(runs)
    inode = (home / NAME / "tb" / FIRST).stat().st_ino
    append(run.tensorboard / FIRST, scalar(51, 1.0))
    assert sync(runs, home).records == 1
    assert (home / NAME / "tb" / FIRST).stat().st_ino == inode, "appended in place"
    assert sync(runs, home).size == 0


def test_zeros_at_the_end_are_not_there_yet(runs: Path, home: Path) -> None:
    head, rest = attempt(0, 20, 1), attempt(20, 300, 1)
    run = make_run(runs, first=head + bytes(len(rest)))
    assert sync(runs, home).size == len(head)
    path = run.tensorboard / FIRST
    before = path.stat()
    path.write_bytes(head + rest)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a network file system fills it and says nothing
    assert sync(runs, home).size == len(rest)
    assert visible(home) == visible(runs)


def test_a_torn_tail_of_a_run_that_has_ended_is_left_out_and_told(runs: Path, home: Path) -> None:
    whole = attempt(0, 20, 1)
    run = make_run(runs, first=whole + scalar(20, 1.0)[:30])
    run.result.write_text("{}")
    done = sync(runs, home)
    assert any("torn, the last 30 bytes are left out" in note for note in done.notes), done.notes
    assert visible(home) == {f"{NAME}/tb/{FIRST}": whole}
    (position,) = positions.read(runs)
    assert position.complete and position.files == {f"tb/{FIRST}": len(whole)} and position.last_step == 19


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "quiet"])
@pytest.mark.parametrize("hole", [True, False], ids=["hole", "flip"])
def test_a_damaged_file_comes_up_to_the_damage_and_is_never_complete(
    runs: Path, home: Path, hole: bool, ended: bool
) -> None:
    head, tail = attempt(0, 20, 1), attempt(20, 30, 1)
    run = make_run(runs, first=head + (bytes(5000) if hole else scalar(20, 1.0)[:-1] + b"x") + tail)
    if ended:
        run.result.write_text("{}")
    for _ in range(2):
        done = hpc("sync", str(runs), str(home))
        where = f"{NAME}/tb/{FIRST}: {'zeros' if hole else 'flipped'}, damaged at byte {len(head)} of"
        assert done.returncode == 1 and where in done.stderr and done.stderr.strip().endswith(f"hpc fsck {NAME}"), done
        assert f"1 damaged: hpc fsck {NAME}" in done.stdout
        assert visible(home) == {f"{NAME}/tb/{FIRST}": head} and not positions.read(runs)[0].complete
    write(run, FIRST, head + tail)  # repaired
    assert sync(runs, home).problems == [] and visible(home) == visible(runs)


def test_a_newer_file_waits_for_an_older_one_that_is_not_whole(runs: Path, home: Path) -> None:
    older, newer = attempt(0, 20, 1), attempt(15, 30, 2)
    run = make_run(runs, second=newer)
    path = write(run, FIRST, older[:-7], old=False)
    done = sync(runs, home)
    assert list(visible(home)) == [f"{NAME}/tb/{FIRST}"] and any("waits for" in note for note in done.notes)
    append(path, older[-7:], old=False)
    sync(runs, home)
    assert visible(home) == visible(runs)


def test_a_torn_older_file_does_not_hold_the_newer_one_for_ever(runs: Path, home: Path) -> None:
    make_run(runs, first=attempt(0, 20, 1)[:-7], second=attempt(15, 30, 2))
    sync(runs, home)
    assert len(visible(home)) == 2


@pytest.mark.parametrize("known", [True, False], ids=["its tail", "all of it"])
def test_what_comes_late_for_an_older_file_makes_the_newer_ones_come_again(runs: Path, home: Path, known: bool) -> None:
    older, newer = attempt(0, 20, 1), attempt(15, 30, 2)
    run = make_run(runs, second=newer)
    if known:
        write(run, FIRST, attempt(0, 10, 1))
    sync(runs, home)
    path = write(run, FIRST, older, old=False)
    assert "has grown late" in " ".join(sync(runs, home).notes), "it may still grow"
    write(run, FIRST, older)
    done = sync(runs, home)
    assert done.size == len(older) - (len(attempt(0, 10, 1)) if known else 0), "the newer file is not sent again"
    assert visible(home) == {f"{NAME}/tb/{FIRST}": older, f"{NAME}/tb/{SECOND}.r001": newer}
    append(run.tensorboard / SECOND, scalar(30, 1.0))
    sync(runs, home)
    assert visible(home)[f"{NAME}/tb/{SECOND}.r001"] == newer + scalar(30, 1.0)
    assert sync(runs, home).size == 0 and path.exists()


def test_a_replaced_file_comes_under_a_new_name_and_the_old_one_is_kept_hidden(runs: Path, home: Path) -> None:
    run = make_run(runs, first=attempt(0, 40, 1), second=attempt(30, 50, 2))
    sync(runs, home)
    write(run, FIRST, attempt(0, 40, 7))
    assert any("written anew" in note for note in sync(runs, home).notes)
    assert visible(home) == {
        f"{NAME}/tb/{FIRST}.r001": attempt(0, 40, 7),
        f"{NAME}/tb/{SECOND}.r001": attempt(30, 50, 2),
    }
    (old,) = (home / NAME / "tb").glob(".replaced*")
    assert old.read_bytes() == attempt(0, 40, 1)
    write(run, FIRST, attempt(0, 10, 8))
    sync(runs, home)
    assert sorted(visible(home)) == [f"{NAME}/tb/{FIRST}.r002", f"{NAME}/tb/{SECOND}.r002"]
    assert sync(runs, home).size == 0


def test_a_file_that_only_shrank_is_cut_in_place(runs: Path, home: Path) -> None:
    run = make_run(runs, first=attempt(0, 40, 1), second=attempt(30, 50, 2))
    sync(runs, home)
    inode = (home / NAME / "tb" / FIRST).stat().st_ino
    write(run, FIRST, attempt(0, 30, 1))
    done = sync(runs, home)
    assert visible(home) == visible(runs) and any("was cut to" in note for note in done.notes)
    assert (home / NAME / "tb" / FIRST).stat().st_ino == inode
    assert (done.lines[0].last_step, done.lines[0].records) == (49, 32 + 22)


def test_a_change_in_the_middle_is_found_when_the_run_has_ended(runs: Path, home: Path) -> None:
    content = attempt(0, 400, 1)
    run = make_run(runs, first=content)
    sync(runs, home)
    middle, other = scalar(200, 200.1), scalar(200, 3.0)
    write(run, FIRST, content.replace(middle, other))
    run.result.write_text("{}")
    sync(runs, home)
    assert visible(home) == {f"{NAME}/tb/{FIRST}.r001": content.replace(middle, other)}
    assert not positions.read(runs)[0].complete
    sync(runs, home)
    assert positions.read(runs)[0].complete


class Interrupted(Exception):
    pass


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """`left`: so many requests and bytes of event files are served, then the process 'ends', in the middle of one."""
    budget = {"left": -1}
    answer, pwrite = LocalEnd.call, os.pwrite

    def call(self: End, op: str, payload: bytes = b"", **fields: object) -> object:
        if budget["left"] == 0:
            raise Interrupted
        budget["left"] -= budget["left"] > 0
        return answer(self, op, payload, **fields)  # type: ignore[arg-type]

    def write_some(handle: int, data: bytes, at: int) -> int:
        if 0 < budget["left"] < len(data):
            pwrite(handle, data[: budget["left"]], at)
            budget["left"] = 0
            raise Interrupted
        budget["left"] -= len(data) if budget["left"] > 0 else 0
        return pwrite(handle, data, at)

    monkeypatch.setattr(LocalEnd, "call", call)
    monkeypatch.setattr(agent.os, "pwrite", write_some)
    yield budget


def test_cut_short_at_any_request_and_byte_it_ends_equal(runs: Path, home: Path, failing: dict[str, int]) -> None:
    """The whole life of a run, each sync of which is cut short again and again."""
    life = [
        {FIRST: attempt(0, 6, 1)[:-9]},
        {FIRST: attempt(0, 6, 1), SECOND: attempt(4, 8, 2)},
        {FIRST: attempt(0, 7, 1)},
        {SECOND: attempt(4, 8, 3), THIRD: attempt(8, 9, 4)},
        {FIRST: attempt(0, 5, 1)},
        {THIRD: attempt(8, 12, 4)},
    ]
    run, rng = make_run(runs), random.Random(4)
    for files in life:
        for name, content in files.items():
            write(run, name, content)
        for _ in range(12 if os.environ.get("HPC_SOAK") != "1" else 200):
            failing["left"] = rng.randrange(1, rng.choice((12, 60, 700)))
            try:
                sync(runs, home)
            except Interrupted:
                for name, content in visible(home).items():
                    source = runs / name.split(".r0")[0]
                    assert source.exists(), name
                    assert len(content) <= max(source.stat().st_size, len(attempt(0, 9, 1)))
        failing["left"] = -1
        sync(runs, home)
        there = {name.split(".r0")[0]: content for name, content in visible(home).items()}
        whole = {name: content for name, content in visible(runs).items() if not name.endswith(FIRST)}
        assert {name: there[name] for name in whole} == whole
        assert visible(runs)[f"{NAME}/tb/{FIRST}"].startswith(there[f"{NAME}/tb/{FIRST}"])
        assert not list(home.rglob(".later*"))


def test_a_source_that_is_written_while_it_is_read(runs: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(runs, first=attempt(0, 2000, 1))
    path, rest = run.tensorboard / FIRST, attempt(2000, 2600, 1)
    monkeypatch.setattr("hpc.logs.deliver.BLOCK", 5000)
    answer = agent.Store.do_read

    def read(self: agent.Store, request: agent.Fields, payload: bytes) -> agent.Answer:
        nonlocal rest
        append(path, rest[:3737], old=False)
        rest = rest[3737:]
        return answer(self, request, payload)

    monkeypatch.setattr(agent.Store, "do_read", read)
    while rest:
        sync(runs, home)
        assert path.read_bytes().startswith(visible(home)[f"{NAME}/tb/{FIRST}"])
    sync(runs, home)
    assert visible(home) == visible(runs)


def test_what_a_power_cut_left_behind_the_cursor_is_not_believed(runs: Path, home: Path) -> None:
    run = make_run(runs, first=attempt(0, 5, 1))
    sync(runs, home)
    there = home / NAME / "tb" / FIRST
    for rubbish in (bytes(700), scalar(5, 9.0), scalar(5, 5.1)[:-1]):
        append(there, rubbish)
        append(run.tensorboard / FIRST, scalar(5, 5.1))
        sync(runs, home)
        assert visible(home) == visible(runs)
    append(there, bytes(50))
    there.write_bytes(there.read_bytes()[:30])
    append(run.tensorboard / FIRST, scalar(6, 6.1))
    sync(runs, home)
    assert visible(home) == visible(runs), "somebody has cut it"


def test_records_larger_than_a_block(runs: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc.logs.deliver.BLOCK", 1000)
    content = b"".join(frame(os.urandom(size)) for size in (10, 5000, 990, 1, 20_000))
    make_run(runs, first=content)
    assert sync(runs, home).records == 5
    assert visible(home) == visible(runs)


def test_the_other_files_of_runs_and_sweeps(runs: Path, home: Path) -> None:
    run = make_run(runs, "a b ü-1a2b3c4d", first=attempt(0, 3, 1))
    sweep = runs / "s-sweep-1"
    row = make_run(sweep, "row 'x' 世界-2", first=attempt(0, 4, 1))
    (sweep / ROWS).write_text("row\n")
    for path in (
        run.metrics,
        run.state,
        run.figures / "x y.png",
        run.logs / "1_0_log.out",
        row.result,
        run.code / "m.py",
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
    (run.logs / "large.out").write_bytes(bytes(2_000_000))
    run.lease.touch()
    (run.logs / "link").symlink_to("/etc/passwd")
    (run.checkpoints / "g001-s00000001").mkdir(parents=True)
    (run.checkpoints / "g001-s00000001" / "weights").write_bytes(b"w")
    (runs / "notes.txt").write_text("not a run")
    session = Session(Place("", str(runs)), Place("", str(home)), Carried(most=1_000_000))
    done = session.round()
    session.close()
    assert done.problems == [] and visible(home) == visible(runs)
    there = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    assert {f"{run.name}/figures/x y.png", f"{run.name}/metrics.jsonl", "s-sweep-1/rows.txt"} <= there
    assert {f"s-sweep-1/{row.name}/result.json", f"{run.name}/logs/1_0_log.out"} <= there
    assert not [n for n in there if any(w in n for w in ("code", "checkpoints", "large", "link", "lease", "notes"))]
    assert sync(runs, home, "code", "checkpoints").others >= 2
    assert (home / run.name / "checkpoints/g001-s00000001/weights").read_bytes() == b"w"
    run.metrics.write_text("{}\n{}\n")
    assert sync(runs, home, "code", "checkpoints").others == 1
    assert [one.name for one in all_runs(home)][:1] == [run.name]
    assert sync(runs, home).problems == []


def test_another_run_of_the_same_name_is_not_overwritten(runs: Path, home: Path, tmp_path: Path) -> None:
    make_run(runs, first=attempt(0, 30, 1))
    sync(runs, home)
    make_run(tmp_path / "other", first=attempt(0, 30, 2))
    done = sync(tmp_path / "other", home)
    assert "another run of this name" in done.problems[0]
    assert visible(home) == visible(runs)
    shutil.copytree(runs, tmp_path / "moved")
    append(tmp_path / "moved" / NAME / "tb" / FIRST, scalar(30, 1.0))
    done = sync(tmp_path / "moved", home)
    assert (done.problems, done.records) == ([], 1), "the same run from elsewhere goes on"


def submitted(run: RunDir, job: int) -> RunDir:
    run.event("submit", "login", cluster="slurm", job=str(job))
    return run


@pytest.mark.parametrize("told", [True, False], ids=["by its events", "by its files"])
def test_another_run_whose_event_files_have_other_names_is_not_mixed_in(
    runs: Path, home: Path, tmp_path: Path, told: bool
) -> None:
    run = make_run(runs, first=attempt(0, 30, 1))
    other = make_run(tmp_path / "other", second=attempt(0, 30, 2))
    for number, one in enumerate((run, other) if told else ()):
        submitted(one, number)
    other.metrics.write_text("{}\n")
    sync(runs, home)
    for _ in range(2):
        done = sync(tmp_path / "other", home)
        assert "another run of this name" in done.problems[0] and "remove it there" in done.problems[0]
    assert visible(home) == visible(runs) and not (home / NAME / "metrics.jsonl").exists()
    assert not positions.read(tmp_path / "other")
    shutil.copytree(runs, tmp_path / "moved")
    moved = RunDir(tmp_path / "moved" / NAME)
    write(moved, THIRD, attempt(30, 32, 3))
    if told:
        submitted(moved, 7)
        (moved.tensorboard / FIRST).unlink()
    assert sync(tmp_path / "moved", home).problems == [], "the same run from elsewhere goes on"
    assert sorted(visible(home)) == [f"{NAME}/tb/{FIRST}", f"{NAME}/tb/{THIRD}"]
    shutil.rmtree(home / NAME)
    assert sync(tmp_path / "other", home).problems == [] and (home / NAME / "metrics.jsonl").exists()
    shutil.rmtree(home / NAME)
    assert sync(tmp_path / "other", home).others == 2 + told, "a run that was removed there comes again as a whole"
    assert visible(home) == visible(tmp_path / "other")


def test_a_run_that_was_removed_and_submitted_anew_is_another(runs: Path, home: Path) -> None:
    run = submitted(make_run(runs, first=attempt(0, 30, 1)), 1)
    session = Session(Place("", str(runs)), Place("", str(home)), Carried())
    session.round()
    before = visible(runs)
    shutil.rmtree(run.path)
    submitted(make_run(runs, second=attempt(0, 9, 2)), 2)
    assert "another run of this name" in session.round().problems[0] and visible(home) == before
    session.close()


def test_a_sweep_of_which_a_row_is_another_stays_behind(runs: Path, home: Path, tmp_path: Path) -> None:
    for number, folder in enumerate((runs, tmp_path / "other")):
        sweep = folder / "s-sweep-1"
        submitted(make_run(sweep, "row-1", first=attempt(0, 3, number)), number)
        make_run(sweep, "row-2")
        (sweep / ROWS).write_text(f"row-1\nrow-2\n{'row-3' * number}")
    sync(runs, home)
    done = sync(tmp_path / "other", home)
    assert len(done.problems) == 1 and "s-sweep-1/row-1: the destination has another" in done.problems[0]
    assert (home / "s-sweep-1" / ROWS).read_text() == "row-1\nrow-2\n" and visible(home) == visible(runs)
    assert sync(runs, home).problems == []


def test_a_source_cannot_name_what_lies_outside() -> None:
    told = {"run": "a", "sweep": False, "events": [], "others": [], "big": [], "ended": False, "phase": ""}
    for wrong in (
        {"run": "../a"},
        {"others": [["../../.ssh/authorized_keys", 1, 1]]},
        {"events": [["/tb/x", 1, 1, 1]]},
    ):
        with pytest.raises(UserError, match="no path inside"):
            Listed.of({**told, **wrong})


def test_a_run_is_no_folder_of_runs(runs: Path, home: Path) -> None:
    run = make_run(runs, first=attempt(0, 3, 1))
    with pytest.raises(UserError, match="name the folder of runs"):
        sync(run.path, home)


def test_a_run_that_is_a_link_is_told(runs: Path, home: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "elsewhere", first=attempt(0, 3, 1))
    runs.mkdir()
    (runs / NAME).symlink_to(run.path)
    assert "is a link" in sync(runs, home).notes[0] and visible(home) == {}


def test_hidden_files_of_copying_tools_are_not_event_files(runs: Path, home: Path) -> None:
    run = make_run(runs, first=attempt(0, 3, 1))
    inner = run.tensorboard / "sub run"
    inner.mkdir()
    for folder in (run.tensorboard, inner):
        (folder / f".{SECOND}.Ab12Cd").write_bytes(b"half")
    (inner / SECOND).write_bytes(attempt(0, 3, 2))
    sync(runs, home)
    assert sorted(visible(home)) == [f"{NAME}/tb/{FIRST}", f"{NAME}/tb/sub run/{SECOND}"]


def test_two_at_once_and_the_second_leaves(runs: Path, home: Path) -> None:
    make_run(runs, first=attempt(0, 3, 1))
    session = Session(Place("", str(runs)), Place("", str(home)), Carried())
    with pytest.raises(Busy, match=f"process {os.getpid()}"):
        sync(runs, home)
    quiet = hpc("sync", str(runs), str(home), "--from-cron")
    assert (quiet.returncode, quiet.stdout + quiet.stderr) == (0, "")
    session.close()
    quiet = hpc("sync", str(runs), str(home), "--from-cron")
    assert (quiet.returncode, quiet.stdout + quiet.stderr) == (0, "")
    assert visible(home) == visible(runs)


@NEEDS_SETPRIV
def test_a_file_without_permission_is_named_and_the_others_come(runs: Path, home: Path) -> None:
    run = make_run(runs, first=attempt(0, 3, 1), second=attempt(3, 5, 2))
    other = make_run(runs, "other-2", first=attempt(0, 3, 1))
    run.metrics.write_text("{}")
    other.metrics.write_text("{}")
    for path in (run.tensorboard / FIRST, run.metrics):
        path.chmod(0)
    command = [*WITHOUT_RIGHTS, sys.executable, "-m", "hpc.cli", "sync", str(runs), str(home)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1, done
    assert f"{NAME}/tb/{FIRST}: Permission denied" in done.stderr and f"{NAME}/metrics.jsonl: Permission" in done.stderr
    assert set(visible(home)) == {f"{NAME}/tb/{SECOND}", f"other-2/tb/{FIRST}"}
    assert (home / "other-2/metrics.jsonl").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small disk")
def test_a_full_destination(runs: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        run = make_run(runs, first=attempt(0, 9000, 1))
        with pytest.raises(DestinationFailed, match="No space left on device"):
            sync(runs, disk / "home")
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        sync(runs, disk / "home")
        assert visible(disk / "home") == visible(runs) and run.path.exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_time_is_up(runs: Path, home: Path) -> None:
    make_run(runs, first=attempt(0, 3, 1))
    done = hpc("sync", str(runs), str(home), "--watch", "--every", "1s", "--at-most", "2s")
    assert done.returncode == 1 and "stopped after 2 s" in done.stderr
    assert visible(home) == visible(runs)
    assert "5 records" in done.stdout.splitlines()[0], done.stdout
