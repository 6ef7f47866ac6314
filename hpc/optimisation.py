"""What an experiment's file says of its optimisation: optimizer, learning rate, stages, averages, and an early end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hpc.errors import nearest
from hpc.settings import Positive, Section

Beta = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]

OPTIMIZERS = ("adam", "adamw", "sgd")
TIMM = "timm:"
"""Before the name of one of timm.optim (jobs/optimize.py knows which)."""


class Optimizer(Section):
    """torch.optim's Adam, AdamW or SGD (with Nesterov momentum), or one of timm.optim's."""

    name: str = "adamw"
    """adam, adamw, sgd, or timm:NAME."""
    lr: Rate = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of weights; biases and normalisation layers are not decayed."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    momentum: Beta = 0.9
    options: dict[str, Any] = {}
    """Of timm:NAME."""

    @property
    def timm(self) -> str | None:
        """The name in timm.optim."""
        return self.name.removeprefix(TIMM) if self.name.startswith(TIMM) else None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in OPTIMIZERS and not name.startswith(TIMM):
            raise ValueError(f"is no optimizer; {nearest(name, [*OPTIMIZERS, f'{TIMM}NAME'])}")
        return name

    @model_validator(mode="after")
    def _check(self) -> Optimizer:
        kind = f"{TIMM}NAME" if self.timm is not None else self.name
        self._refuse_idle(kind, {"betas": {"adam", "adamw"}, "momentum": {"sgd"}, "options": {f"{TIMM}NAME"}})
        return self


class Scheduler(Section):
    """The learning rate as a share of the highest: a function of the step, and of the metrics under plateau."""

    name: Literal["constant", "step", "exponential", "cosine", "poly", "one_cycle", "plateau"] = "constant"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Linear rise from 0."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last rate as a share of the highest; the least one under plateau."""
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of one epoch (exponential: 0.9) or of a stair (step: 0.1)."""
    step_size: Positive | None = None
    """Epochs of a stair."""
    milestones: tuple[Positive, ...] = ()
    """Or the epochs after which the rate falls, of the stage."""
    power: Annotated[float, Field(gt=0)] = 0.9
    """(1 - share done) ** power, as nnU-Net."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of the rate, after more than `patience` epochs in a row in which `metric` got no better."""
    patience: Count = 10
    cooldown: Count = 0
    """Epochs after a fall that are not counted."""
    threshold: Annotated[float, Field(ge=0)] = 1e-4
    """What counts as better, relative to the best."""
    metric: str | None = None
    """Of the validation; None: that of train.monitor."""

    @model_validator(mode="after")
    def _check(self) -> Scheduler:
        idle = {
            "final": {"cosine", "one_cycle", "plateau"},
            "gamma": {"exponential", "step"},
            "warmup_epochs": {"constant", "step", "exponential", "cosine", "poly", "plateau"},
            "power": {"poly"},
        }
        idle |= {option: {"step"} for option in ("step_size", "milestones")}
        idle |= {option: {"plateau"} for option in ("factor", "patience", "cooldown", "threshold", "metric")}
        self._refuse_idle(self.name, idle)
        if self.name == "step" and (self.step_size is None) == (not self.milestones):
            raise ValueError("step needs one of step_size and milestones, for example step_size: 30")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {list(self.milestones)} must rise")
        return self

    def idle_fault(self, epochs: int) -> str | None:
        """The sentence where an option has no effect in a stage of so many epochs, or None."""
        if self.warmup_epochs and self.warmup_epochs >= epochs:
            shorter = f"use less than {epochs}, or more epochs"
            return (
                f"warmup_epochs {self.warmup_epochs:g} is no shorter than the {epochs} epochs that it begins; {shorter}"
            )
        if self.milestones and self.milestones[-1] >= epochs:
            return f"milestones {list(self.milestones)} go past the end of {epochs} epochs; {_range(epochs)}"
        if self.step_size is not None and self.step_size >= epochs:
            return f"step_size {self.step_size} has no effect in {epochs} epochs; {_range(epochs)}"
        return None


def _range(epochs: int) -> str:
    return f"use 1 to {epochs - 1}" if epochs > 1 else "leave it out, or train for more epochs"


class Stage(Section):
    """Some epochs of a run with their own layers, rates and optimizer; what is not given is that of the run."""

    epochs: Positive
    freeze: Literal["backbone"] | tuple[str, ...] = ()
    """backbone (all but the classifier), or names of layers as far as a dot of theirs: [stem, blocks.0]."""
    lr: Rate | None = None
    backbone_lr: Rate | None = None
    layer_lrs: dict[str, Rate] = {}
    """By names as those of `freeze`; the longest that fits counts."""
    scheduler: Scheduler | None = None
    """It begins anew with the stage."""

    @field_validator("freeze", mode="before")
    @classmethod
    def _check_freeze(cls, freeze: Any) -> Any:
        if isinstance(freeze, str) and freeze != "backbone":
            raise ValueError(f"is backbone, or a list of names: [{freeze}]")
        return freeze

    @model_validator(mode="after")
    def _check(self) -> Stage:
        if self.freeze == "backbone" and self.backbone_lr is not None:
            raise ValueError("backbone_lr has no effect with freeze: backbone")
        return self


class Ema(Section):
    """An exponential moving average of the weights; it is what is evaluated."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class EarlyStopping(Section):
    """The end of a run whose metric got no better for `patience` epochs in a row (of the last stage)."""

    patience: Positive
    metric: str | None = None
    """Of the validation; None: that of train.monitor."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as better is more than this."""
