"""What an experiment's file says of its training: loss and loop, as typed data; hpc/optimisation.py has the rest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hpc.optimisation import Count, EarlyStopping, Ema, Optimizer, Scheduler, Stage
from hpc.settings import Duration, Positive, Section

LOSSES: dict[str, dict[str, set[str]]] = {
    "classification": {"cross_entropy": {"class_weights", "label_smoothing"}, "focal": {"class_weights", "gamma"}},
    "multilabel": {
        "bce": {"pos_weight"},
        "weighted_bce": set(),
        "focal": {"alpha", "gamma"},
        "focal_bce": {"alpha", "gamma"},
    },
    "segmentation": {
        "dice_ce": {"class_weights", "label_smoothing", "ignore", "include_background"},
        "cross_entropy": {"class_weights", "label_smoothing", "ignore", "include_background"},
        "dice": {"ignore", "include_background"},
        "focal": {"class_weights", "gamma", "ignore", "include_background"},
    },
}
"""task -> loss -> the options that take effect; the first loss is the default."""

MOST_PROFILED = 100
"""Steps of a trace, which is held in memory until it is written."""

Weights = Literal["balanced"] | list[float] | None


class Loss(Section):
    """What is made small (jobs/tasks/): the mean of the samples' losses, each of which is its own."""

    name: Literal["cross_entropy", "focal", "bce", "weighted_bce", "focal_bce", "dice", "dice_ce"] | None = None
    """None: cross_entropy, bce or dice_ce, as the task is. dice_ce: nnU-Net's sum; weighted_bce: both terms of a label
    by the inverse of how often they occur in the training split."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Weights = None
    """balanced: inverse frequency in the training split; or one weight per class, 0 to leave one out."""
    pos_weight: Weights = None
    """Weight of the positive term of each label; balanced: negatives / positives in the training split."""
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """Of the focal loss (Lin et al., arXiv 1708.02002): 0 is cross entropy."""
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Weight of the positive term in the focal loss of labels, 1 - alpha that of the negative; None: both 1."""
    ignore: tuple[str, ...] = ()
    """Classes whose voxels neither loss nor metrics look at, as 255 in a label map."""
    include_background: bool = False
    """Whether Dice, loss and metric, counts the first class as well."""

    @field_validator("class_weights", "pos_weight")
    @classmethod
    def _check_weights(cls, weights: Any) -> Any:
        if isinstance(weights, list) and not (all(weight >= 0 for weight in weights) and any(weights)):
            raise ValueError(f"{weights} are no weights: finite numbers of 0 or more, not all 0")
        return weights

    def of_task(self, task: str) -> str:
        """The loss's name, with the task's default. Raises ValueError for what the task does not have."""
        losses = LOSSES[task]
        name: str = self.name or next(iter(losses))
        if name not in losses:
            raise ValueError(f"train.loss.name {name} is no loss of task {task}; use {', '.join(losses)}")
        for option in sorted(set().union(*(options for known in LOSSES.values() for options in known.values()))):
            if getattr(self, option) != type(self).model_fields[option].default and option not in losses[name]:
                raise ValueError(self._idle(option, task, name))
        return name

    @staticmethod
    def _idle(option: str, task: str, name: str) -> str:
        fits = [loss for loss, options in LOSSES[task].items() if option in options]
        fits = fits or [f"task {other}" for other, known in LOSSES.items() if any(option in o for o in known.values())]
        return f"train.loss.{option} has no effect with {name} of task {task}; it belongs to {', '.join(fits)}"


class Zero(Section):
    """DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054): what is kept in shards, and where."""

    stage: Literal[1, 2, 3] = 2
    """1: the optimizer's state; 2: gradients too; 3: weights too."""
    offload: bool = False
    """Optimizer state in the node's memory, and its step on the CPU."""


