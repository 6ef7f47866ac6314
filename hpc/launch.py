"""Launcher: a user's own functions as jobs, by submitit's API: single jobs and arrays, on SLURM or here.

    from hpc.launch import Launcher
    launcher = Launcher("logs", instance="cedia-a100-40gb", time="2h")
    job = launcher.submit(train, 1e-3)                   # job.result(), job.stderr(), job.cancel()
    jobs = launcher.map_array(train, [1e-3, 3e-4, 1e-4])

It is a submitit executor: `submitit.AutoExecutor("logs", cluster="hpc", hpc_instance="laptop")` makes the same one.
What is submitted is our template's text, checked against the instance before anything is written.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from submitit.core.core import Job, PicklingExecutor
from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmExecutor

from hpc import instances, slurm, template
from hpc.errors import UserError, nearest
from hpc.functions import payload
from hpc.functions.submit import Files, submit_local, submit_slurm
from hpc.instances import Instance, Request
from hpc.settings import Launch
from hpc.submission import choose_cluster
from hpc.sweep import cut
from hpc.sweepdir import Chunk

_OURS = {name for name in Launch.model_fields if name not in ("instance", "cluster")}
_NAMES = _OURS | {"name", "array_parallelism", "cpus_per_task"}
_SUBMITIT = {
    "timeout_min": "time",
    "mem_gb": "mem",
    "gpus_per_node": "gpus",
    "ntasks_per_node": "tasks_per_node",
    "job_name": "name",
    "mail_user": "mail",
}
_PREFIX = "slurm_"
_PLACEHOLDERS = ("%j", "%t", "%A", "%a")


class _AnyName(set[str]):
    """Lets every name of the form hpc_NAME through AutoExecutor to our own check, which offers the nearest one.

    It lists none: AutoExecutor would take the listed ones for its own everywhere, and send an unprefixed `partition`
    of a job for submitit's SLURM executor to this one.
    """

    def __contains__(self, name: object) -> bool:
        return True


class Launcher(SlurmExecutor):
    """A submitit executor that renders our templates, for single jobs and arrays alike.

    Args:
        folder: where scripts, pickles and output go; on SLURM one that all nodes see.
        instance: what the jobs run on (`hpc instances`); a request that does not fit it is refused.
        cluster: "slurm", "local" (this machine, in the background), or "auto": SLURM where sbatch answers.
        max_num_timeout: how often a function with `checkpoint()` is started again after its time limit.
        max_pickle_size_gb: the most that the arguments of one submission may take on disk, estimated from the first.
        python: shell text of the interpreter; default: the instance's, else this one.
        launch: the first `update_parameters`.

    Raises:
        UserError: for an unknown instance, name or value.
    """

    def __init__(
        self,
        folder: str | Path,
        instance: str = "laptop",
        cluster: str = "auto",
        *,
        max_num_timeout: int = 3,
        max_pickle_size_gb: float = 1.0,
        python: str | None = None,
        **launch: Any,
    ) -> None:
        # Not SlurmExecutor's: it wants srun on PATH.
        PicklingExecutor.__init__(self, folder, max_num_timeout, max_pickle_size_gb)
        if found := [text for text in _PLACEHOLDERS if text in str(self.folder)]:
            raise UserError(f"folder {str(folder)!r}: {found[0]} is not filled in; the files in it carry the job's id")
        if cluster not in ("auto", "slurm", "local"):
            raise UserError(f"cluster {cluster!r} is not known; {nearest(cluster, ['auto', 'slurm', 'local'])}")
        self.instance: Instance = instances.find(instance)
        self.cluster = cluster
        self.python = python or template.payload_python(self.instance, sys.executable)
        self.update_parameters(**launch)

    @classmethod
    def name(cls) -> str:
        return "hpc"

    @classmethod
    def affinity(cls) -> int:
        """0: AutoExecutor takes it only when asked for."""
        return 0

    @classmethod
    def _valid_parameters(cls) -> set[str]:
        return _AnyName()

    def _convert_parameters(self, params: dict[str, Any]) -> dict[str, Any]:
        return params  # _internal_update_parameters knows submitit's names

    def _internal_update_parameters(self, **given: Any) -> None:
        """`update_parameters`: the names of an experiment's launch section, submitit's, and submitit's with slurm_.

        Sizes per node; `array_parallelism` caps the tasks of one map_array that run at a time; None takes a
        parameter back. Raises UserError with one line per fault; nothing is changed then.
        """
        parameters = dict(self.parameters)
        faults = []
        for name, value in given.items():
            if name == "stderr_to_stdout" and value is False:
                continue  # as it is here
            try:
                key, value = _translate(name, value)
            except UserError as error:
                faults.append(str(error))
                continue
            for replaced in {"cpus": ("cpus_per_task",), "cpus_per_task": ("cpus",)}.get(key, ()):
                parameters.pop(replaced, None)
            parameters[key] = value
        parameters = {key: value for key, value in parameters.items() if value is not None}
        if faults:
            raise UserError("\n".join(faults))
        _launch(self.instance, parameters)
        self.parameters.clear()  # in place: AutoExecutor shares it
        self.parameters.update(parameters)

    def _num_tasks(self) -> int:
        return self._request().world_size

    def _request(self) -> Request:
        """What a job asks for. Raises UserError where it does not fit the instance."""
        request = self.instance.request(_launch(self.instance, self.parameters))
        if refusals := self.instance.check(request):
            raise UserError("\n".join(refusal.removeprefix("launch.") for refusal in refusals))
        return request

    @property
    def _submitit_command_str(self) -> str:
        own = [path for path in map(os.path.abspath, sys.path) if not path.startswith((sys.prefix, sys.base_prefix))]
        folders = [path for path in dict.fromkeys(own) if Path(path).is_dir()]
        words = [str(self.folder), "--path", os.pathsep.join(folders)]
        return f"{template.rank_shell()} {self.python} -u -m hpc.functions.step {shlex.join(words)}"

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text(command, None, uid)

    def _text(self, command: str, array: str | None, token: str | None = None) -> str:
        launch = _launch(self.instance, self.parameters)
        name = self.parameters.get("name", "function")
        return template.render_function(name, self.instance, launch, self.folder, command, array, comment=token)

    def script(self, count: int = 1) -> str:
        """The text that a submission of so many tasks gives to sbatch (of several chunks the first). Raises UserError.

        A submission adds its token as --comment; of several chunks each is held until all are accepted.
        """
        if count < 1:
            raise UserError(f"script({count}): a submission has one task or more; script() is that of a single job")
        self._request()
        chunk = self._chunks(count, choose_cluster(self.cluster))[0]
        return self._text(self._submitit_command_str, None if count == 1 else _array(chunk))

    def _chunks(self, count: int, cluster: str) -> list[Chunk]:
        try:
            limit = int(slurm.config()["MaxArraySize"]) if cluster == "slurm" and count > 1 else count
        except slurm.SlurmError as error:
            raise UserError(str(error)) from None
        if not limit:
            raise UserError("this cluster takes no arrays (its MaxArraySize is 0); use submit() for each task")
        return cut(count, limit, self.parameters.get("array_parallelism"))

    def _internal_process_submissions(self, delayed_submissions: Sequence[DelayedSubmission]) -> list[Job[Any]]:
        """Submit one job, or an array of several in as many chunks as the cluster needs; all of them or none.

        Raises UserError with the words of the refusal; no file and no job is left then.
        """
        request = self._request()
        cluster = choose_cluster(self.cluster)
        chunks = self._chunks(len(delayed_submissions), cluster)
        single = len(delayed_submissions) == 1
        files = Files(self.folder)
        texts = [
            self._text(self._submitit_command_str, None if single else _array(chunk), files.token(chunk.number))
            for chunk in chunks
        ]
        slots = self._slots(request) if cluster == "local" else []
        self._check_size(delayed_submissions)
        for submission in delayed_submissions:
            submission.set_timeout(math.ceil(request.time_s / 60), self.max_num_timeout)
        with files:
            for chunk, text in zip(chunks, texts, strict=True):
                files.write(delayed_submissions[chunk.first : chunk.first + chunk.count], not single, text)
            if cluster == "local":
                return list(submit_local(files, request, slots, None if single else chunks[0].count))
            return list(submit_slurm(files, chunks, request, single))

    def _slots(self, request: Request) -> list[str]:
        """CUDA_VISIBLE_DEVICES of each task that may run here at a time."""
        if request.nodes > 1:
            raise UserError(f"nodes: {request.nodes} asked, and this machine is one; ask for 1, or use cluster='slurm'")
        if self.instance.local_obstacle:
            raise UserError(self.instance.local_obstacle)
        count = max(1, len(os.sched_getaffinity(0)) // request.cpus)
        count = min(count, self.parameters.get("array_parallelism", count))
        if not request.gpus:
            return [""] * count
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(number) for number in range(self.instance.gpus)]
        count = max(1, min(count, len(gpus) // request.gpus))
        return [",".join(gpus[slot * request.gpus : (slot + 1) * request.gpus]) for slot in range(count)]

    def _check_size(self, submissions: Sequence[DelayedSubmission]) -> None:
        """submitit's estimate by the first of them, for arrays, too. Raises UserError."""
        try:
            size_gb = payload.size(submissions[0]) / 1e9
        except Exception as error:
            raise UserError(f"the function or its arguments cannot be pickled: {error}") from error
        count = len(submissions)
        if count * size_gb > self.max_pickle_size_gb:
            raise UserError(
                f"about {count * size_gb:.2g} GB of pickled functions and arguments ({count} x {size_gb:.2g} GB), "
                f"and max_pickle_size_gb is {self.max_pickle_size_gb:g}; pass paths of files, or raise it"
            )


