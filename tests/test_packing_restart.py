"""A pack that is killed at any time goes on where it was, and the file is the same, byte for byte."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from datasets import open_volumes
from datasets.packing.journal import JOURNAL, Busy, Workshop
from tests.scans import noise, run, save, table, twelve, world

ROOT = Path(__file__).resolve().parent.parent
FORMS = {
    "contiguous": [],
    "compressed": ["--compress", "blosc2-lz4"],
    "chunks": ["--chunk", "4,4,4"],
    "patches": ["--patch", "4", "--per-class", "3"],
    "shards": ["--shard-size", "1500"],
}


def start(arguments, out, *more):
    command = [sys.executable, "-m", "jobs.pack", *map(str, arguments), "-o", str(out), *more]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def done(work):
    """Sources that the journal says are finished."""
    try:
        lines = (work / JOURNAL).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return set()
    return {entry["id"] for entry in map(json.loads, lines) if "id" in entry}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("o*.h5")}


@pytest.mark.parametrize("form", FORMS)
def test_kill_9_at_several_moments_and_the_file_is_the_same(tmp_path, form):
    scans, labels = twelve(tmp_path)
    arguments = [scans, "--labels", labels, "--group", "patient", *FORMS[form]]
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    assert run(*arguments, "-o", tmp_path / "calm" / "o.h5") == 0
    work = tmp_path / "killed" / ".o.h5.packing"
    for wanted in (1, 5, 11):
        process = start(arguments, tmp_path / "killed" / "o.h5", "--workers", "2")
        while len(done(work)) < wanted and process.poll() is None:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL) if wanted == 5 else process.kill()
        process.wait()
    before = done(work)
    times = {id: (work / JOURNAL).stat().st_mtime_ns for id in before}
    assert len(before) >= 1 and times
    with (work / JOURNAL).open("a") as journal:
        journal.write('{"id": "torn')  # and a torn line
    read = []
    assert run_noting(read, *arguments, "-o", tmp_path / "killed" / "o.h5") == 0
    assert set(read) == {f"s{number:02d}" for number in range(12)} - before  # finished ones are not read again
    assert files(tmp_path / "killed") == files(tmp_path / "calm")
    assert not work.exists()


def run_noting(read, *arguments):
    """With one process, so that what it reads can be noted."""
    from datasets.packing import pool

    make = pool.make_samples

    def noting(bench, writer, task):
        read.append(task.source.id)
        return make(bench, writer, task)

    pool.make_samples = noting
    try:
        return run(*arguments, "--workers", "1")
    finally:
        pool.make_samples = make


@pytest.mark.parametrize("form", [[], ["--ragged"], ["--compress", "zstd"]])
def test_masks_too_go_on_after_a_stop(tmp_path, form):
    """Bad ones are told, then left out; and a kill -9 in between."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(8):
        save(tmp_path / "images" / f"s{number}.nii.gz", noise((20, 20, 20), number))
        save(tmp_path / "masks" / f"s{number}.nii.gz", (noise((20, 20, 20), number) > 500).astype(np.uint8))
    (tmp_path / "masks" / "s5.nii.gz").write_text("hello")
    arguments = [tmp_path / "images", "--masks", tmp_path / "masks", "--classes", "nothing,something", *form]
    out, work = tmp_path / "o.h5", tmp_path / ".o.h5.packing"
    process = start(arguments, out, "--workers", "1")
    while len(done(work)) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert run(*arguments, "-o", out) == 1
    read = []
    assert run_noting(read, *arguments, "-o", out, "--skip-bad") == 0
    assert read == ["s5"]
    volumes = open_volumes(out)
    assert volumes.verify() == [] and len(volumes) == 7
    for number, id in enumerate(volumes.ids):
        wanted = noise((20, 20, 20), int(id[1:]))
        inputs, target = volumes.read(number)
        assert np.array_equal(inputs[0], wanted) and np.array_equal(target, wanted > 500)
    with h5py.File(out) as file:
        for row, id in zip(file["foreground"][()], volumes.ids, strict=True):
            there = noise((20, 20, 20), int(id[1:])).reshape(-1) > 500
            assert there[row[1]].all() and not there[row[0]].any()


