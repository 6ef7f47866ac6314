"""The experiment: one small YAML file as typed data, with `base:`, overrides `a.b=c` and the delta from the base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hpc import units, yamlfile
from hpc.errors import UserError, nearest

Duration = Annotated[int, BeforeValidator(units.seconds)]
Gigabytes = Annotated[float, BeforeValidator(units.gigabytes)]
Positive = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the file: unknown keys are refused; frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, no, on and off as true and false, and pydantic takes true for 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value is False and "off" in get_args(annotation):
            return "off"
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("is no place for true or false, as which YAML reads yes, no, on and off")
        return value

    def _refuse_idle(self, choice: str, idle: dict[str, set[str]]) -> None:
        """An option that takes no effect under `choice` is refused, never swallowed."""
        for option, choices in idle.items():
            if getattr(self, option) != type(self).model_fields[option].default and choice not in choices:
                raise ValueError(f"{option} has no effect with {choice}; it belongs to {', '.join(sorted(choices))}")


class Model(BaseModel):
    """`name`, `num_classes` and `weights`; every other key goes to the model as an option."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    """A name of `hpc models`, timm:NAME, torchvision:NAME, or file:PATH.py:CLASS."""
    num_classes: Annotated[int, Field(ge=1)] | None = None
    """None: as many as the data file has."""
    weights: str | None = None
    """A file to start from: .safetensors, or a .pt that holds tensors alone."""

    @property
    def source(self) -> tuple[Path, str] | None:
        """(path, attribute) of file:PATH.py:CLASS."""
        if not self.name.startswith("file:"):
            return None
        path, _, attribute = self.name.removeprefix("file:").rpartition(":")
        return Path(path), attribute

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Data(Section):
    """Where the samples come from and how they are drawn."""

    file: str
    """The HDF5 file of `hpc pack`."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Of a file packed with --folds: the validation of this run; the other folds are its training."""
    batch_size: Positive = 8
    """Global: of one optimizer step, over all ranks and accumulated parts."""
    sampler: Literal["uniform", "balanced", "weighted"] = "uniform"
    """balanced: all classes equally often; weighted: by `weights`."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """How often a sample is drawn, by its class, relative to a class that is not named (1); 0 leaves a class out."""
    views: Positive = 1
    """An epoch has each training sample so many times, each time augmented anew, from another patch."""
    patch: Annotated[list[Positive], Field(min_length=2, max_length=3)] | None = None
    """Voxels along each axis: train on random boxes of this size, validate on the centre of each volume."""
    foreground: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training patches that hold a voxel of a class other than the first."""
    augment: dict[str, Any] = {}
    """Options of datasets.augment.Augment; empty for none."""
    threads: Annotated[int, Field(ge=0)] = 2
    """Reading threads of each rank; 0: the training's own."""
    stage: Literal["none", "node"] = "none"
    """node: each node copies the file to its own scratch space first, and removes it at the end."""
    verify: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the training samples whose checksum is compared as they are read; a patch's sample is read whole for it.
    None: as many that 1 of 64 bytes is compared."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """skip: another sample of the same class in place of one that is damaged or cannot be read; counted in the log."""

    @model_validator(mode="after")
    def _check(self) -> Data:
        if bool(self.weights) != (self.sampler == "weighted"):
            raise ValueError("weights belong to sampler: weighted, which needs them, for example weights: {rare: 5}")
        if self.foreground and self.patch is None:
            raise ValueError("foreground has no effect without patch: whole volumes hold all of it")
        return self


class Optimizer(Section):
    """torch.optim's Adam, AdamW or SGD (with Nesterov momentum)."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    @model_validator(mode="after")
    def _check(self) -> Optimizer:
        self._refuse_idle(self.name, {"betas": {"adam", "adamw"}, "momentum": {"sgd"}})
        return self


