"""The sbatch text: one pure function of (experiment, instance, run folder, interpreter); every value shell-quoted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import slurm_templates
from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.instances import Instance, Request
from hpc.rundir import RunDir

_FOLDER = Path(slurm_templates.__file__).parent
_NOTICE_S = 120


class _Raw(str):
    """Text that goes into the script as it is."""


def render(experiment: Experiment, instance: Instance, run: RunDir, python: str) -> str:
    """The batch script of a run. Raises UserError for a value that no `#SBATCH` line can carry."""
    request = instance.request(experiment.launch)
    text: str = _template().render(
        options=_options(experiment, instance, request, run),
        run=run,
        python=python,
        request=request,
        instance=instance,
        notice_s=notice_seconds(request),
        output=_slurm_path(run.output()),
        error=_slurm_path(run.output(stream="err")),
        command=(python, "-u", "-m", "jobs.run", str(run.path)),
    )
    return text


def notice_seconds(request: Request) -> int:
    """Warning before the time limit: two minutes, or half of a shorter limit."""
    return min(_NOTICE_S, request.time_s // 2)


def _options(experiment: Experiment, instance: Instance, request: Request, run: RunDir) -> dict[str, str | int | None]:
    launch = experiment.launch
    gres = ":".join(part for part in ("gpu", instance.gpu_type, str(request.gpus)) if part)
    minutes, rest = divmod(request.time_s, 60)
    options: dict[str, str | int | None] = {
        "job-name": experiment.name,
        "comment": run.name,
        "nodes": request.nodes,
        "ntasks-per-node": request.tasks_per_node,
        "cpus-per-task": request.cpus_per_task,
        "mem": f"{round(request.mem_gb * 1000)}M",
        "time": f"{minutes}:{rest:02d}",
        "signal": f"USR2@{notice_seconds(request)}",
        "requeue": None,
        "open-mode": "append",
        "output": _slurm_path(run.output(task="0")),
        "error": _slurm_path(run.output(task="0", stream="err")),
    }
    chosen = {
        "gres": gres if request.gpus else None,
        "partition": launch.partition or instance.partition,
        "account": launch.account,
        "qos": launch.qos,
        "reservation": launch.reservation,
        "constraint": launch.constraint,
        "mail-user": launch.mail,
        "mail-type": "END,FAIL,REQUEUE" if launch.mail else None,
    }
    options.update({key: value for key, value in chosen.items() if value is not None})
    for key, value in options.items():
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in str(value)):
            raise UserError(f"#SBATCH --{key}: {value!r} carries a line break or control character; write one line")
    return options


def _slurm_path(path: Path) -> str:
    """A path in which only the file name's %j and %t are SLURM's."""
    return f"{str(path.parent).replace('%', '%%')}/{path.name}"


def _template() -> Any:
    from jinja2 import FileSystemLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(
        loader=FileSystemLoader(_FOLDER),
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, _Raw) else shlex.quote(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["raw"] = _Raw
    environment.filters["words"] = _words
    return environment.get_template("job.sbatch.j2")


def _words(command: Sequence[str]) -> _Raw:
    return _Raw(shlex.join(command))
