"""Copies on a node's disk: made once for all ranks, whole or made anew, gone with the last reader, ours alone."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datasets import open_volumes
from datasets.staging import StagingError, StagingStopped, _digest, stage
from datasets.writer import VolumeWriter

ROOT = Path(__file__).resolve().parent.parent
OWN = f"hpc-data-{os.getuid()}"
HEAD = """
import os, sys, signal, logging
from datasets import open_volumes, staging
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
files, scratch = sys.argv[1:-1], sys.argv[-1]
"""


def write(path, samples=12, first=0):
    options = {"shape": (1, 4, 4, 4), "dtype": "int16", "num_samples": samples, "class_names": ["a", "b"]}
    with VolumeWriter(path, **options) as writer:
        for number in range(first, first + samples):
            volume = np.random.default_rng(number).integers(0, 900, (1, 4, 4, 4)).astype(np.int16)
            writer.add(volume, number % 2, id=f"s{number}")
    return path


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "other").mkdir()
    return [write(tmp_path / "v.h5"), write(tmp_path / "other" / "v.h5", first=12)]


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def child(code, files, scratch):
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + code, *map(str, files), str(scratch)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def left(scratch):
    return sorted(path.name for path in (scratch / OWN).iterdir())


def inodes(staged):
    return [path.stat().st_ino for path in staged.paths]


def test_a_stop_ends_a_copy_and_leaves_nothing_of_it(shards, scratch):
    volumes, asked = open_volumes(shards), []

    def second_time():
        asked.append(1)
        return len(asked) > 1

    with pytest.raises(StagingStopped):
        stage(volumes, [scratch], second_time)
    assert not list(scratch.rglob("*.h5"))
    with stage(volumes, [scratch]) as staged:
        assert open_volumes(staged.paths).verify() == []


def test_a_stop_ends_the_waiting_for_another_copier(shards, scratch):
    volumes = open_volumes(shards)
    folder = scratch / OWN
    folder.mkdir(mode=0o700)
    held = os.open(folder / f"{_digest(volumes)}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(StagingStopped):
        stage(volumes, [scratch], lambda: True)
    os.close(held)


def test_copies_hold_the_same_samples_and_are_gone_at_the_end(shards, scratch):
    volumes = open_volumes(shards)
    with stage(volumes, ["/no/such/folder", scratch]) as staged:
        assert all(path.is_relative_to(scratch / OWN) for path in staged.paths)
        copies = open_volumes(staged.paths)
        assert copies.fingerprint == volumes.fingerprint and copies.verify() == []
        assert (scratch / OWN).stat().st_mode & 0o777 == 0o700
    assert left(scratch) == []


def test_readers_share_one_copy_and_the_last_one_removes_it(shards, scratch):
    volumes = open_volumes(shards)
    first, second = stage(volumes, [scratch]), stage(volumes, [scratch])
    assert inodes(first) == inodes(second)
    first.close()
    assert open_volumes(second.paths).verify() == []
    third = stage(volumes, [scratch])
    second.close()
    assert inodes(third)
    third.close()
    third.close()
    assert left(scratch) == []


def test_ranks_that_begin_at_once_copy_once(shards, scratch):
    code = """
volumes = open_volumes(files)
with staging.stage(volumes, [scratch]) as staged:
    assert open_volumes(staged.paths).verify() == []
    print("ready", flush=True)
    sys.stdin.read()
"""
    gate, hold = os.pipe()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", HEAD + code, *map(str, shards), str(scratch)],
            stdin=gate,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(3)
    ]
    os.close(gate)
    said = []
    for rank in ranks:
        for line in rank.stdout:
            said.append(line)
            if line == "ready\n":
                break
    os.close(hold)
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert sum(line.startswith("copying") for line in said) == 1
    assert left(scratch) == []


KILLED_AT = {
    "before the marker": "staging._write_marker = lambda *given: os.kill(os.getpid(), signal.SIGKILL)",
    "between two files": """
whole = staging._copy_file
staging._copy_file = lambda *given: (whole(*given), os.kill(os.getpid(), signal.SIGKILL))""",
}


@pytest.mark.parametrize("place", KILLED_AT)
def test_what_a_kill_leaves_of_a_copy_is_never_taken_for_whole(place, shards, scratch):
    dead = child(f"{KILLED_AT[place]}\nstaging.stage(open_volumes(files), [scratch])", shards, scratch)
    assert dead.wait() == -signal.SIGKILL
    assert any(path.is_file() for path in (scratch / OWN).glob("*/*"))
    with stage(open_volumes(shards), [scratch]) as staged:
        assert open_volumes(staged.paths).verify() == []
    assert left(scratch) == []


def test_a_copy_of_a_killed_reader_serves_the_next_and_is_removed_by_another(shards, scratch, tmp_path):
    code = "staging.stage(open_volumes(files), [scratch]); os.kill(os.getpid(), signal.SIGKILL)"
    assert child(code, shards, scratch).wait() == -signal.SIGKILL
    before = {path.stat().st_ino for path in (scratch / OWN).glob("*/*.h5")}
    staged = stage(open_volumes(shards), [scratch])
    assert set(inodes(staged)) == before
    another = open_volumes(write(tmp_path / "w.h5", 3))
    with stage(another, [scratch]):
        assert len(left(scratch)) == 4  # not of a reader that lives
    staged.close()
    assert child(code, shards, scratch).wait() == -signal.SIGKILL
    with stage(another, [scratch]):
        assert len(left(scratch)) == 2
    assert left(scratch) == []


def test_a_copy_cut_short_is_made_anew(shards, scratch):
    code = "staging.stage(open_volumes(files), [scratch]); os.kill(os.getpid(), signal.SIGKILL)"
    assert child(code, shards, scratch).wait() == -signal.SIGKILL
    os.truncate(next((scratch / OWN).glob("*/1-v.h5")), 1000)
    with stage(open_volumes(shards), [scratch]) as staged:
        assert open_volumes(staged.paths).verify() == []


def test_changed_data_are_another_copy(shards, scratch):
    with stage(open_volumes(shards), [scratch]) as first:
        os.utime(shards[0], ns=(1, 1))
        with stage(open_volumes(shards), [scratch]) as second:
            assert set(first.paths).isdisjoint(second.paths)


def test_a_source_exchanged_since_it_was_opened_is_refused(shards, scratch):
    volumes = open_volumes(shards)
    os.utime(shards[1], ns=(1, 1))
    with pytest.raises(StagingError, match=r"v\.h5 was exchanged since it was opened"):
        stage(volumes, [scratch])
    assert not list((scratch / OWN).glob("*/*"))


def test_too_little_room_is_told_before_anything_is_copied(tmp_path, scratch):
    path = write(tmp_path / "v.h5")
    os.truncate(path, 1 << 43)
    with pytest.raises(StagingError, match=r"has .* GB free, but .*v\.h5 needs 8.8e\+03 GB; leave stage out"):
        stage(open_volumes(path), [scratch])


def test_no_folder_at_all_is_told(shards):
    with pytest.raises(StagingError, match=r"no folder to copy to among /no/such, /nor/such"):
        stage(open_volumes(shards), ["/no/such", "/nor/such"])


@pytest.mark.parametrize("planted", ["link", "open to others", "file"])
def test_what_others_planted_is_refused(planted, shards, scratch, tmp_path):
    place = scratch / OWN
    if planted == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    elif planted == "file":
        place.touch(mode=0o600)
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.raises(StagingError, match="is not a folder of yours alone"):
        stage(open_volumes(shards), [scratch])