def test_wide_integers_are_not_read_again_after_a_stop(tmp_path):
    scans, labels = twelve(tmp_path)
    for number in range(12):
        save(scans / f"s{number:02d}.nii.gz", noise(seed=number).astype(np.int32) * 100)
    (scans / "s03.nii.gz").write_text("hello")
    assert run(scans, "--labels", labels, "-o", tmp_path / "o.h5") == 1
    read = []
    assert run_noting(read, scans, "--labels", labels, "-o", tmp_path / "o.h5", "--skip-bad") == 0
    assert read == [] and open_volumes(tmp_path / "o.h5").dtype == np.float32


def test_voxels_beside_a_header_that_change_are_read_again(tmp_path):
    import nrrd

    (tmp_path / "d").mkdir()
    for number in range(4):
        nrrd.write(str(tmp_path / "d" / f"v{number}.nhdr"), noise(seed=number), {"encoding": "raw"})
    labels = table(tmp_path / "l.csv", [f"v{number},{number % 2}" for number in range(4)] + ["bad,0"])
    (tmp_path / "d" / "bad.nrrd").write_text("hello")
    arguments = [tmp_path / "d", "--labels", labels, "-o", tmp_path / "o.h5", "--split", "50/50/0"]
    assert run(*arguments) == 1
    (tmp_path / "d" / "v2.raw").write_bytes(noise(seed=9).T.tobytes())
    assert run(*arguments, "--skip-bad") == 0
    assert np.array_equal(open_volumes(tmp_path / "o.h5").read(2)[0][0], noise(seed=9))


def test_a_mask_whose_header_is_broken_is_a_line_and_can_be_left_out(tmp_path, capsys):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(4):
        save(tmp_path / "images" / f"s{number}.nii.gz", noise(seed=number))
        save(tmp_path / "masks" / f"s{number}.nii.gz", (noise(seed=number) > 500).astype(np.uint8))
    (tmp_path / "masks" / "s2.nii.gz").unlink()
    (tmp_path / "masks" / "s2.nhdr").write_text("NRRD0004\ntype: short\ndata file: ../out.raw\n")
    arguments = [tmp_path / "images", "--masks", tmp_path / "masks", "--classes", "nothing,something"]
    assert run(*arguments, "-o", tmp_path / "o.h5") == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "pack: bad: " in line]
    assert len(told) == 1 and "s2.nii.gz" in told[0]
    assert run(*arguments, "-o", tmp_path / "o.h5", "--skip-bad", "--split", "50/50/0") == 0
    assert tuple(open_volumes(tmp_path / "o.h5").ids) == ("s0", "s1", "s3")


def test_shards_of_two_packs_do_not_mix(tmp_path):
    scans, labels = twelve(tmp_path)
    arguments = [scans, "--labels", labels, "-o", tmp_path / "o.h5"]
    assert run(*arguments, "--shard-size", "2K") == 0
    old = sorted(tmp_path.glob("o-*.h5"))
    kept = old[0].read_bytes()
    assert run(*arguments, "--shard-size", "3K", "--seed", 7) == 0
    new = sorted(tmp_path.glob("o-*.h5"))
    assert len(old) == 4 and len(new) == 3 and open_volumes(tmp_path / "o-*.h5").verify() == []
    (tmp_path / "o-00001-of-00003.h5").write_bytes(kept)
    with pytest.raises(ValueError, match="are of two packs"):
        open_volumes(tmp_path / "o-*.h5")


def test_workers_leave_with_their_parent(tmp_path):
    scans, labels = twelve(tmp_path, (64, 64, 64))
    process = start([scans, "--labels", labels], tmp_path / "o.h5", "--workers", "2")
    while not done(tmp_path / ".o.h5.packing") and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(process.pid)