class Scheduler(Section):
    """The learning rate as a function of the step alone (jobs/optimize.py)."""

    name: Literal["constant", "cosine", "exponential", "one_cycle"] = "constant"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Linear rise from 0."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last rate as a share of the highest."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Factor of one epoch."""

    @model_validator(mode="after")
    def _check(self) -> Scheduler:
        warm = {"constant", "cosine", "exponential"}
        idle = {"final": {"cosine", "one_cycle"}, "gamma": {"exponential"}, "warmup_epochs": warm}
        self._refuse_idle(self.name, idle)
        return self


class Loss(Section):
    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Literal["balanced"] | list[float] | None = None
    """balanced: inverse frequency in the training split; or one weight per class, 0 to leave one out."""

    @field_validator("class_weights")
    @classmethod
    def _check_weights(cls, weights: Any) -> Any:
        if isinstance(weights, list) and not (all(weight >= 0 for weight in weights) and any(weights)):
            raise ValueError(f"{weights} are no weights: finite numbers of 0 or more, not all 0")
        return weights


class Train(Section):
    epochs: Positive = 10
    limit_steps: Positive | None = None
    """At most so many steps of each epoch, and batches of its validation: for a short try."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward pass; weights and optimizer stay fp32."""
    strategy: Literal["single", "ddp"] = "ddp"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where the allocation has a GPU (one that torch cannot see is a bad node), else the CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    loss: Loss = Loss()
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    accumulate: Positive = 1
    """Parts in which a rank works off its share of a batch."""
    deterministic: Literal["auto", "off", "run", "layout"] = "auto"
    """run: a run stopped anywhere and resumed ends bit-identical; layout: on any number of ranks that divides
    virtual_ranks, too; auto: run on the CPU, off on CUDA."""
    virtual_ranks: Positive = 4
    """Under `deterministic: layout`, the parts (a power of two) in which each batch is worked off, whoever does it."""
    monitor: Literal["accuracy", "balanced_accuracy", "f1_macro", "loss"] = "accuracy"
    """The validation metric that names the best checkpoint."""
    checkpoint_every: Duration = 300
    """Wall-clock time between saves."""
    keep: Positive = 2
    """Newest verified checkpoints kept beside the best."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Epochs: the checkpoint at the end of each such epoch is kept for good; 0 for none."""
    hang_after: Duration = 60
    """A rank silent for longer than this and ten times its slow steps (their 99th percentile) is ended as hung."""
    ledger: bool = False
    """Record what each step did (samples, pixels, loss, weights), to compare runs step by step: see hpc drill."""

    @model_validator(mode="after")
    def _check(self) -> Train:
        self._refuse_idle(self.deterministic, {"virtual_ranks": {"layout"}})
        return self


class Budgets(Section):
    """Restarts after each kind of failure without a new checkpoint between; preemptions are free."""

    crash: Annotated[int, Field(ge=0)] = 3
    hang: Annotated[int, Field(ge=0)] = 3
    memory: Annotated[int, Field(ge=0)] = 3
    storage: Annotated[int, Field(ge=0)] = 3
    node: Annotated[int, Field(ge=0)] = 3


class Launch(Section):
    """The request; what is not given is what the instance offers."""

    instance: str = "laptop"
    cluster: Literal["auto", "slurm", "local"] = "auto"
    nodes: Positive = 1
    gpus: Annotated[int, Field(ge=0)] | None = None
    """Per node, one task each."""
    tasks_per_node: Positive | None = None
    """None: one per GPU, or one on a node without."""
    cpus: Positive | None = None
    """Per node."""
    mem: Gigabytes | None = None
    """Per node."""
    time: Duration | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    mail: str | None = None
    budgets: Budgets = Budgets()


class Experiment(Section):
    name: str
    task: Literal["classification"] = "classification"
    model: Model
    data: Data
    train: Train = Train()
    launch: Launch = Launch()

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
            raise ValueError("must be 1 to 80 letters, digits, '.', '_' or '-', and start with a letter or digit")
        return name

    @model_validator(mode="after")
    def _check_batch(self) -> Experiment:
        if fault := self.batch_fault(tasks=1):
            raise ValueError(fault)
        return self

    def batch_fault(self, tasks: int) -> str | None:
        """The sentence where the global batch does not divide by the tasks of a run and the parts of each, or None."""
        size, parts = self.data.batch_size, self.train.accumulate
        if self.train.deterministic == "layout":
            return self._layout_fault(tasks)
        if size % (tasks * parts) == 0:
            return None
        by = " x ".join([f"{tasks} tasks"] * (tasks > 1) + [f"train.accumulate {parts}"] * (parts > 1))
        return f"data.batch_size {size} does not divide by {by}; use a multiple of {tasks * parts}"

    def _layout_fault(self, tasks: int) -> str | None:
        size, virtual = self.data.batch_size, self.train.virtual_ranks
        if virtual & (virtual - 1):
            return f"train.virtual_ranks {virtual} is no power of two; use {1 << virtual.bit_length()}"
        if self.train.accumulate > 1:
            return "train.accumulate has no effect with train.deterministic=layout: virtual_ranks are its parts"
        if size % virtual:
            return f"data.batch_size {size} does not divide by train.virtual_ranks {virtual}"
        if virtual % tasks:
            sizes = ", ".join(str(1 << power) for power in range(virtual.bit_length()))
            return f"train.virtual_ranks {virtual} does not divide by {tasks} tasks; use one of {sizes} tasks"
        return None

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def is_duration(key: str) -> bool:
    """Whether a dotted key takes a time, in which a colon parts hours from minutes."""
    section: type[BaseModel] | None = Experiment
    *sections, last = key.split(".")
    for name in sections:
        field = section.model_fields.get(name) if section else None
        section = field.annotation if field and isinstance(field.annotation, type) else None
    hints = get_type_hints(section, include_extras=True) if section else {}
    return Duration in (hints.get(last), *get_args(hints.get(last)))


