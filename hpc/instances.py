"""What one allocation offers, from YAML; `check(request)` answers in sentences when a request does not fit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

import slurm_templates
from hpc import yamlfile
from hpc.errors import UserError, nearest
from hpc.sections import Container, Environment, NodePath, SbatchOptions, Text, Word
from hpc.settings import Duration, Gigabytes, Launch
from hpc.units import slurm_time

_SHIPPED = Path(slurm_templates.__file__).parent / "instances"


def _cores(value: Any) -> Any:
    return len(os.sched_getaffinity(0)) if value == "auto" else value


def _memory(value: Any) -> Any:
    if value != "auto":
        return value
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


@dataclass(frozen=True)
class Request:
    """What a run asks of each node, after the instance filled what the experiment left open."""

    nodes: int
    tasks_per_node: int
    cpus: int
    """Per node."""
    mem_gb: float
    """Decimal GB per node: SLURM's nodes of '64 GB' have 64000 MB, not 65536."""
    gpus: int
    """Per node."""
    time_s: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def cpus_per_task(self) -> int:
        return self.cpus // self.tasks_per_node


class Tflops(BaseModel):
    """Peak of one GPU's matrix products by precision, in TFLOP/s without sparsity, as the maker gives it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fp32: Annotated[float, Field(gt=0)] | None = None
    tf32: Annotated[float, Field(gt=0)] | None = None
    bf16: Annotated[float, Field(gt=0)] | None = None
    fp16: Annotated[float, Field(gt=0)] | None = None

    def of(self, precision: str) -> float | None:
        """None where it is not known."""
        found: float | None = getattr(self, precision, None)
        return found


class Instance(BaseModel):
    """One kind of allocation. `auto` for cpus and mem_gb means this machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    cpus: Annotated[int, BeforeValidator(_cores), Field(ge=1)]
    """Per node."""
    mem_gb: Annotated[Gigabytes, BeforeValidator(_memory)]
    """Decimal GB per node."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """Per node."""
    gpu_type: str | None = None
    """SLURM's GRES type: --gres=gpu:TYPE:N."""
    gpu_mem_gb: Gigabytes | None = None
    gpu_tflops: Tflops | None = None
    gpu_bandwidth_gb_s: Annotated[float, Field(gt=0)] | None = None
    """Peak of one GPU's memory, decimal GB/s."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """The most that one job may have."""
    time_limit: Duration
    partition: str | None = None
    modules: list[Word] = []
    """`module load` of each, before all that follows."""
    venv: NodePath | None = None
    """Activated; its Python runs the payload."""
    container: Container | None = None
    environment: Environment = {}
    """Exported to every task."""
    scratch: NodePath | None = None
    """Node-local folder, exported as HPC_SCRATCH; a node without it is a bad node."""
    scratch_gb: Gigabytes | None = None
    """Free space that a job needs there."""
    prologue: list[Text] = []
    """Shell lines before the attempt."""
    epilogue: list[Text] = []
    """Shell lines after the ranks have ended, before the script decides what follows."""
    sbatch: SbatchOptions = {}
    """Further options of sbatch: {exclusive: , licenses: matlab:1}."""
    template: Path | None = None
    """The user's own template, beside the instance's file."""

    @model_validator(mode="after")
    def _check_sections(self) -> Instance:
        if self.venv and self.container:
            raise ValueError("venv has no effect with a container, whose own 'python' runs the payload; leave one out")
        if self.scratch_gb and not self.scratch:
            raise ValueError("scratch_gb has no effect without scratch, the folder it is asked of")
        return self

    @property
    def local_obstacle(self) -> str | None:
        """Why a local run cannot have this instance, in a sentence; None when it can."""
        if self.container and self.container.engine == "pyxis":
            return f"{self.name}: a pyxis container has no local form (srun makes it); use cluster slurm or apptainer"
        return None

    def request(self, launch: Launch) -> Request:
        """The launch section with the gaps filled from this instance."""
        gpus = launch.gpus if launch.gpus is not None else self.gpus
        tasks = launch.tasks_per_node or max(1, gpus)
        cpus = launch.cpus or max(self.cpus - self.cpus % tasks, tasks)
        time_s = launch.time or self.time_limit
        return Request(launch.nodes, tasks, cpus, launch.mem or self.mem_gb, gpus, time_s)

    def check(self, request: Request) -> list[str]:
        """One sentence per refusal: which number, which limit, what would fit. Empty when it fits."""
        limits: list[tuple[str, float, float, str]] = [
            ("nodes", request.nodes, self.nodes, ""),
            ("cpus", request.cpus, self.cpus, " cores per node"),
            ("mem", request.mem_gb, self.mem_gb, " GB per node"),
            ("gpus", request.gpus, self.gpus, " per node"),
        ]
        refusals = [
            f"launch.{key}: {asked:g}{unit} asked, but {self.name} has {limit:g}; ask for {limit:g} or less"
            for key, asked, limit, unit in limits
            if asked > limit
        ]
        if request.time_s > self.time_limit:
            limit = slurm_time(self.time_limit)
            refusals.append(
                f"launch.time: {slurm_time(request.time_s)} asked, but {self.name} ends a job after {limit}; "
                f"ask for {limit} or less"
            )
        if request.cpus % request.tasks_per_node:
            tasks = request.tasks_per_node
            fits = max(request.cpus // tasks, 1) * tasks
            refusals.append(
                f"launch.cpus: {request.cpus} cores do not divide by {tasks} tasks per node; ask for {fits}"
            )
        if request.gpus and request.tasks_per_node != request.gpus:
            refusals.append(
                f"launch.tasks_per_node: {request.tasks_per_node} asked, but each of {request.gpus} GPUs is one task; "
                f"leave it out"
            )
        return refusals


def folders() -> list[Path]:
    """Where instances are looked for, the user's own first: HPC_INSTANCES, else ~/.config/hpc/instances; then ours."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    own = os.environ.get("HPC_INSTANCES")
    return [Path(own) if own else config / "hpc" / "instances", _SHIPPED]


