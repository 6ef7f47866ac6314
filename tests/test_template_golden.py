"""The text of every form of the template, pinned in tests/golden.

A change of the script shows its changed lines here; HPC_ACCEPT_GOLDEN=1 pytest tests/test_template_golden.py accepts
them.
"""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hpc import instances, template
from hpc.instances import Instance
from hpc.rundir import RunDir
from hpc.settings import Launch
from hpc.sweepdir import Chunk, SweepDir
from tests.batchtext import CEDIA, PYTHON, experiment

GOLDEN = Path(__file__).parent / "golden"
RUN = RunDir("/scratch/ana/runs/golden-0123abcd")
SWEEP = SweepDir("/scratch/ana/runs/golden-sweep-0123abcd")
SITE = {
    "cpus": 12,
    "mem_gb": 64,
    "time_limit": "1d",
    "partition": "gpu",
    "gpus": 1,
    "environment": {"NCCL_DEBUG": "WARN", "HTTPS_PROXY": "http://proxy:3128"},
    "scratch": "$TMPDIR/hpc",
    "scratch_gb": 100,
    "prologue": ["ulimit -n 4096", 'mkdir -p "$HPC_SCRATCH"'],
    "epilogue": ['rm -rf "$HPC_SCRATCH"'],
    "sbatch": {"exclusive": None, "licenses": "matlab:1"},
}


def single(instance: Instance = CEDIA, **launch: Any) -> str:
    return template.render(experiment(**launch), instance, RUN, PYTHON)


def site(**fields: Any) -> Instance:
    return Instance.model_validate({"name": "site", **SITE, **fields})


def apptainer() -> str:
    image, mounts = "/images/torch 2.9.sif", ["/archive:/archive:ro", "$HOME/weights"]
    return single(
        site(container={"engine": "apptainer", "image": image, "mounts": mounts, "options": ["--writable-tmpfs"]})
    )


def pyxis() -> str:
    options = ["--no-container-mount-home"]
    return single(site(container={"engine": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.06-py3", "options": options}))


def function(array: str | None = None) -> str:
    folder, command = Path("/scratch/ana/logs"), "/opt/hpc/bin/python -u -m submitit.core._submit /scratch/ana/logs"
    return template.render_function("fit", CEDIA, Launch(), folder, command, array, python=PYTHON, comment="0123abcd")


FORMS: dict[str, Callable[[], str]] = {
    "job": lambda: single(account="neuro", mail="ana@cedia.example", constraint="a100&ib", time="8h", mem="60GB"),
    "nodes": lambda: single(instances.find("cedia-a100-40gb-nodes"), nodes=2, time="8h"),
    "gpus": lambda: single(instances.find("cedia-a100-40gb-x4"), time="8h"),
    "cpu": lambda: single(instances.find("cedia-cpu"), time="8h"),
    "array": lambda: template.render_array([experiment(time="8h")], CEDIA, SWEEP, Chunk(1, 1000, 40, 8), PYTHON),
    "function": function,
    "function-array": lambda: function("0-39%8"),
    "sections": lambda: single(site(modules=["cuda/12.4", "gcc"], venv="/home/ana/venv")),
    "apptainer": apptainer,
    "pyxis": pyxis,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_script_is_the_golden_one(form: str) -> None:
    script, golden = FORMS[form](), GOLDEN / f"{form}.sbatch"
    if os.environ.get("HPC_ACCEPT_GOLDEN") == "1":
        golden.write_text(script)
    wanted = golden.read_text() if golden.exists() else ""
    changes = "\n".join(
        difflib.unified_diff(wanted.splitlines(), script.splitlines(), "accepted", "now", lineterm="", n=1)
    )
    assert script == wanted, f"\n{changes}\nto accept: HPC_ACCEPT_GOLDEN=1 pytest tests/test_template_golden.py"


def test_every_golden_file_is_of_a_form() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{form}.sbatch" for form in FORMS}


_VARIABLE = re.compile(r"(?:(?:^|[\s;({])(\w+)=)|\$\{?([A-Za-z_]\w*)|\bfor (\w+) in", re.M)
_TO_CHOOSE = {
    *("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "PYTHONUNBUFFERED", "HDF5_USE_FILE_LOCKING"),  # ours are defaults
    *("LMOD_PKG", "MODULESHOME", "TMPDIR", "HOME", "SUBMITIT_EXECUTOR"),
    *SITE["environment"],
}


def test_no_variable_that_the_script_stands_on_can_be_one_of_an_instance() -> None:
    scripts = "\n".join(make() for make in FORMS.values())
    used = {next(filter(None, groups)) for groups in _VARIABLE.findall(scripts)}
    used = {name for name in used if not name.startswith("APPTAINERENV_")}
    assert {"run", "python", "told", "row", "profile", "HPC_STEP", "PYTHONPATH"} <= used
    for name in used - _TO_CHOOSE:
        with pytest.raises(ValidationError, match=rf"{name} (is|leads)"):
            site(environment={name: "x"})