def validate(values: dict[str, Any], origin: str) -> Experiment:
    """The experiment in `values`. Raises UserError with one line per fault, with the nearest valid name."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        lines = [f"{origin}: {_sentence(fault)}" for fault in error.errors()]
        raise UserError("\n".join(lines)) from None


def _sentence(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"] if "[" not in str(part))  # list[float]: a branch of a union
    if fault["type"] == "extra_forbidden":
        section = _section(fault["loc"][:-1])
        return f"{path}: no such key; {nearest(str(fault['loc'][-1]), section.model_fields)}"
    if fault["type"] == "missing":
        return f"{path}: is missing"
    if fault["type"] == "model_type":
        return f"{path}: is a section, 'key: value' lines (got {fault['input']!r})"
    message = fault["msg"].removeprefix("Value error, ")
    given = fault["input"]
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{path}: {message}{shown}" if path else f"{message}{shown}"


def _section(loc: tuple[Any, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Experiment
    for key in loc:
        section = section.model_fields[key].annotation  # type: ignore[assignment]
    return section


class Source:
    """An experiment's file and its base, read once; any number of variants are resolved from it."""

    def __init__(self, path: Path) -> None:
        """Raises UserError."""
        self._path = path
        self._values, base = _read_layers(path, ())
        reference = base if base is not None else self._values
        self._before = flatten(validate(reference, str(path)).as_dict()) if _complete(reference) else {}

    def resolve(self, overrides: Sequence[str] = ()) -> tuple[Experiment, dict[str, Any]]:
        """The experiment with `overrides` (a.b=c), and its delta: what differs from the base, {dotted key: value}.

        Without `base:` the delta is what the overrides change. Raises UserError.
        """
        final = _merge(self._values, {})
        # Another model drops the options of the old one, not those that were asked for with it.
        for override in sorted(overrides, key=lambda text: not text.startswith("model.name=")):
            _apply(final, override)
        experiment = validate(final, str(self._path))
        after = flatten(experiment.as_dict())
        before = self._before
        if before.get("model.name") != after["model.name"]:  # the options of another model are no difference
            before = {key: value for key, value in before.items() if not key.startswith("model.") or key in after}
        keys = sorted(after.keys() | before.keys())
        return experiment, {key: after.get(key) for key in keys if after.get(key) != before.get(key)}


def load(path: Path, overrides: Sequence[str] | None = None) -> tuple[Experiment, dict[str, Any]]:
    """The resolved experiment of a YAML file, and its delta. Raises UserError."""
    return Source(path).resolve(overrides or ())


def _complete(values: dict[str, Any]) -> bool:
    """A base may be a fragment that is no experiment by itself."""
    return all(key in values for key in ("name", "model", "data"))


def _read_layers(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    path = path.resolve()
    if path in above:
        raise UserError(f"{path}: base: goes in a circle: {' -> '.join(p.name for p in (*above, path))}")
    values = yamlfile.read(path)
    base_name = values.pop("base", None)
    _resolve_paths(values, path.parent)
    if base_name is None:
        return _merge(values, {}), None
    if not isinstance(base_name, str):
        raise UserError(f"{path}: base: must be the path of another experiment (got {base_name!r})")
    base, _ = _read_layers(Path(_absolute(path.parent, base_name)), (*above, path))
    return _merge(base, values), base


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    data, model = values.get("data"), values.get("model")
    if isinstance(data, dict) and isinstance(data.get("file"), str):
        data["file"] = _absolute(folder, data["file"])
    if isinstance(model, dict) and isinstance(model.get("weights"), str):
        model["weights"] = _absolute(folder, model["weights"])
    if isinstance(model, dict) and isinstance(model.get("name"), str) and model["name"].startswith("file:"):
        file, _, attribute = model["name"].removeprefix("file:").rpartition(":")
        if not file or not attribute:
            raise UserError(f"model.name {model['name']!r}: write file:PATH.py:CLASS")
        model["name"] = f"file:{_absolute(folder, file)}:{attribute}"


def _absolute(folder: Path, text: str) -> str:
    try:
        return str((folder / Path(text).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # ~nobody, a NUL, a circle of links
        raise UserError(f"{text!r} is not a path: {error}") from None


def _merge(low: dict[str, Any], high: dict[str, Any], path: str = "") -> dict[str, Any]:
    """`high` over `low`; null takes a key back to its default; another model drops the options of the old one."""
    given = {key: value for key, value in low.items() if value is not None}
    merged = {key: _merge(value, {}) if isinstance(value, dict) else value for key, value in given.items()}
    for key, value in high.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            mine = merged.get(key)
            below = mine if isinstance(mine, dict) else {}
            if path + key == "model" and value.get("name", below.get("name")) != below.get("name"):
                below = {}
            merged[key] = _merge(below, value, f"{path}{key}.")
        else:
            merged[key] = value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"{override!r} is no override; write train.epochs=20")
    change: Any = yamlfile.parse(text, override)
    for part in reversed(key.split(".")):
        change = {part: change}
    _resolve_paths(change, Path.cwd())
    merged = _merge(values, change)
    values.clear()
    values.update(merged)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
