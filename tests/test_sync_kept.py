"""hpc sync loses nothing: what an accident takes at the source stays here, and every file comes, whatever its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpc.logs import status
from hpc.logs.ends import Place
from hpc.logs.sync import Carried, Round, Session
from tests.syncing import FIRST, SECOND, attempt, make_run, visible, write


def carry(runs: Path, home: Path) -> Round:
    session = Session(Place("", str(runs)), Place("", str(home)), Carried())
    try:
        return session.round()
    finally:
        session.close()


def test_what_was_cut_after_the_runs_end_stays_here(runs: Path, home: Path) -> None:
    """No attempt goes on, so nobody has cut it on purpose."""
    run = make_run(runs, first=attempt(0, 40, 1))
    run.result.write_text("{}")
    carry(runs, home)
    write(run, FIRST, attempt(0, 40, 1)[:900])
    for _ in range(2):
        assert any("what is here stays" in problem for problem in carry(runs, home).problems)
    assert list(visible(home).values()) == [attempt(0, 40, 1)]
    kept = home / run.name / run.tensorboard.name / FIRST
    shutil.copy(kept, run.tensorboard / FIRST)
    assert carry(runs, home).problems == [] and status.look(runs).exit_code == 0
    write(run, FIRST, attempt(0, 40, 1)[:900])
    assert carry(runs, home).problems
    kept.unlink()
    assert carry(runs, home).problems == []
    assert list(visible(home).values()) == [attempt(0, 40, 1)[:865]], "the whole records of what is left"
    write(run, FIRST, attempt(0, 40, 1))
    assert carry(runs, home).problems == [] and list(visible(home).values()) == [attempt(0, 40, 1)]
    write(run, SECOND, attempt(30, 50, 2))
    write(run, FIRST, attempt(0, 30, 1))
    assert carry(runs, home).problems == [] and visible(home) == visible(runs), "a resumed one has cut it"


def test_a_run_made_anew_before_it_wrote_an_event_file_is_another_to_the_same_watch(runs: Path, home: Path) -> None:
    run = make_run(runs)
    session = Session(Place("", str(runs)), Place("", str(home)), Carried())
    assert session.round().problems == []
    before = (home / run.name / run.experiment.name).read_text()
    shutil.rmtree(run.path)
    make_run(runs).experiment.write_text("name: another\n")
    assert "another run of this name" in session.round().problems[0]
    assert (home / run.name / run.experiment.name).read_text() == before
    session.close()


def test_a_file_that_was_lost_or_cut_here_comes_again(runs: Path, home: Path) -> None:
    run = make_run(runs, first=attempt(0, 9, 1))
    run.metrics.write_text('{"step": 1}\n')
    run.result.write_text("{}")
    carry(runs, home)
    for lose in (Path.unlink, lambda path: path.write_text("")):
        lose(home / run.name / run.metrics.name)
        done = carry(runs, home)
        assert done.others == 1 and (home / run.name / run.metrics.name).read_text() == '{"step": 1}\n'
    assert carry(runs, home).others == 0


def test_event_files_that_were_lost_cut_or_lengthened_here_are_as_at_the_source_again(runs: Path, home: Path) -> None:
    run = make_run(runs, first=attempt(0, 40, 1))
    write(run, SECOND, attempt(40, 60, 2))
    run.result.write_text("{}")
    carry(runs, home)
    folder = home / run.name / run.tensorboard.name
    for lose in (
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:700]),
        lambda path: path.write_bytes(path.read_bytes() + path.read_bytes()[-300:]),
    ):
        for number in range(2):
            lose(sorted(path for path in folder.iterdir() if path.name.startswith("events"))[number])
            assert carry(runs, home).problems == []
            assert list(visible(home).values()) == list(visible(runs).values()), "the same bytes in the same order"
            assert status.look(runs).exit_code == 0
    assert carry(runs, home).size == 0


@pytest.mark.parametrize("name", ["#old", "; x", "-r", "n" * 255, "ü" * 127, "%" * 90, "two\nlines"])
def test_odd_names_are_carried(runs: Path, home: Path, name: str) -> None:
    run = make_run(runs, name, first=attempt(0, 9, 1))
    run.metrics.write_text("{}\n")
    (runs / "beside").symlink_to(run.path)
    for _ in range(2):
        carry(runs, home)
    assert (home / name / run.metrics.name).read_text() == "{}\n"
    found = status.look(runs)
    assert found.exit_code == 0 and [one.run for one in found.runs] == [name]
