"""What changes the weights of a run: the stage it is in, that stage's optimizer and rates, and the weights' average.

Weights that are evaluated are the average where there is one (train.ema), else those that are trained: in every
validation, in the best checkpoint, and wherever a checkpoint is read for its model. Skipped steps do not enter it.
At its first step a stage gets a new optimizer: what the old one knew of other layers at other rates does not go on. The
average goes on, and the layers that a stage freezes keep their weights and, where they have any, running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hpc.experiment import Experiment
from hpc.metrics import DIRECTIONS
from jobs import acceleration, history, rates, strategies
from jobs.checkpoint import Checkpoint
from jobs.ema import Ema
from jobs.engine import Engine
from jobs.layers import Layers, resolve
from jobs.optimize import build_optimizer
from jobs.passes import make_passes
from jobs.precision import Precision
from jobs.saving import estimated_bytes
from jobs.stages import Stages
from jobs.tasks.contract import Task
from jobs.update import Updater


class Learner:
    """Of one rank; all ranks have the same one, and change it together."""

    def __init__(
        self, experiment: Experiment, engine: Engine, model: nn.Module, task: Task, steps_per_epoch: int
    ) -> None:
        """To be `started` or `restore`d before anything else. Raises UserError for what the model does not have."""
        self._experiment, self._train, self._engine = experiment, experiment.train, engine
        self.model, self._task, self._per_epoch = model, task, steps_per_epoch
        self.stages = Stages(self._train, steps_per_epoch)
        self.strategy = strategies.make_strategy(self._train, engine, model)
        self._layers = resolve_all(experiment, self.stages, model)
        self.ema = Ema(self._train.ema, model) if self._train.ema else None
        self._history: list[dict[str, Any]] = []
        self.precision = Precision(self._train, engine.device)
        self._begun = False
        self.checkpoint_bytes = self._checkpoint_bytes()
        """Of the large files of a checkpoint, in the stage with the largest ones."""

    def _begin(self, number: int) -> None:
        if not self._begun:
            self.strategy.shard(*([self.model, self.ema.model] if self.ema else [self.model]))
        self._begun, self.number = True, number
        stage, layers = self.stages[number], self._layers[number]
        self._lr = stage.lr or self._train.optimizer.lr
        self._scheduler = stage.scheduler or self._train.scheduler
        self._share = rates.share(self._scheduler, self.stages.steps(number), self._per_epoch)
        self._follow()
        self._fresh = True
        self.strategy.begin(partial(self._build, layers))
        self._highest = [group["lr"] for group in self.strategy.optimizer.param_groups]
        held = (self._train, self._engine, self.strategy, self.precision)
        self.passes = make_passes(*held, self.model, self._task, self.evaluated, layers.norms)
        self.update = Updater(self.strategy, self.passes, self._rates, self._train.clip_norm, self._average)

    def _build(self, layers: Layers) -> Optimizer:
        layers.freeze(self.model)
        return build_optimizer(self._train.optimizer, self.model, layers.rates)

    def _average(self) -> None:
        if self.ema:
            self.ema.update()

    def enter_due(self, step: int) -> bool:
        """Begin the stage that the step after `step` others belongs to; False where it is under way."""
        if (due := self.stages.at(step)) == self.number:
            return False
        self._begin(due)
        return True

    def begun(self) -> bool:
        """Whether this is the first step of a stage, in this attempt; asked once for each step."""
        begun, self._fresh = self._fresh, False
        return begun

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated."""
        return self.ema.model if self.ema else self.model

    def started(self) -> None:
        """The model has its first weights."""
        if self.ema:
            self.ema.restart()
        self._begin(0)

    # Rates, and what follows from the metrics.

    def rate(self, step: int) -> float:
        """The rate of the stage's layers that have none of their own, at the step after `step` others."""
        return self._lr * self._share_at(step)

    def _rates(self, step: int) -> list[float]:
        """Of each of the optimizer's groups."""
        share = self._share_at(step)
        return [highest * share for highest in self._highest]

    def _share_at(self, step: int) -> float:
        return self._share(step - self.stages.first_step(self.number)) * self._factor

    def _metric(self, named: str | None) -> tuple[str, history.Direction]:
        metric = named or self._experiment.monitor
        return metric, DIRECTIONS[self._experiment.task][metric]

    def _watched(self) -> set[str]:
        """Metrics that something follows from."""
        schedulers = [self.stages[number].scheduler or self._train.scheduler for number in range(len(self.stages))]
        named = [scheduler.metric for scheduler in schedulers if scheduler.name == "plateau"]
        named += [self._train.early_stopping.metric] if self._train.early_stopping else []
        return {self._metric(name)[0] for name in named}

    def _values(self, metric: str, number: int) -> list[float]:
        """Of the evaluations in a stage, in order; not of those where the metric is undefined."""
        first, last = self.stages.first_epoch(number), self.stages.first_epoch(number) + self.stages[number].epochs
        values = [line[metric] for line in self._history if first < line["epoch"] <= last]
        return [value for value in values if metric == "loss" or not math.isnan(value)]

    def judged(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """After the validation of an epoch."""
        if watched := self._watched():
            self._history.append({"epoch": epoch, **{name: metrics[name] for name in sorted(watched)}})
            self._follow()

    def _follow(self) -> None:
        self._factor = 1.0
        if self._scheduler.name == "plateau":
            metric, direction = self._metric(self._scheduler.metric)
            self._factor = history.plateau(self._scheduler, direction, self._values(metric, self.number))

    @property
    def ended_early(self) -> dict[str, Any] | None:
        """Why the run is over before its last epoch, for its result; None where it is not.

        The epochs of the last stage count: those before it go on to their ends.
        """
        settings, last = self._train.early_stopping, len(self.stages) - 1
        if settings is None:
            return None
        metric, direction = self._metric(settings.metric)
        waited = history.without_gain(settings, direction, self._values(metric, last))
        if waited < settings.patience or self._history[-1]["epoch"] >= self._train.epochs:
            return None
        return {"metric": metric, "epochs_without_gain": waited, "planned_epochs": self._train.epochs}

    # What a checkpoint holds of it.

    def weights(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]:
        """Those that are evaluated, and those that are trained where they are others; of all ranks together."""
        trained = self.strategy.weights(self.model)
        return (self.strategy.weights(self.ema.model), trained) if self.ema else (trained, None)

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        updates = self.ema.updates if self.ema else 0
        found = {"stage": self.number, "history": list(self._history), "averaged": updates}
        return {**found, "precision": self.precision.state()}

    def restore(self, found: Checkpoint) -> None:
        """All of it as it was when the checkpoint was saved."""
        state = found.state().get("learner", {})
        self._history = list(state.get("history", []))
        number = int(state.get("stage", 0))
        if not self._begun or number != self.number:
            self._begin(number)
        self._follow()
        self.strategy.load_weights(self.model, found.trained())
        self.strategy.load_optimizer_state(found.optimizer())
        acceleration.lay_out_state(self.strategy.optimizer)
        self.precision.load(state.get("precision", {}))
        if self.ema:
            self.strategy.load_weights(self.ema.model, found.model())
            self.ema.updates = int(state.get("averaged", 0))

    def _checkpoint_bytes(self) -> list[int]:
        optimizers = [build_optimizer(self._train.optimizer, self.model, layers.rates) for layers in self._layers]
        sizes = [estimated_bytes(self.model, optimizer) for optimizer in optimizers]
        weights, moments = (max(column) for column in zip(*sizes, strict=True))
        return [weights, moments, *([weights] if self.ema else [])]


def resolve_all(experiment: Experiment, stages: Stages, model: nn.Module) -> list[Layers]:
    """The layers of each stage. Raises UserError for what the model does not have."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    lr = experiment.train.optimizer.lr
    return [resolve(stages[n], stages.where(n), model, lr, trained) for n in range(len(stages))]


def check(experiment: Experiment, model: nn.Module) -> list[str]:
    """What each stage trains, a line each. Raises UserError where model or optimizer are not as the file says."""
    strategies.check(experiment.train, model)
    stages, parameters = Stages(experiment.train, 1), dict(model.named_parameters())
    lines = []
    for number, layers in enumerate(resolve_all(experiment, stages, model)):
        build_optimizer(experiment.train.optimizer, model, layers.rates)
        count, epochs = sum(parameters[name].numel() for name in layers.rates), stages[number].epochs
        speeds = ", ".join(f"{rate:g}" for rate in sorted({*layers.rates.values()}))
        word = "epoch" if epochs == 1 else "epochs"
        lines.append(f"stage {number}: {epochs} {word}, {count:,} parameters trained at {speeds}")
    return lines if stages.named else []
