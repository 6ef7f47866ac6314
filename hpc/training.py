"""What an experiment's file says of its training: loss and loop, as typed data; hpc/optimisation.py has the rest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hpc.optimisation import EarlyStopping, Ema, Optimizer, Scheduler, Stage
from hpc.settings import Duration, Positive, Section


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
    """With stages: the sum of theirs."""
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
    stages: tuple[Stage, ...] = ()
    """One after another, each with an optimizer of its own; empty: the whole run is one."""
    ema: Ema | None = None
    early_stopping: EarlyStopping | None = None
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
        self._sum_epochs()
        return self

    def _sum_epochs(self) -> None:
        if not self.stages:
            return
        total = sum(stage.epochs for stage in self.stages)
        if "epochs" in self.model_fields_set and self.epochs != total:
            raise ValueError(f"epochs {self.epochs} is not the sum of the stages' ({total}): leave it out")
        object.__setattr__(self, "epochs", total)