class Train(Section):
    epochs: Positive = 10
    """With stages: the sum of theirs."""
    limit_steps: Positive | None = None
    """At most so many steps of each epoch, and batches of its validation: for a short try."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "auto"] = "fp32"
    """bf16, fp16: autocast of the forward pass, fp16 with a loss scaler; tf32: matrix products of fp32 with 10 bits of
    mantissa, on CUDA; auto: what train.autotune finds. Weights and optimizer stay fp32."""
    channels_last: bool = False
    """Channels beside each other in memory: faster for convolutions alone, slower with InstanceNorm."""
    compile: Literal["off", "blocks", "model"] = "off"
    """By torch.compile: blocks, the repeated ones of a model, each kind once; model: as a whole."""
    autotune: bool = False
    """At the start of a run, up to 60 s are spent on trying layout, compilation, activation checkpointing and threads;
    the fastest is kept for the whole run."""
    strategy: Literal["single", "ddp", "fsdp", "deepspeed"] = "ddp"
    """Of several tasks: ddp, all of the model on each; fsdp (torch's fully_shard) and deepspeed (ZeRO): in shards."""
    zero: Zero | None = None
    """Of deepspeed."""
    sync_batchnorm: bool = False
    """BatchNorm over the samples of all ranks."""
    profile: tuple[Count, Count] | None = None
    """Steps [start, stop), from 0 over the whole run, of which a torch profiler trace is written, for TensorBoard."""
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
    monitor: str | None = None
    """The validation metric that names the best checkpoint; None: accuracy, map or dice, as the task is."""
    checkpoint_every: Duration = 300
    """Wall-clock time between saves."""
    keep: Positive = 2
    """Newest verified checkpoints kept beside the best."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Epochs: the checkpoint at the end of each such epoch is kept for good; 0 for none."""
    hang_after: Duration = 60
    """A rank silent for longer than this and ten times its slow steps (their 99th percentile) is ended as hung."""
    figures: Literal["all", "few"] = "all"
    """few: of the best evaluation its confusion matrix and the curves alone, for sweeps of many short runs."""
    stage_logs: Literal["off"] | Duration = "off"
    """Events wait on the node's own disk (as of data.stage: node) and are copied every so often, and at each save."""
    ledger: bool = False
    """Record what each step did (samples, pixels, loss, weights), to compare runs step by step: see hpc drill."""

    @model_validator(mode="after")
    def _check(self) -> Train:
        self._refuse_idle(self.deterministic, {"virtual_ranks": {"layout"}})
        self._refuse_idle(self.strategy, {"zero": {"deepspeed"}})
        self._check_speed()
        self._sum_epochs()
        self._check_schedulers()
        return self

    def _check_speed(self) -> None:
        if self.precision == "tf32" and self.device == "cpu":
            raise ValueError("precision tf32 has no effect on device cpu; use fp32, or bf16")
        if self.precision == "auto" and not self.autotune:
            raise ValueError("precision auto is what train.autotune finds: add train.autotune=true")
        if self.deterministic == "layout" and self.strategy in ("fsdp", "deepspeed"):
            raise ValueError(f"deterministic: layout is there for single and ddp, not for {self.strategy}; use run")
        if self.deterministic == "layout" and self.sync_batchnorm:
            raise ValueError("sync_batchnorm has statistics of the layout, which deterministic: layout excludes")
        self._check_shards()
        if self.profile and self.profile[0] >= self.profile[1]:
            raise ValueError(f"profile {list(self.profile)} must be [start, stop) with start before stop")
        if self.profile and self.profile[1] - self.profile[0] > MOST_PROFILED:
            start = self.profile[0]
            raise ValueError(
                f"profile {list(self.profile)} traces {self.profile[1] - start} steps, up to some MB each: trace "
                f"{MOST_PROFILED} at most, [{start}, {start + MOST_PROFILED}]"
            )

    def _check_shards(self) -> None:
        """What needs whole weights on each rank is refused where they are held in shards."""
        if self.strategy in ("fsdp", "deepspeed") and self.optimizer.timm is not None:
            whole = f"optimizer {self.optimizer.name} may look at whole weights, of which {self.strategy} holds shards"
            raise ValueError(f"{whole}; use adamw, adam or sgd, or strategy ddp")
        if self.zero and self.zero.stage == 3 and self.ema:
            raise ValueError("ema needs whole weights, which zero.stage: 3 does not hold; use stage 2, or fsdp")
        if self.zero and self.zero.stage == 3 and (len(self.stages) > 1 or any(stage.freeze for stage in self.stages)):
            raise ValueError("stages: zero.stage: 3 trains all layers in one stage; use zero.stage: 2, or fsdp")

    def metrics(self) -> dict[str, str]:
        """Those that the rate and the end of the run follow, by their keys in the file."""
        named = {"train.scheduler": self.scheduler.metric}
        named |= {f"train.stages.{n}.scheduler": s.scheduler.metric for n, s in enumerate(self.stages) if s.scheduler}
        named["train.early_stopping"] = self.early_stopping.metric if self.early_stopping else None
        return {f"{key}.metric": metric for key, metric in named.items() if metric is not None}

    def _sum_epochs(self) -> None:
        if not self.stages:
            return
        total = sum(stage.epochs for stage in self.stages)
        if "epochs" in self.model_fields_set and self.epochs != total:
            out = "leave it out, or take it back with train.epochs=null where a base has it"
            raise ValueError(f"epochs {self.epochs} is not the sum of the stages' ({total}): {out}")
        object.__setattr__(self, "epochs", total)

    def _check_schedulers(self) -> None:
        """A schedule that ends after its stage is none that was asked for."""
        rows = [(f"stages.{n}.", stage.scheduler, stage.epochs) for n, stage in enumerate(self.stages)] or [
            ("", None, self.epochs)
        ]
        for where, own, epochs in rows:
            if fault := (own or self.scheduler).idle_fault(epochs):
                of_run = where and not own and f" (of {where[:-1]}: give it a scheduler of its own)"
                raise ValueError(f"{where if own else ''}scheduler.{fault}{of_run or ''}")
