"""What a site fills in an instance's YAML without touching a template: container, extra `#SBATCH` lines, paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hpc.errors import UserError, nearest

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HIDING = {"--cleanenv", "-e", "--containall", "-C"}
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")

OWNED = {
    "account": "launch.account",
    "array": "'hpc sweep'",
    "comment": "hpc itself (the token of a submission)",
    "constraint": "launch.constraint",
    "cpus-per-task": "launch.cpus",
    "error": "hpc itself (the logs of a run)",
    "gpus": "launch.gpus",
    "gpus-per-node": "launch.gpus",
    "gres": "launch.gpus and the instance's gpu_type",
    "job-name": "the experiment's name",
    "mail-type": "launch.mail",
    "mail-user": "launch.mail",
    "mem": "launch.mem",
    "no-requeue": "hpc itself (a preempted run comes back)",
    "nodes": "launch.nodes",
    "ntasks": "launch.tasks_per_node",
    "ntasks-per-node": "launch.tasks_per_node",
    "open-mode": "hpc itself (attempts follow each other in a log)",
    "output": "hpc itself (the logs of a run)",
    "partition": "launch.partition or the instance's partition",
    "qos": "launch.qos",
    "requeue": "hpc itself (a preempted run comes back)",
    "reservation": "launch.reservation",
    "signal": "hpc itself (notice of the time limit)",
    "time": "launch.time",
}
"""Options that the template sets, and who says what."""

EXTRA = frozenset(
    re.findall(
        r"\S+",
        """
    acctg-freq batch bb bbf begin chdir cluster-constraint clusters contiguous core-spec cores-per-socket cpu-freq
    cpus-per-gpu deadline delay-boot dependency distribution exclude exclusive export extra extra-node-info get-user-env
    gpu-bind gpu-freq gpus-per-socket gpus-per-task gres-flags hint hold input kill-on-invalid-dep licenses mcs-label
    mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill nodefile nodelist ntasks-per-core ntasks-per-gpu
    ntasks-per-socket overcommit oversubscribe power prefer priority profile propagate reboot resv-ports segment
    sockets-per-node spread-job stepmgr switches thread-spec threads-per-core time-min tmp tres-bind tres-per-task
    use-min-nodes wait-all-nodes wckey x11
    """,
    )
)
"""sbatch's other long options that may stand in a script (SLURM 22.05 to 25.05)."""

SHORT = {
    "A": "account",
    "C": "constraint",
    "D": "chdir",
    "G": "gpus",
    "H": "hold",
    "J": "job-name",
    "L": "licenses",
    "N": "nodes",
    "a": "array",
    "c": "cpus-per-task",
    "d": "dependency",
    "e": "error",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "t": "time",
    "w": "nodelist",
    "x": "exclude",
}
"""Letters of options, as people write them in scripts."""

_OF_THE_SCRIPT = {
    *(
        "attempt",
        "child",
        "code",
        "last",
        "next",
        "noticed",
        "profile",
        "prologue",
        "python",
        "row",
        "run",
        "task",
        "told",
    ),
}
_OF_THE_CODE = ("PYTHONPATH", "PYTHONSAFEPATH")


def one_line(text: str) -> str:
    """Raises ValueError for a line break or control character: no path, name or option has one."""
    if _CONTROL.search(text):
        raise ValueError(f"{text!r} carries a line break or control character; write one line")
    return text


def _path(text: str) -> str:
    if not text.startswith(("/", "~", "$")):
        raise ValueError(f"{text!r} must start with '/', '~' or a variable: jobs do not start in this folder")
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError(f"{text!r}: nobody here is called so; write the whole path") from None


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError(f"{text!r} has a NUL, which no variable can hold")
    return text


def _number_as_text(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value} is no text; put quotes around yes, no, on, off, true and false")
    return str(value) if isinstance(value, int | float) else value