def members(group):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_what_is_done(tmp_path, number):
    scans, labels = twelve(tmp_path, (64, 64, 64))
    process = start([scans, "--labels", labels], tmp_path / "o.h5", "--workers", "2")
    while len(done(tmp_path / ".o.h5.packing")) < 2 and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert said.splitlines() == [
        f"hpc pack: {'interrupted' if number == signal.SIGINT else 'ended by SIGTERM'}; "
        "the same command goes on from here"
    ]
    assert process.returncode == 128 + number and not (tmp_path / "o.h5").exists()
    assert len(done(tmp_path / ".o.h5.packing")) >= 2


def test_a_mended_source_is_read_and_the_others_are_not(tmp_path):
    scans, labels = twelve(tmp_path)
    (scans / "s03.nii.gz").write_bytes((scans / "s03.nii.gz").read_bytes()[:300])
    assert run(scans, "--labels", labels, "-o", tmp_path / "o.h5") == 1
    save(scans / "s03.nii.gz", noise(seed=3))
    read = []
    assert run_noting(read, scans, "--labels", labels, "-o", tmp_path / "o.h5") == 0
    assert read == ["s03"]
    assert np.array_equal(open_volumes(tmp_path / "o.h5").read(3)[0][0], noise(seed=3))


def test_other_options_for_the_voxels_begin_anew_and_others_do_not(tmp_path, capsys):
    scans, labels = twelve(tmp_path)
    (scans / "s03.nii.gz").write_bytes((scans / "s03.nii.gz").read_bytes()[:300])
    arguments = [scans, "--labels", labels, "-o", tmp_path / "o.h5"]
    assert run(*arguments) == 1
    read = []
    assert run_noting(read, *arguments, "--split", "50/50/0", "--group", "patient") == 1
    assert read == ["s03"]
    read.clear()
    assert run_noting(read, *arguments, "--size", "5") == 1
    assert len(read) == 12
    assert run(*arguments, "--size", "6", "--skip-bad") == 0
    told = "an earlier start had other options for the voxels: all sources are read anew"
    shown = capsys.readouterr()
    assert told in " ".join((shown.out + shown.err).split())


@pytest.mark.parametrize("form", [[], ["--compress", "blosc2-lz4"], ["--patch", "4", "--per-class", "3"]])
def test_what_is_damaged_in_the_work_folder_is_read_again(tmp_path, capsys, form):
    scans, labels = twelve(tmp_path)
    (scans / "s03.nii.gz").write_bytes((scans / "s03.nii.gz").read_bytes()[:300])
    arguments = [scans, "--labels", labels, *form, "--workers", "1"]
    assert run(*arguments, "-o", tmp_path / "o.h5") == 1
    folder = tmp_path / ".o.h5.packing"
    lines = map(json.loads, (folder / JOURNAL).read_text().splitlines())
    entry = next(line for line in lines if line.get("id") == "s07")["samples"][0]
    with (folder / entry["file"]).open("r+b") as file:
        file.seek(entry["inputs"][0][0] + 1)
        byte = file.read(1)[0]
        file.seek(entry["inputs"][0][0] + 1)
        file.write(bytes([byte ^ 1]))
    save(scans / "s03.nii.gz", noise(seed=3))
    capsys.readouterr()
    read = []
    assert run_noting(read, *arguments, "-o", tmp_path / "o.h5") == 0
    assert sorted(read) == ["s03", "s07"]
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert "kept of 1 source(s) is damaged, they are read again: s07" in first
    assert "going on from an earlier start: 10 of 12 sources need not be read again" in second
    assert run(*arguments, "-o", tmp_path / "other.h5") == 0
    assert open_volumes(tmp_path / "o.h5").fingerprint == open_volumes(tmp_path / "other.h5").fingerprint


