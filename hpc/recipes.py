"""Recipes: experiments that the payload carries, by name, and their tiny forms on real data.

A recipe is jobs/recipes/NAME.yaml. Its tiny form is what tiny/common.yaml and tiny/NAME.yaml beside it change, or where
there is no such file, that of its base. Paths in both are relative to the working folder, as those of overrides are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpc import payload
from hpc.errors import UserError, nearest
from hpc.preempt import ExitCode

if TYPE_CHECKING:
    from hpc.experiment import Experiment

DATA = "recipes-data"
"""Folder of the tiny forms' data, in the working folder: what is missing there is fetched and packed."""
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Recipe:
    name: str
    task: str
    summary: str
    """The first line of the file's comment."""
    base: str | None
    file: Path


def folder() -> Path:
    """Raises UserError where there is no payload."""
    return payload.root() / "jobs" / "recipes"


def ours(path: Path) -> bool:
    """Whether a file is a recipe or a tiny form."""
    try:
        return folder() in (path.resolve().parent, path.resolve().parent.parent)
    except UserError:
        return False


def find(word: str, beside: Path) -> Path | None:
    """The recipe of a bare name without a file of that name `beside`; None for a path. Raises UserError."""
    if Path(word).name != word or word.endswith(_SUFFIXES) or (beside / word).exists():
        return None
    try:
        found = folder() / f"{word}.yaml"
    except UserError:
        return None
    if found.is_file():
        return found
    raise UserError(f"{word!r} is no file here and no recipe: {nearest(word, _names())}")


def tiny_form(files: Sequence[Path]) -> tuple[Path, Path]:
    """What all tiny forms change, and what that of the first file that has one does. Raises UserError.

    `files`: an experiment, its base, the base of that ...
    """
    for file in files:
        form = folder() / "tiny" / file.name
        if ours(file) and form.is_file():
            return form.with_name("common.yaml"), form
    raise UserError(
        f"{files[0]} has no tiny form: --tiny is for recipes and experiments based on one; 'hpc recipes' lists them"
    )


def listed() -> list[Recipe]:
    """All, by name. Raises UserError."""
    from hpc import yamlfile
    from hpc.experiment import load

    recipes = []
    for name in _names():
        file = folder() / f"{name}.yaml"
        summary = file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        recipes.append(Recipe(name, load(file)[0].task, summary, yamlfile.read(file).get("base"), file))
    return recipes


def _names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.yaml"))


def fetch(experiments: Iterable[Experiment]) -> None:
    """Fetch and pack what tiny forms read and is missing in a folder recipes-data. Raises UserError."""
    wanted = {Path(file) for one in experiments for file in (one.data.file, one.model.weights) if file}
    missing = sorted(path for path in wanted if path.parent.name == DATA and not path.exists())
    for path in missing:
        print(f"fetching and packing real data: {path}", file=sys.stderr, flush=True)
        if payload.child("jobs.realdata", [path.stem, "-o", str(path.parent)], output=sys.stderr) != ExitCode.DONE:
            raise UserError(f"{path} could not be made, see above")