def _free_names(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if name in _OF_THE_SCRIPT:
            raise ValueError(f"{name} is a variable of the batch script itself; choose another name")
        if name in _OF_THE_CODE:
            raise ValueError(f"{name} leads to the run's own copy of the code; add to it in the prologue")
        if name.startswith(("HPC_", "SLURM_")):
            raise ValueError(f"{name} is set by {'hpc' if name.startswith('HPC_') else 'SLURM'} itself; leave it out")
    return variables


def _option_value(value: Any) -> str | None:
    if value is None or value is True:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is no value of an option; write text or a number, or nothing for a bare option")
    return one_line(str(value))


def _known_options(options: dict[str, str | None]) -> dict[str, str | None]:
    for key in options:
        if key in OWNED:
            raise ValueError(f"{key} is set by {OWNED[key]}, not here")
        if key not in EXTRA:
            raise ValueError(f"--{key} is no option of sbatch; {nearest(key, EXTRA)}")
    return options


Line = Annotated[str, AfterValidator(one_line)]
Text = Annotated[str, AfterValidator(_no_nul)]
"""Line breaks and all."""
Environment = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")],
        Annotated[str, BeforeValidator(_number_as_text), AfterValidator(_no_nul)],
    ],
    AfterValidator(_free_names),
]
"""Variables and their values; those that a run stands on are refused."""
NodePath = Annotated[str, Field(min_length=1), AfterValidator(one_line), AfterValidator(_path)]
"""A path on the node: absolute, `~`, or with variables ($TMPDIR, ${USER}) that are expanded there."""
Word = Annotated[str, Field(min_length=1, pattern=r"^[^-]"), AfterValidator(one_line)]
"""An argument that must not be taken for an option."""
SbatchOptions = Annotated[
    dict[str, Annotated[str | None, BeforeValidator(_option_value)]], AfterValidator(_known_options)
]


class Container(BaseModel):
    """The image that the ranks run in; the batch shell and its own Python stay outside."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Literal["apptainer", "pyxis"]
    image: Word
    """apptainer: a .sif file or folder; pyxis: a .sqsh file or registry#image."""
    mounts: list[Word] = []
    """SOURCE or SOURCE:TARGET[:flags]; the run's folder and the data file's are there without asking."""
    options: list[Line] = []
    """Further arguments of `apptainer exec`, or of srun with pyxis (--container-...)."""
    python: Word = "python3"
    """The interpreter inside."""

    @model_validator(mode="after")
    def _check_options(self) -> Container:
        hiding = _HIDING & set(self.options) if self.engine == "apptainer" else ()
        for option in sorted(hiding):
            raise ValueError(f"{option} would hide the run's own variables from its ranks; leave it out")
        return self

    def command_words(self, gpus: int, places: Sequence[str]) -> list[str]:
        """Shell words ahead of a rank's command; `places` are bound where they are."""
        if self.engine != "apptainer":
            return []
        binds = [word for mount in (*places, *self.mounts) for word in ("--bind", on_node(mount))]
        options = [shlex.quote(option) for option in self.options]
        return ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, *options, on_node(self.image)]

    def srun_words(self, places: Sequence[str], variables: Iterable[str]) -> list[str]:
        """Shell words for srun; `variables` keep the batch shell's value where the image has one of its own."""
        if self.engine != "pyxis":
            return []
        mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in (*places, *self.mounts)]
        given = {"image": self.image, "mounts": ",".join(mounts), "env": ",".join(variables)}
        words = [f"--container-{key}={on_node(value)}" for key, value in given.items()]
        return words + [shlex.quote(option) for option in self.options]


def bindable(place: Path) -> str:
    """A folder as containers are given it. Raises UserError where its name would be read as more than a name."""
    text = str(place)
    if set(":,$") & set(text) or _CONTROL.search(text):
        raise UserError(
            f"{text!r} cannot be bound into a container: ':', ',', '$' and line breaks have a meaning there; move it"
        )
    return text


def on_node(text: str) -> str:
    """Shell text for `text`, all quoted but for $NAME and ${NAME}; a variable that is unset there ends the job."""
    parts = []
    position = 0
    for match in _VARIABLE.finditer(text):
        parts += [shlex.quote(text[position : match.start()])] if match.start() > position else []
        parts.append(f'"${{{match[1] or match[2]}:?is not set on this node}}"')
        position = match.end()
    parts += [shlex.quote(text[position:])] if position < len(text) or not parts else []
    return "".join(parts)
