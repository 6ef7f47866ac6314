"""A report's folder: one that cannot be written, figures of runs that have left it, and what its pages are made of."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.errors import UserError
from hpc.journal.report import RunData, write_report
from tests.test_journal import finished, png, write_note

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("out", ["/proc/x", "/proc/x/y", "file/deep", "file", "full"])
def test_a_folder_that_cannot_be_written_is_one_line_with_a_remedy(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full" / "index.html").mkdir(parents=True)  # what root meets, too
    folder = Path(out) if out.startswith("/") else tmp_path / out
    with pytest.raises(UserError, match=r"^[^\n]+: [^\n]+-o[^\n]*$"):
        write_report([finished("a-1")], folder)


def test_a_page_that_is_somebodys_stays(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(UserError, match=r"index\.html: is there without EXPERIMENTS\.md"):
        write_report([finished("a-1")], tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("index.html", "mine")]


def test_figures_that_are_no_longer_shown_are_removed_and_nothing_else(tmp_path: Path) -> None:
    out, shade = tmp_path / "out", png(tmp_path / "f.png")
    figures = {"roc": shade, "curves": shade, "mine": shade}
    runs = [RunData(name, figures=figures) for name in ("a-1", "b-2", "c-3")]
    text_path, _ = write_report(runs, out)
    own = ["mine.png", "a-1--kept.png", "b-2--roc.png.txt"]
    for name in own:
        png(out / "figures" / name)
    write_note(text_path, "a-1", "![kept](figures/a-1--kept.png)")
    write_note(text_path, "b-2", "see ![roc](figures/b-2--roc.png)")
    write_report([replace(runs[0], figures={"roc": shade}), replace(runs[2], run="renamed-3")], out)
    left = ["a-1--roc.png", "b-2--roc.png", *(f"renamed-3--{name}.png" for name in figures)]
    assert sorted(path.name for path in (out / "figures").iterdir()) == sorted([*own, *left])


def test_an_installed_package_has_its_pages_and_templates() -> None:
    """Each package, and each file of it that is no Python, stands in pyproject.toml."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = [path.parent for room in ("hpc", "slurm_templates") for path in (ROOT / room).rglob("__init__.py")]
    assert sorted(told["packages"]) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in found)
    for room in ("hpc", "slurm_templates"):
        files = {path for path in (ROOT / room).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        for package, globs in told["package-data"].items():
            files -= {path for glob in globs for path in (ROOT / package.replace(".", "/")).glob(glob)}
        assert not files