def test_what_was_written_after_the_last_sync_is_not_believed_after_a_power_cut(tmp_path):
    scans, labels = twelve(tmp_path)
    (scans / "s03.nii.gz").write_bytes((scans / "s03.nii.gz").read_bytes()[:300])
    arguments = [scans, "--labels", labels, "-o", tmp_path / "o.h5"]
    assert run(*arguments) == 1
    journal = tmp_path / ".o.h5.packing" / JOURNAL
    head, *lines = journal.read_text().splitlines()
    entries = [line for line in lines if '"synced"' not in line]
    other = json.dumps(json.loads(head) | {"boot": "another"})
    journal.write_text("\n".join([other, *entries[:4], '{"synced": true}', *entries[4:]]) + "\n")
    read = []
    assert run_noting(read, *arguments, "--skip-bad") == 0
    assert len(read) == 12 - 4


def test_two_packs_of_one_file_are_refused(tmp_path, capsys):
    scans, labels = twelve(tmp_path)
    with Workshop(tmp_path / "o.h5", "key") as shop:
        assert run(scans, "--labels", labels, "-o", tmp_path / "o.h5") == 2
        assert "is in use: another 'hpc pack'" in capsys.readouterr().err
        with pytest.raises(Busy):
            Workshop(tmp_path / "o.h5", "key").__enter__()
        assert shop.folder.exists()
    assert run(scans, "--labels", labels, "-o", tmp_path / "o.h5") == 0


def test_a_killed_worker_is_named(tmp_path):
    """A source whose reading kills the process, as the kernel does when memory runs out."""
    scans, labels = twelve(tmp_path)
    script = (
        "import os, signal, sys, datasets.sources.nifti as n; read = n.read_volume\n"
        "def fatal(files):\n"
        "    if files[0].name == 's07.nii.gz': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(files)\n"
        "n.read_volume = fatal\n"
        "from jobs.pack import main\n"
        "if __name__ == '__main__': sys.exit(main())\n"
    )
    program = tmp_path / "fatal.py"
    program.write_text(script)
    command = [sys.executable, str(program), str(scans), "--labels", str(labels), "-o", str(tmp_path / "o.h5")]
    done_ = subprocess.run(
        [*command, "--workers", "2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done_.returncode == 1 and len(done_.stderr.splitlines()) == 1
    assert re.search(r"was killed while it read .*s07.nii.gz.*--workers 1", done_.stderr)


def test_a_full_disk_is_one_line_and_what_is_done_is_kept(tmp_path):
    scans, labels = twelve(tmp_path, (40, 40, 40))
    command = [sys.executable, "-m", "jobs.pack", scans, "--labels", labels, "-o", tmp_path / "o.h5"]
    limit = f"ulimit -f 600; trap '' XFSZ; exec {' '.join(map(str, command))} --patch 36 --per-class 1 --workers 1"
    done_ = subprocess.run(["bash", "-c", limit], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done_.returncode == 1 and len(done_.stderr.splitlines()) == 1
    assert "cannot be written" in done_.stderr and not (tmp_path / "o.h5").exists()
    before = done(tmp_path / ".o.h5.packing")
    assert before
    read = []
    arguments = [scans, "--labels", labels, "-o", tmp_path / "o.h5", "--patch", "36", "--per-class", "1"]
    assert run_noting(read, *arguments) == 0
    assert set(read).isdisjoint(before)


def test_one_bad_source_of_a_world(tmp_path):
    """What is left out leaves no gap."""
    scans, labels = twelve(tmp_path)
    save(scans / "s03.nii.gz", np.full((6, 7, 8), np.nan, np.float32))
    assert run(scans, "--labels", labels, "-o", tmp_path / "o.h5", "--skip-bad", "--dtype", "int16") == 0
    volumes = open_volumes(tmp_path / "o.h5")
    assert len(volumes) == 11 and volumes.verify() == []
    for number, id in enumerate(volumes.ids):
        assert np.array_equal(volumes.read(number)[0][0], noise(seed=int(id[1:])))
    assert world().shape and table
