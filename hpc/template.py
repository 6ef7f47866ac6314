"""The batch text: a pure function of experiment, instance, folder and interpreter; every value is shell-quoted.

One template serves single runs, arrays and local runs; function.sbatch.j2 takes its parts for a user's own function.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc.errors import UserError
from hpc.experiment import Experiment, validate
from hpc.filling import Options, Raw, fill
from hpc.instances import Instance, Request
from hpc.rundir import RunDir
from hpc.sections import bindable, on_node
from hpc.settings import Launch
from hpc.sweepdir import Chunk, SweepDir

_NOTICE_S = 120
_DEAF = 'trap "" HUP TERM INT USR2'
"""Ranks ignore stop signals until Python has its own handlers: one that comes earlier must not kill them."""


def render(experiment: Experiment, instance: Instance, run: RunDir, python: str) -> str:
    """The batch script of a run. Raises UserError for a value that the text cannot carry, or a faulty own template."""
    context = _run_context([experiment], instance, run.path, run.code, python)
    options = _options(experiment.name, run.name, instance, experiment.launch) | {
        "output": _slurm_path(run.output(task="0")),
        "error": _slurm_path(run.output(task="0", stream="err")),
    }
    return fill(instance, context | {"run": run.path, "array": None, "slurm_job": "%j"}, options)


def render_array(
    experiments: Sequence[Experiment], instance: Instance, sweep: SweepDir, chunk: Chunk, python: str
) -> str:
    """The batch script of one array of a sweep: each task finds its row, and is that row's run from there on.

    The rows' experiments share name and launch section; a container sees the folders of all their data files.
    Locally HPC_ARRAY_TASK_ID names the task. Raises UserError, as `render`.
    """
    experiment = experiments[0]
    context = _run_context(experiments, instance, sweep.path, sweep.code, python)
    limit = f"%{chunk.parallel}" if chunk.parallel else ""
    options = _options(experiment.name, sweep.token(chunk.number), instance, experiment.launch) | {
        "array": f"0-{chunk.count - 1}{limit}",
        "output": _slurm_path(sweep.logs / "%A_%a_log.out"),
    }
    array = {"first": chunk.first, "rows_file": sweep.rows_file, "folder": sweep.path}
    return fill(instance, context | {"array": array, "slurm_job": "%A_%a"}, options)


def render_function(
    name: str,
    instance: Instance,
    launch: Launch,
    folder: Path,
    command: str,
    array: str | None,
    *,
    python: str = sys.executable,
    comment: str | None = None,
) -> str:
    """The batch script of a user's own function, with submitit's names for its outputs in `folder`.

    `command` is shell text (submitit's); `array` is sbatch's --array, or None. Raises UserError, as `render`.
    """
    from submitit.core.utils import JobPaths

    paths = JobPaths(folder)
    stdout, stderr = (_submitit_path(path, array) for path in (paths.stdout, paths.stderr))
    options = _options(name, comment, instance, launch)
    options |= {"array": array} if array else {}
    options |= {"output": stdout.replace("%t", "0"), "error": stderr.replace("%t", "0")}
    places = _places(instance, JobPaths.get_first_id_independent_folder(folder))
    context = _context(instance, launch, python, places)
    context |= {
        "command": Raw(" ".join([*_container_words(instance, context["request"], places), command])),
        "local_tasks": 1,  # submitit's local executor starts the script once for each task
        "stdout": stdout,
        "stderr": stderr,
    }
    return fill(instance, context, options, function=True)


def payload_python(instance: Instance, python: str) -> str:
    """Shell text of the interpreter that the ranks use: the container's, the venv's, or else `python`."""
    if instance.container:
        return shlex.quote(instance.container.python)
    return f"{on_node(instance.venv)}/bin/python" if instance.venv else shlex.quote(python)


def rank_shell(scratch: str | None = None) -> str:
    """Shell text of what each rank begins in; a scratch folder may have another name on each node."""
    own = [f"export HPC_SCRATCH={on_node(scratch)}"] if scratch and "$" in scratch else []
    text = "; ".join([_DEAF, *own, 'exec "$@"'])
    return f"sh -c {shlex.quote(text)} rank"


def notice_seconds(request: Request) -> int:
    """Warning before the time limit: two minutes, or half of a shorter limit."""
    return min(_NOTICE_S, request.time_s // 2)


def _run_context(
    experiments: Sequence[Experiment], instance: Instance, folder: Path, code: Path, python: str
) -> dict[str, Any]:
    data = dict.fromkeys(experiment.data.file for experiment in experiments)
    places = _places(instance, folder, *(Path(file).parent for file in data))
    context = _context(instance, experiments[0].launch, python, places, ("PYTHONPATH", "PYTHONSAFEPATH"))
    words = [
        *_container_words(instance, context["request"], places),
        rank_shell(instance.scratch),
        payload_python(instance, python),
    ]
    return {**context, "command": Raw(" ".join([*words, "-u", "-m", "jobs.run", '"$run"'])), "code": code}


def _context(
    instance: Instance, launch: Launch, python: str, places: list[str], variables: tuple[str, ...] = ()
) -> dict[str, Any]:
    request, container = instance.request(launch), instance.container
    passed = (*variables, *instance.environment)
    return {
        "instance": instance,
        "request": request,
        "python": python,
        "code": None,
        "notice_s": notice_seconds(request),
        "local_tasks": request.tasks_per_node,
        "local_obstacle": instance.local_obstacle,
        "srun_options": [Raw(word) for word in (container.srun_words(places, passed) if container else [])],
        "container_environment": passed if container and container.engine == "apptainer" else (),
        "output": _output,
    }


def _places(instance: Instance, *folders: Path) -> list[str]:
    """What the container sees of the file system without being asked."""
    if not instance.container:
        return []
    return list(dict.fromkeys([*map(bindable, folders), *([instance.scratch] if instance.scratch else [])]))


def _container_words(instance: Instance, request: Request, places: list[str]) -> list[str]:
    return instance.container.command_words(request.gpus, places) if instance.container else []


def _output(job: str, task: str = "%t", stream: str = "out") -> Raw:
    """A log's name inside the run folder."""
    run = RunDir("/")
    return Raw(run.output(job, task, stream).relative_to(run.path))


def _options(name: str, comment: str | None, instance: Instance, launch: Launch) -> Options:
    request = instance.request(launch)
    gres = ":".join(part for part in ("gpu", instance.gpu_type, str(request.gpus)) if part)
    minutes, rest = divmod(request.time_s, 60)
    options: Options = {
        "job-name": name,
        "comment": comment,
        "nodes": request.nodes,
        "ntasks-per-node": request.tasks_per_node,
        "cpus-per-task": request.cpus_per_task,
        "mem": f"{round(request.mem_gb * 1000)}M",
        "time": f"{minutes}:{rest:02d}",
        "gres": gres if request.gpus else None,
        "partition": launch.partition or instance.partition,
        "account": launch.account,
        "qos": launch.qos,
        "reservation": launch.reservation,
        "constraint": launch.constraint,
        "mail-user": launch.mail,
        "mail-type": "END,FAIL,REQUEUE" if launch.mail else None,
    }
    chosen = {key: value for key, value in options.items() if value is not None}
    return {
        **chosen,
        **instance.sbatch,
        "signal": f"USR2@{notice_seconds(request)}",
        "requeue": None,
        "open-mode": "append",
    }


def _slurm_path(path: Path) -> str:
    """A path in which only the file name's %j and %t are SLURM's."""
    return f"{str(path.parent).replace('%', '%%')}/{path.name}"


def _submitit_path(path: Path, array: str | None) -> str:
    """submitit's path of a log, with SLURM's names for an array's tasks; its folder may hold %j, %t, %A and %a."""
    text = re.sub(r"%(?![jtAa])", "%%", str(path))
    return text.replace("%j", "%A_%a") if array else text


def check(instance: Instance) -> list[str]:
    """Faults of the instance's own template, as a run and as an array; empty when there are none."""
    launch = {"instance": instance.name, "cluster": "slurm"}
    values = {"name": "sample", "model": {"name": "resnet3d"}, "data": {"file": "/data/scans.h5"}, "launch": launch}
    sample, place = validate(values, "sample"), Path("/runs/sample-00000000")
    found: list[str] = []
    for array in (False, True):
        try:
            if array:
                render_array([sample], instance, SweepDir(place), Chunk(0, 0, 2), sys.executable)
            else:
                render(sample, instance, RunDir(place), sys.executable)
        except UserError as error:
            found += [line for line in str(error).splitlines() if line not in found]
    return found
