"""hpc prune and hpc sync --status: what is confirmed where, and what goes, checked against the sink itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hpc import cli
from hpc.attempt import begin, record_submission
from hpc.errors import UserError
from hpc.logs import positions, prune, status
from hpc.logs.ends import Place
from hpc.logs.sync import Carried, Session
from hpc.rundir import ROWS, RunDir, locked, write_json
from tests.mlflow_server import free_port
from tests.syncing import (
    FIRST,
    NEEDS_SETPRIV,
    ROOT,
    SECOND,
    WITHOUT_RIGHTS,
    age,
    append,
    attempt,
    make_run,
    scalar,
    visible,
    write,
)

NAME = "tiny-1a2b3c4d"
HELD = {"phase": "training", "pid": os.getpid(), "host": os.uname().nodename, "time": time.time(), "generation": 1}


def sync(runs: Path, home: Path, *more: str) -> None:
    session = Session(Place("", str(runs)), Place("", str(home)), Carried(more))
    assert session.round().problems == []
    session.close()


def finish(run: RunDir) -> RunDir:
    write_json(run.result, {"best": {}})
    write_json(run.state, {**HELD, "phase": "ended", "code": 0, "time": time.time() - 9000})
    age_all(run.path)
    return run


def age_all(folder: Path) -> None:
    when = time.time() - 7200
    for path in folder.rglob("*"):
        os.utime(path, (when, when), follow_symlinks=False)


def why(runs: Path, older_s: float = 3600, only: str | None = None, sink: str | None = None) -> dict[str, str]:
    return {one.name: one.kept for one in prune.candidates(runs, older_s, only, sink)}


def removed(runs: Path, only: str | None = None, unasked: bool = False) -> list[str]:
    chosen = [one for one in prune.candidates(runs, 3600, only, None, unasked) if not one.kept]
    return list(prune.remove(runs, chosen, 3600, only, unasked))


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["hpc", *words])
    monkeypatch.setenv("COLUMNS", "500")  # long names of temporary folders
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def test_what_is_confirmed_goes_and_the_rest_stays_with_its_reason(runs: Path, home: Path) -> None:
    gone = finish(make_run(runs, first=attempt(0, 9, 1)))
    coded = finish(make_run(runs, "coded-2", first=attempt(0, 9, 1)))
    coded.code.mkdir()
    (coded.code / "m.py").write_text("x")
    age_all(coded.path)
    live = make_run(runs, "live-3", first=attempt(0, 9, 1))
    record_submission(live, "local", str(os.getpid()))
    begin(live, os.getpid())
    age_all(live.path)
    young = finish(make_run(runs, "young-4", first=attempt(0, 9, 1)))
    young.metrics.write_text("{}\n")
    sync(runs, home)
    finish(make_run(runs, "alone-5", first=attempt(0, 9, 1)))
    kept = why(runs)
    assert kept[NAME] == ""
    assert kept["coded-2"] == f"code/m.py is not in {home} (hpc sync --with code)"
    assert "old" in kept["young-4"] and kept["alone-5"].startswith("is confirmed by no sink")
    assert kept["live-3"] == "running"
    assert removed(runs) == [f"{NAME} removed, {home} has it"]
    assert not gone.path.exists() and coded.path.exists() and young.path.exists() and live.path.exists()
    assert not [path for path in runs.iterdir() if "pruned" in path.name]


def test_a_sink_that_has_lost_something_is_not_believed(runs: Path, home: Path) -> None:
    run = finish(make_run(runs, first=attempt(0, 9, 1)))
    run.metrics.write_text("{}\n")
    age_all(run.path)
    carried = run.metrics.stat().st_atime_ns, run.metrics.stat().st_mtime_ns
    sync(runs, home)
    there = RunDir(home / NAME)
    assert why(runs) == {NAME: ""}
    event_file, content = there.tensorboard / FIRST, attempt(0, 9, 1)
    for spoiled in (content[:-1], content[:-20] + b"x" + content[-19:], b""):
        event_file.write_bytes(spoiled)
        assert "is not in" in why(runs)[NAME]
    event_file.unlink()
    age(run.tensorboard / FIRST, 7300)
    sync(runs, home)
    assert event_file.read_bytes() == content and why(runs) == {NAME: ""}, "the remedy"
    there.metrics.unlink()
    chosen = prune.candidates(runs, 3600, None, None)
    assert chosen[0].kept == f"metrics.jsonl is not in {home}"
    chosen[0].kept, chosen[0].sink = "", str(home)
    assert list(prune.remove(runs, chosen, 3600, None)) == [f"{NAME} stays: metrics.jsonl is not in {home}"]
    home.rename(home.with_name("away"))
    assert "cannot be asked" in why(runs)[NAME] and run.path.exists()
    assert [one.kept for one in prune.candidates(runs, 3600, None, None, unasked=True)] == [""]
    age(run.metrics, 7300)
    assert "metrics.jsonl is not in" in prune.candidates(runs, 3600, None, None, unasked=True)[0].kept, "another time"
    run.metrics.write_text("{}\n")
    os.utime(run.metrics, ns=carried)
    append(run.tensorboard / FIRST, scalar(9, 1.0))
    assert "as it is here" in prune.candidates(runs, 3600, None, None, unasked=True)[0].kept


def test_right_before_it_goes_every_file_is_compared(runs: Path, home: Path) -> None:
    """Of the size that it had, and another: what has become of a copy on a bad disk."""
    run = finish(make_run(runs, first=attempt(0, 9, 1)))
    weights = run.checkpoints / "g001-s00000009" / "weights"
    sweep = runs / "s-sweep-1"
    finish(make_run(sweep, "row-1", first=attempt(0, 9, 2)))
    (sweep / ROWS).write_text("row-1\n")
    (sweep / "sweep.yaml").write_text("axes: {}\nchunks: [{number: 0, first: 0, count: 1}]\n")
    write_json(sweep / "submit.json", {"submissions": []})
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"w" * 100)
    age_all(runs)
    sync(runs, home, "checkpoints")
    there, rows = home / weights.relative_to(runs), home / "s-sweep-1" / ROWS
    for path, content in ((there, b"W" * 100), (rows, b"row-2\n")):
        path.write_bytes(content)
    remedy = "as it is here; remove it there, 'touch' it here, and sync again"
    other = f"stays: {weights.relative_to(run.path)} is not in {home} {remedy}"
    assert removed(runs, "checkpoints") == [f"{NAME} {other}"] and weights.exists()
    assert removed(runs) == [f"{NAME} {other}", f"s-sweep-1 stays: {ROWS} is not in {home} {remedy}"]
    there.unlink()
    age(weights, 7300)
    rows.unlink()
    age(sweep / ROWS, 7300)
    sync(runs, home, "checkpoints")
    assert removed(runs, "checkpoints") == [f"{NAME}: checkpoints removed, {home} has them"]
    assert run.newest_checkpoint() is None and not any(run.checkpoints.iterdir()), "no empty one is left"
    assert len(removed(runs)) == 2 and not run.path.exists() and not sweep.exists()


def test_what_grew_after_it_was_confirmed_stays(runs: Path, home: Path) -> None:
    run = finish(make_run(runs, first=attempt(0, 9, 1)))
    sync(runs, home)
    for behind in (scalar(9, 1.0), bytes(9000) + scalar(9, 1.0)):
        append(run.tensorboard / FIRST, behind)
        age_all(run.path)
        assert why(runs)[NAME].startswith(f"tb/{FIRST} is not in {home} as it is here")
        write(run, FIRST, attempt(0, 9, 1))
    append(run.tensorboard / FIRST, scalar(9, 1.0)[:-1])
    age_all(run.path)
    assert why(runs)[NAME] == "", "half a record is nothing"
    write(run, SECOND, attempt(9, 12, 2))
    assert why(runs)[NAME] == f"tb/{SECOND} is not in {home}"
    (run.tensorboard / SECOND).unlink()
    (run.path / "notes.txt").write_text("by hand")
    age_all(run.path)
    assert why(runs)[NAME] == f"notes.txt is not in {home}"


def test_a_held_lease_keeps_a_run(runs: Path, home: Path) -> None:
    run = finish(make_run(runs, first=attempt(0, 9, 1)))
    sync(runs, home)
    with locked(run.lease):
        assert removed(runs) == [f"{NAME} stays: another has its lease"]
    assert run.path.exists()


def test_links_lead_nowhere(runs: Path, home: Path, tmp_path: Path) -> None:
    run = finish(make_run(tmp_path / "elsewhere", first=attempt(0, 9, 1)))
    runs.mkdir()
    (runs / NAME).symlink_to(run.path)
    sync(tmp_path / "elsewhere", home)
    position = positions.read(tmp_path / "elsewhere")[0]
    positions.write(runs, position)
    assert why(runs) == {NAME: "is a link to elsewhere"}
    inside = finish(make_run(runs, "in-2", first=attempt(0, 9, 1)))
    (inside.path / "logs").mkdir()
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_text("x")
    (inside.path / "logs" / "out").symlink_to(treasure)
    age_all(inside.path)
    sync(runs, home)
    assert why(runs)["in-2"] == f"logs/out is a link to {treasure}, and no sink has links; remove it first"
    assert "logs/out is a link" in why(runs, only="logs")["in-2"]
    (inside.path / "logs" / "out").unlink()
    for name, target in (("text", "job.out"), ("tensors", "../tb")):
        (inside.path / "logs" / name).symlink_to(target)
    age_all(inside.path)
    assert removed(runs) == [f"in-2 removed, {home} has it"], "links inside it lead to what the sink has"
    checkpoints = finish(make_run(runs, "linked-3", first=attempt(0, 9, 1)))
    checkpoints.checkpoints.symlink_to(treasure)
    age_all(checkpoints.path)
    sync(runs, home, "checkpoints")
    for only in (None, "checkpoints"):
        assert "checkpoints is a link" in why(runs, only=only)["linked-3"]
    assert (treasure / "gold").exists() and run.path.exists()


def test_a_sweep_goes_as_a_whole(runs: Path, home: Path) -> None:
    sweep = runs / "s-sweep-1"
    rows = [finish(make_run(sweep, f"row-{number}", first=attempt(0, 9, number))) for number in (1, 2)]
    (sweep / ROWS).write_text("row-1\nrow-2\n")
    (sweep / "sweep.yaml").write_text("axes: {}\nchunks: [{number: 0, first: 0, count: 2}]\n")
    write_json(sweep / "submit.json", {"submissions": []})
    rows[1].result.unlink()
    write_json(rows[1].state, {**HELD, "phase": "training", "process_start": ""})
    sync(runs, home)
    kept = why(runs)
    if any("damaged" in reason for reason in kept.values()):
        pytest.fail(f"the sweep is not one: {kept}")
    assert kept["s-sweep-1/row-1"].startswith("its sweep stays: ") and kept["s-sweep-1/row-2"]
    finish(rows[1])
    sync(runs, home)
    assert why(runs) == {"s-sweep-1/row-1": "", "s-sweep-1/row-2": ""}
    (sweep / "job.sbatch").write_text("#!/bin/bash\n")
    assert "job.sbatch is not in" in why(runs)["s-sweep-1/row-1"]
    sync(runs, home)
    assert removed(runs) == [f"s-sweep-1 removed, {home} has it"] and not sweep.exists()


def test_a_part_of_a_run(runs: Path, home: Path) -> None:
    run = finish(make_run(runs, first=attempt(0, 9, 1)))
    (run.checkpoints / "g001-s00000009").mkdir(parents=True)
    (run.checkpoints / "g001-s00000009" / "weights").write_bytes(b"w" * 100)
    age_all(run.path)
    sync(runs, home)
    assert "hpc sync --with checkpoints" in why(runs, only="checkpoints")[NAME]
    assert "hpc sync --with checkpoints" in why(runs)[NAME]
    sync(runs, home, "checkpoints")
    assert removed(runs, "checkpoints") == [f"{NAME}: checkpoints removed, {home} has them"]
    assert not list(run.checkpoints.rglob("weights")) and run.result.exists() and (run.tensorboard / FIRST).exists()
    assert removed(runs, "logs") == [f"{NAME}: logs removed, {home} has them"]
    assert not list(run.tensorboard.iterdir()) and run.result.exists()
    assert why(runs) == {NAME: ""}, "what is left is in the sink, too"


def test_a_tracker_that_does_not_answer_is_believed_for_event_files_alone(
    runs: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = finish(make_run(runs, first=attempt(0, 9, 1)))
    run.logs.mkdir()
    (run.logs / "1_0_log.out").write_text("x")
    run.event("submit", "shell", 0, cluster="local", job="4711")
    age_all(run.path)
    sync(runs, home)
    (known,) = positions.read(runs)
    positions.path_of(runs, known.sink, NAME).unlink()
    uri = f"mlflow:http://127.0.0.1:{free_port()}"
    positions.write(runs, replace(known, sink=uri))
    assert "event files alone" in why(runs)[NAME]
    assert "by --only logs --unasked" in why(runs, only="logs")[NAME] and removed(runs, "logs") == []
    assert removed(runs, "logs", unasked=True) == [f"{NAME}: logs removed, {uri} has them"]
    assert (run.logs / "1_0_log.out").exists() and not list(run.tensorboard.iterdir())


def test_what_was_pruned_here_is_not_brought_again(runs: Path, home: Path, tmp_path: Path) -> None:
    run = finish(make_run(runs, first=attempt(0, 9, 1)))
    sync(runs, home)
    age_all(home / NAME)
    sync(home, tmp_path / "archive")
    assert removed(home) == [f"{NAME} removed, {tmp_path / 'archive'} has it"]
    sync(runs, home)
    assert not (home / NAME).exists()
    write(run, SECOND, attempt(9, 12, 2))
    sync(runs, home)
    assert visible(home) == visible(runs), "it has gone on: all of it comes again"


@pytest.mark.parametrize("how", ["link", "moved"])
def test_the_folder_itself_is_no_sink(runs: Path, home: Path, how: str) -> None:
    """Else each file would be compared with itself, and the only copy removed."""
    finish(make_run(runs, first=attempt(0, 9, 1)))
    sync(runs, home)
    assert why(runs) == {NAME: ""}
    shutil.rmtree(home)
    if how == "link":
        home.symlink_to(runs)
        with pytest.raises(UserError, match=r"one is in the other|are one folder"):
            Session(Place("", str(runs)), Place("", str(home)), Carried())
    else:
        runs.rename(home)
    for folder in {home, home.resolve()}:
        age_all(folder / NAME)
        assert why(folder) == {NAME: f"{home} is this folder itself"}
        assert removed(folder) == removed(folder, unasked=True) == []
    assert visible(home)


@NEEDS_SETPRIV
def test_what_is_read_only_goes_and_what_is_not_ours_is_named(runs: Path, home: Path) -> None:
    for name in ("one-1", "n" * 255, "two-2"):
        finish(make_run(runs, name, first=attempt(0, 9, 1)))
    sync(runs, home)
    (runs / "one-1/tb").chmod(0o500)
    (left := runs / f"{prune._TAKEN}old").mkdir(0)
    (runs / f"{prune._TAKEN}theirs/in").mkdir(parents=True)
    os.chown(runs / f"{prune._TAKEN}theirs", 4711, 4711)
    command = [*WITHOUT_RIGHTS, sys.executable, "-m", "hpc.cli", "prune", "--older-than", "1h", "--yes", "--runs", runs]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "theirs could not be removed whole" in told.stdout, told
    assert not left.exists() and not any(path.name[0] != "." for path in runs.iterdir())
    assert [path.name for path in runs.glob(f"{prune._TAKEN}*")] == [f"{prune._TAKEN}theirs"]


def test_a_run_that_cannot_go_keeps_no_other(runs: Path, home: Path) -> None:
    for name in ("one-1", "two-2"):
        finish(make_run(runs, name, first=attempt(0, 9, 1)))
    sync(runs, home)
    (runs / f"{prune._TAKEN}one-1").write_text("in the way")
    told = removed(runs)
    assert told[0].startswith("one-1 stays: ") and told[1] == f"two-2 removed, {home} has it"


def test_the_command_shows_first(
    runs: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finish(make_run(runs, first=attempt(0, 9, 1)))
    sync(runs, home)
    assert command(monkeypatch, "prune", "--older-than", "1h", "--runs", str(runs)) == 0
    told = capsys.readouterr().out
    assert "1 of 1 would go" in told and f"goes: {home} has it" in told and run.path.exists()
    assert command(monkeypatch, "prune", "--older-than", "1h", "--runs", str(runs), "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["sink"] == str(home)
    assert command(monkeypatch, "prune", "--older-than", "1h", "--runs", str(runs), "--sink", "/none") == 2
    assert f"valid: {home}" in capsys.readouterr().err
    assert command(monkeypatch, "prune", "--older-than", "1h", "--runs", str(runs), "--yes") == 0
    assert not run.path.exists()


def test_status_tells_what_is_where(
    runs: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(runs, first=attempt(0, 9, 1))
    assert command(monkeypatch, "sync", "--status", "--runs", str(runs)) == 1
    assert "nowhere" in capsys.readouterr().out
    sync(runs, home)
    assert command(monkeypatch, "sync", "--status", str(runs)) == 0
    assert f"{home}: all, " in capsys.readouterr().out
    assert command(monkeypatch, "sync", "--status", str(home)) == 0
    assert "all, " in capsys.readouterr().out
    append(run.tensorboard / FIRST, scalar(9, 1.0))
    append(run.tensorboard / FIRST, scalar(10, 1.0)[:9], old=False)
    assert command(monkeypatch, "sync", "--status", "--runs", str(runs), "--json") == 1
    told = json.loads(capsys.readouterr().out)
    (one,) = told["runs"]
    assert (told["confirmed"], one["records"], one["last_step"], one["rest"]) == (False, 12, 9, 9)
    assert [(sink["sink"], sink["behind"]) for sink in one["sinks"]] == [(str(home), len(scalar(9, 1.0)))]
    sync(runs, home)
    assert status.look(runs).exit_code == 0, "an unfinished record is not behind"
    capsys.readouterr()
    valid = (home / NAME / "tb" / FIRST).read_bytes()
    for rest in (scalar(10, 1.0)[:9], bytes(5000), scalar(10, 1.0)[:-1] + b"x"):
        write(run, FIRST, valid + rest)
        assert command(monkeypatch, "sync", "--status", "--runs", str(runs)) == 1, rest
        told = capsys.readouterr().out
        assert f"1 damaged: 'hpc fsck {NAME}'" in told and f"{home}: up to the damage" in told and "all" not in told
    assert status.look(runs).runs[0].damaged == {f"tb/{FIRST}": len(valid)}
    write(run, FIRST, valid)
    assert status.look(runs).exit_code == 0
    make_run(runs, "new-2", first=attempt(0, 3, 1))
    found = status.look(runs)
    assert found.exit_code == 1 and "new-2" in found.sentence
    make_run(runs, "empty-3")
    (empty,) = (row for row in status.rows(status.look(runs)) if row[0] == "empty-3")
    assert empty[-1] == f"{home}: nothing yet"


def test_a_sink_that_is_gone_can_be_forgotten(
    runs: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(runs, first=attempt(0, 9, 1))
    sync(runs, home)
    make_run(runs, "new-2", first=attempt(0, 3, 1))
    assert "--forget" not in status.look(runs).sentence, "it is only late"
    (position,) = positions.read(runs)
    positions.write(runs, replace(position, confirmed=position.confirmed - 8 * 86400))
    assert f"--status --forget '{home}'" in status.look(runs).sentence
    assert command(monkeypatch, "sync", "--status", "--runs", str(runs), "--forget", "hom") == 2
    assert f"knows no such sink; valid: {home}" in capsys.readouterr().err
    assert command(monkeypatch, "sync", "--status", "--runs", str(runs), "--forget", str(home)) == 1
    assert f"{home} is forgotten" in capsys.readouterr().err and not status.look(runs).runs[0].sinks
    sync(runs, home)
    assert status.look(runs).runs[0].confirmed, "it was left as it is"
