"""200 odd strings through every field that reaches the batch text: refused in one line, or quoted, and never run."""

import os
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hpc import template
from hpc.errors import UserError
from hpc.experiment import validate
from hpc.instances import Instance
from hpc.rundir import RunDir
from hpc.sections import on_node
from hpc.settings import Launch
from hpc.sweepdir import Chunk, SweepDir
from tests.batchtext import DEAF, options

_PARTS = [
    "a", "b c", " ", "'", '"', "$(touch canary)", "`touch canary`", "${HOME}", "$HOME", "$(", "#", " # x", "-",
    "--help", "\\", "\\n", ";touch canary;", "&", "|touch canary", ">canary", "<(touch canary)", "*", "?", "[a]", "~",
    "!!", "%j", "%", "{{ 7*7 }}", "{% raw %}", "{#", "ü", "=", ",", ":", "(", ")", "\n", "\r", "\t", "\0", "\x1b[1m",
    "\n#SBATCH --wrap=id\n", "\nEOF\n", "'; touch canary; '", '"; touch canary; "', "$'\\n'", "\u2028",
]  # fmt: skip
_RANDOM = random.Random(20240703)
STRINGS = [*_PARTS, *("".join(_RANDOM.choices(_PARTS, k=_RANDOM.randint(2, 5))) for _ in range(200 - len(_PARTS)))]
HOME = "/home/a'na $(touch canary)"
BASE = {"name": "odd", "cpus": 1, "mem_gb": 1, "time_limit": "1h", "gpus": 1}
APPTAINER = {"engine": "apptainer", "image": "/i.sif"}
PYXIS = {"engine": "pyxis", "image": "i.sqsh"}

STUB = """#!/bin/sh
printf '%s\\0' "$@" "$ODD" "$HPC_SCRATCH" >> "$RECORD"
printf '\\001' >> "$RECORD"
[ "$2" != hpc.attempt ] || echo "export HPC_GENERATION=7"
[ "$2" != hpc.requeue ] || echo "end $5"
"""
MODULE = """() { printf '%s\\0' "$@" . . >> "$RECORD"; printf '\\001' >> "$RECORD"; }"""

Fields = dict[str, Any]

LAUNCH = ["account", "partition", "qos", "reservation", "constraint", "mail"]
# Of an instance: field name to the values that carry the string.
SECTIONS: dict[str, Callable[[str], Fields]] = {
    "gpu_type": lambda odd: {"gpu_type": odd},
    "environment": lambda odd: {"environment": {"ODD": odd}},
    "modules": lambda odd: {"modules": [odd]},
    "scratch": lambda odd: {"scratch": f"/s/{odd}"},
    "sbatch": lambda odd: {"sbatch": {"licenses": odd}},
    "venv": lambda odd: {"venv": f"/v/{odd}"},
}
CONTAINER: dict[str, Callable[[str], Fields]] = {
    "image": lambda odd: {"image": odd},
    "mounts": lambda odd: {"mounts": [odd]},
    "options": lambda odd: {"options": [odd]},
    "python": lambda odd: {"python": odd},
}
KEYS: dict[str, Callable[[str], Fields]] = {
    "environment": lambda odd: {"environment": {odd: "x"}},
    "sbatch": lambda odd: {"sbatch": {odd: "x"}},
    "scratch": lambda odd: {"scratch": odd},
    "venv": lambda odd: {"venv": odd},
}


def experiment(data: str = "x", **launch: Any) -> Any:
    values = {"name": "odd", "model": {"name": "m"}, "data": {"file": f"/data/{data}/x.h5"}, "launch": launch}
    return validate(values, "here")


def instance(**fields: Any) -> Instance:
    return Instance.model_validate({**BASE, **fields})


def refused(make: Callable[[], Any]) -> bool:
    """Whether it is refused, which only the errors of a user's mistake do."""
    try:
        make()
    except UserError as error:
        assert str(error).count("\n") == 0, error
        return True
    except ValidationError:
        return True
    return False


def single(run: Path, launch: Fields | None = None, data: str = "x", **fields: Any) -> str:
    return template.render(
        experiment(data, **(launch or {})), instance(**fields), RunDir(run), str(run.parent / "stub")
    )


