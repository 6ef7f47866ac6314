"""What an experiment's file says of model, data and launch, as typed data; hpc/training.py has the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hpc import units

Duration = Annotated[int, BeforeValidator(units.seconds)]
Gigabytes = Annotated[float, BeforeValidator(units.gigabytes)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the file: unknown keys are refused; frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, no, on and off as true and false, and pydantic takes true for 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value is False and any("off" in get_args(one) for one in (annotation, *get_args(annotation))):
            return "off"
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("is no place for true or false, as which YAML reads yes, no, on and off")
        return value

    def _refuse_idle(self, choice: str, idle: dict[str, set[str]]) -> None:
        """An option that takes no effect under `choice` is refused, never swallowed."""
        for option, choices in idle.items():
            if getattr(self, option) != type(self).model_fields[option].default and choice not in choices:
                raise ValueError(f"{option} has no effect with {choice}; it belongs to {', '.join(sorted(choices))}")


WITH_WEIGHTS = ("timm:", "torchvision:", "smp:")


class Model(BaseModel):
    """`name`, `num_classes`, `pretrained` and `weights`; every other key goes to the model as an option."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    """A name of `hpc models`, timm:NAME, torchvision:NAME, smp:NAME, monai:CLASS, or file:PATH.py:CLASS."""
    num_classes: Annotated[int, Field(ge=1)] | None = None
    """None: as many as the data file has."""
    weights: str | None = None
    """A file to start from: .safetensors, or a .pt that holds tensors alone."""
    weights_match: Literal["name", "order"] = "name"
    """order: entries of the file under other names are taken one after the other, where all shapes fit."""
    pretrained: bool | str = False
    """Start from the library's weights, which must be in its cache (`hpc models NAME --fetch`); or from those of a tag.
    Of smp:NAME they are the encoder's."""

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.pretrained and not self.name.startswith(WITH_WEIGHTS):
            raise ValueError(
                f"pretrained has no effect with {self.name}: {', '.join(f'{p}NAME' for p in WITH_WEIGHTS)} have such "
                f"weights; model.weights takes a file"
            )
        if self.pretrained and self.weights:
            raise ValueError("pretrained and weights are both given; the run can start from one of them only")
        if self.weights_match != "name" and not self.weights:
            raise ValueError("weights_match has no effect without weights")
        return self

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
    """balanced: all classes equally often (of several labels and of label maps: by the rarest class that a sample has);
    weighted: by `weights`."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """How often a sample is drawn, by its class, relative to a class that is not named (1); 0 leaves a class out. Of
    several, the highest counts."""
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
