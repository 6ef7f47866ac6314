"""What sinks have confirmed: written aside, read back, a damaged one counts as none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hpc.logs import positions
from hpc.logs.positions import Position

ONE = Position("mlflow:http://127.0.0.1:5000", "sweep-1/row 2 %2F ü", {"tb/e": 120}, 3, None, 1.5, complete=True)


def test_a_position_comes_back(tmp_path: Path) -> None:
    other = replace(ONE, sink="me@host:runs", run="b", last_step=7, files={}, complete=False)
    for position in (other, ONE, replace(ONE, records=9)):
        positions.write(tmp_path, position)
    assert positions.read(tmp_path) == [other, replace(ONE, records=9)]
    assert positions.read(tmp_path, ONE.run) == [replace(ONE, records=9)]
    assert positions.read(tmp_path, "sweep-1") == []
    assert (ONE.size, other.size) == (120, 0)


def test_a_damaged_position_counts_as_none(tmp_path: Path) -> None:
    positions.write(tmp_path, ONE)
    path = positions.path_of(tmp_path, ONE.sink, ONE.run)
    for content in ("", "[]", "{}", path.read_text().replace("120", '"many"'), path.read_text()[:-20]):
        path.write_text(content)
        assert positions.read(tmp_path) == []
    assert positions.read(tmp_path / "none") == []