def _array(chunk: Chunk) -> str:
    cap = f"%{chunk.parallel}" if chunk.parallel else ""
    return f"0-{chunk.count - 1}{cap}"


def _translate(name: str, value: Any) -> tuple[str, Any]:
    """The parameter under our name, a time in seconds. Raises UserError for an unknown name or an unfit value."""
    plain = name.removeprefix(_PREFIX)
    key = _SUBMITIT.get(plain, plain)
    if key not in _NAMES:
        raise UserError(f"{name}: no such parameter; {nearest(plain, {*_NAMES, *_SUBMITIT})}")
    if value is None:
        return key, None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if plain == "timeout_min" or name == f"{_PREFIX}time":
        if not number or value <= 0:
            raise UserError(f"{name}: {value!r} is no number of minutes above zero; or write time='8h'")
        return key, max(1, round(value * 60))
    if key == "time" and number:
        raise UserError(f"time: {value!r} has no unit; write time='{value:g}min', or timeout_min={value:g}")
    if key in ("cpus_per_task", "array_parallelism") and (not isinstance(value, int) or not number or value < 1):
        raise UserError(f"{name}: {value!r} is no whole number above zero")
    if key == "name" and not isinstance(value, str):
        raise UserError(f"{name}: {value!r} is no text")
    return key, value


def _launch(instance: Instance, parameters: dict[str, Any]) -> Launch:
    """Raises UserError with one line per fault."""
    values = {key: value for key, value in parameters.items() if key in _OURS}
    try:
        launch = Launch.model_validate(values)
        if cores := parameters.get("cpus_per_task"):
            launch = launch.model_copy(update={"cpus": cores * instance.request(launch).tasks_per_node})
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'][:1]))}: {fault['msg'].removeprefix('Value error, ')}"
            f" (got {fault['input']!r})"
            for fault in error.errors()
        ]
        raise UserError("\n".join(faults)) from None
    return launch