def names() -> dict[str, Path]:
    """Every known instance and its file; the user's own hide ours of the same name."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else []:
            found.setdefault(path.stem, path)
    return found


def find(name: str) -> Instance:
    """The instance called `name`. Raises UserError for an unknown name or a fault in its file."""
    known = names()
    if name not in known:
        raise UserError(f"launch.instance {name!r} is not known; {nearest(name, known)} (see 'hpc instances')")
    return read(known[name])


def read(path: Path) -> Instance:
    """The instance in a file, over its `base:`. Raises UserError with one line per fault."""
    try:
        return Instance.model_validate({"name": path.stem, **_layers(path, ())})
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {_sentence(fault)}" for fault in error.errors())) from None


def _sentence(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    sections: dict[str, type[BaseModel]] = {"container": Container, "gpu_tflops": Tflops}
    valid = (sections.get(fault["loc"][0], Instance) if fault["loc"][1:] else Instance).model_fields
    hint = f"; {nearest(str(fault['loc'][-1]), valid)}" if fault["type"] == "extra_forbidden" else ""
    return f"{key}{': ' * bool(key)}{fault['msg'].removeprefix('Value error, ')}{hint}"


def _layers(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The file's values over those of its base: another instance, or one of the same name in the next folder."""
    values = yamlfile.read(path)
    if (name := values.pop("name", path.stem)) != path.stem:
        raise UserError(f"{path}: name: an instance is called as its file, {path.stem!r}, not {name!r}; leave name out")
    base = values.pop("base", None)
    if isinstance(values.get("template"), str):
        values["template"] = path.parent / values["template"]
    if base is None:
        return values
    above = (*above, path)
    found = [file for folder in folders() if (file := folder / f"{base}.yaml") not in above and file.is_file()]
    if not found:
        others = {name for name, file in names().items() if file not in above}
        raise UserError(f"{path}: base: {base!r} is not known; {nearest(str(base), others)}")
    return {**_layers(found[0], above), **values}