def taken(kinds: dict[str, Callable[[str], Fields]], odd: str, run: Path, engine: str = "") -> Fields:
    """Those of the fields that take this string, each tried alone."""
    fields: Fields = {}
    for values in kinds.values():
        given = values(odd)
        whole = {"container": {"engine": engine, "image": "/i.sif", **given}} if engine else given
        if not refused(lambda whole=whole: single(run, **whole)):
            fields |= given
    return fields


def expanded(text: str) -> str | None:
    """As the node reads a path; None where a variable is unset there, which ends the job."""
    names = re.findall(r"\$(?:(\w+)|\{(\w+)\})", text, re.ASCII)
    if any(name not in ("HOME", "") for pair in names for name in pair):
        return None
    return re.sub(r"\$HOME|\$\{HOME\}", lambda _: HOME, text)


def play(script: str, folder: Path, **own: str) -> list[list[str]]:
    """Every call of a stub with its last two: ODD and HPC_SCRATCH, as a real bash makes them in an empty folder."""
    file, here, record = folder / "job.sbatch", folder / "here", folder / "record"
    file.write_text(script)
    here.mkdir(exist_ok=True)
    record.write_text("")
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": HOME, "RECORD": str(record)}
    environ |= {"BASH_FUNC_module%%": MODULE, **own}
    done = subprocess.run(
        ["bash", file], cwd=here, env=environ, capture_output=True, text=True, check=False, timeout=30
    )
    assert not list(here.iterdir()), f"something was run: {list(here.iterdir())}"
    assert done.returncode == 0 or "is not set on this node" in done.stderr or "activate" in done.stderr, done.stderr
    return [call.split("\0")[:-1] for call in record.read_bytes().decode().split("\1")[:-1]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("stub", "srun"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def path(folder: Path, odd: str) -> Path:
    """A run's path with this string in it, where it may be one."""
    given = folder / (odd.replace("\0", "") or "x")
    return folder / "x" if refused(lambda: single(given)) else given


def test_a_run_in_apptainer(folder: Path) -> None:
    """Every accepted string reaches sbatch and the rank's command as it is."""
    sites = {key: SECTIONS[key] for key in SECTIONS if key != "venv"}
    played = 0
    for odd in STRINGS:
        run, usual = path(folder, odd), folder / "x"
        launch = {key: odd for key in LAUNCH if not refused(lambda key=key, odd=odd, to=usual: single(to, {key: odd}))}
        data = "x" if refused(lambda odd=odd, to=usual: single(to, data=odd, container=APPTAINER)) else odd
        box = {**APPTAINER, **taken(CONTAINER, odd, usual, "apptainer")}
        if refused(lambda run=run, box=box: single(run, container=box)):
            run = usual
        fields = taken(sites, odd, usual)
        script = single(run, launch, data, **fields, container=box)
        read = options(script)
        assert {read["mail-user" if key == "mail" else key] for key in launch} <= {odd}
        assert read["gres"] == ":".join(["gpu", *([fields["gpu_type"]] if "gpu_type" in fields else []), "1"])
        assert read.get("licenses") == fields.get("sbatch", {}).get("licenses")
        calls = [call for call in play(script, folder) if call[:-2] != ["load", odd]]
        paths = [expanded(text) for text in (fields.get("scratch", ""), box["image"], *box.get("mounts", []))]
        if None not in paths:
            played += 1
            check_calls(calls, run, fields, f"/data/{data}", box, [text or "" for text in paths])
    assert played > 100, "most strings are played to the end"


def shell(scratch: str) -> list[str]:
    """What a rank begins in; a scratch folder with a variable in its name is read anew on each node."""
    own = f"; export HPC_SCRATCH={on_node(scratch)}; exec" if "$" in scratch else "; exec"
    return [word.replace("; exec", own) for word in DEAF]


def check_calls(calls: list[list[str]], run: Path, fields: Fields, data: str, box: Fields, paths: list[str]) -> None:
    """The three calls of a local run; `paths` are scratch, image and mounts as the node reads them."""
    scratch, image, *mounts = paths
    assert [call[:2] for call in calls] == [["-m", f"hpc.{name}"] for name in ("attempt", "localstep", "requeue")]
    step = calls[1]
    assert step[-2:] == [fields.get("environment", {}).get("ODD", ""), scratch]
    binds = [str(run), data, *([scratch] if scratch else []), *mounts]
    words = ["apptainer", "exec", "--nv", *(word for bind in binds for word in ("--bind", bind))]
    words += [
        *box.get("options", []),
        image,
        *shell(fields.get("scratch", "")),
        box.get("python", "python3"),
        "-u",
        "-m",
        "jobs.run",
        str(run),
    ]
    assert step[step.index("--") + 1 : -2] == words


def test_an_array_in_a_venv(folder: Path) -> None:
    """Folder of the sweep, name of the row, venv: all of this string."""
    played = 0
    for odd in STRINGS:
        sweep, row = SweepDir(path(folder, odd)), odd.replace("\n", "").replace("\0", "") or "x"
        sweep.path.mkdir(exist_ok=True)
        sweep.rows_file.write_text(f"a\nb\n{row}\n", newline="\n")
        venv = f"{folder}/v/{odd}"
        fields = {} if refused(lambda venv=venv: single(folder / "x", venv=venv)) else {"venv": venv}
        script = template.render_array(
            [experiment()], instance(**fields), sweep, Chunk(0, 2, 4, 2), str(folder / "stub")
        )
        python = [str(folder / "stub")]
        if fields:
            place = expanded(venv)
            python = [f"{place}/bin/python"]
            activate = Path(place or venv) / "bin" / "activate"
            activate.parent.mkdir(parents=True, exist_ok=True)
            activate.touch()
        calls = play(script, folder, HPC_ARRAY_TASK_ID="0")
        if python[0].startswith("None"):
            continue
        played += 1
        run = f"{sweep.path}/{row}"
        assert [call[2] for call in (calls[0], calls[2])] == [run, run]
        assert calls[1][calls[1].index("--") + 1 : -2] == [*DEAF, *python, "-u", "-m", "jobs.run", run]
    assert played > 150


def function(folder: Path, place: Path, box: Fields, name: str = "f", comment: str | None = None) -> str:
    site, python = instance(environment={"ODD": "x"}, container=box), str(folder / "stub")
    return template.render_function(name, site, Launch(), place, "echo hi", "0-3%2", python=python, comment=comment)


def test_a_function_in_pyxis(folder: Path) -> None:
    """Name, comment and folder of a function, and srun's arguments."""
    kinds = {key: CONTAINER[key] for key in CONTAINER if key != "python"}
    played = 0
    for odd in STRINGS:
        place, usual = path(folder, odd), folder / "x"
        box = {**PYXIS, **taken(kinds, odd, usual, "pyxis")}
        if refused(lambda place=place, box=box: function(folder, place, box)):
            place = usual
        names = {
            key: odd
            for key in ("name", "comment")
            if not refused(lambda own={key: odd}, box=box, to=usual: function(folder, to, box, **own))
        }
        script = function(folder, place, box, **names)
        read = options(script)
        assert {read["job-name" if key == "name" else key] for key in names} <= {odd}
        log = re.sub("%(?![jtAa])", "%%", str(place)).replace("%j", "%A_%a") + "/%A_%a_%t_log.out"
        assert read["output"] == log.replace("%t", "0")
        calls = play(script, folder, SLURM_JOB_ID="5")
        mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in box.get("mounts", [])]
        paths = [expanded(text) for text in (box["image"], *mounts)]
        if None in paths:
            continue
        played += 1
        (srun,) = calls
        assert f"--output={log}" in srun and srun[-4:-2] == ["echo", "hi"]
        assert f"--container-image={paths[0]}" in srun
        bound = f"{place}:{place}" if not re.search("%[jtAa]", str(place)) else f"{folder}:{folder}"
        assert f"--container-mounts={','.join([bound, *map(str, paths[1:])])}" in srun
        assert all(option in srun for option in box.get("options", []))
    assert played > 100


@pytest.mark.parametrize("field", KEYS)
def test_names_of_keys_and_lone_values_are_refused_or_quoted(field: str, folder: Path) -> None:
    for odd in STRINGS:
        if not refused(lambda odd=odd: single(folder / "x", **KEYS[field](odd))):
            play(single(folder / "x", **KEYS[field](odd)), folder)
