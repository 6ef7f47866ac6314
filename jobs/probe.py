"""One way to compute a step, timed on a model of its own: what train.autotune compares (jobs/autotune.py)."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hpc.experiment import Experiment
from hpc.preempt import BrokenOff
from jobs import acceleration
from jobs.choice import Choice
from jobs.precision import Precision
from jobs.setup import Parts
from jobs.tasks.contract import Task
from models3d import takes

_TIMED, _MOST_TIMED = 3, 10
"""Passes that are timed after the first: at least, at most."""
_TIMED_S = 4.0
_HOPELESS = 1.5
"""Times the best so far: no more passes then."""


@dataclass(frozen=True)
class Measured:
    """What came of a choice on this rank."""

    seconds: float = 0.0
    """Median of a forward and backward pass."""
    first_s: float = 0.0
    """Of the first pass, compilation in it."""
    loss: float = 0.0
    norm: float = 0.0
    """Of the gradients."""
    fault: str = ""
    """Why it is nothing; empty: it works."""


class Probe:
    """Passes over one batch: the model has the run's first weights, and no random layer (dropout) takes part.

    Each choice has a model of its own, so that of the run and its optimizer know nothing of it. Random numbers are as
    before afterwards; torch's use of TF32 is set by whoever makes the next Precision.
    """

    def __init__(
        self,
        experiment: Experiment,
        parts: Parts,
        task: Task,
        inputs: Tensor,
        targets: Tensor,
        deterministic: bool,
        window: Callable[[], AbstractContextManager[object]] = nullcontext,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """inputs (B, C, *spatial), targets: what one pass of a step gets; window: around all passes of a choice, which
        may break them off.
        """
        self._experiment, self._parts, self._task = experiment, parts, task
        self._inputs, self._targets, self._deterministic, self._clock = inputs, targets, deterministic, clock
        self._window = window
        self._devices = [inputs.device] if inputs.device.type == "cuda" else []

    @property
    def takes_checkpoint(self) -> bool:
        return "checkpoint" in takes(self._experiment.model.name)

    def model(self, choice: Choice) -> nn.Module:
        """A fresh one, in training mode but for what is random."""
        experiment, device = choice.put_into(self._experiment), self._inputs.device
        options = {**self._parts.model_options, **experiment.model.options}
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(experiment.train.seed)
            built = replace(self._parts, model_options=options).build_model(experiment.model.name, self._deterministic)
        model = acceleration.accelerate(built.to(device).train(), experiment.train, device)
        for module in model.modules():
            if "drop" in type(module).__name__.lower():
                module.eval()
        return model

    def measure(self, choice: Choice, best_s: float | None = None) -> Measured:
        """Never raises for what a choice cannot do."""
        try:
            with self._window():
                return self._measure(choice, best_s)
        except BrokenOff:
            return Measured(fault="broken off by a stop")
        except torch.OutOfMemoryError:
            return Measured(fault="out of memory")
        except Exception as error:  # of a compiler, or of the model
            first = (str(error).strip().splitlines() or [""])[0]
            return Measured(fault=f"fails: {type(error).__name__}: {first[:200]}")
        finally:
            self._clear(choice)

    def _clear(self, choice: Choice) -> None:
        gc.collect()
        if choice.compile != "off":
            torch._dynamo.reset()
        if self._inputs.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, choice: Choice, best_s: float | None) -> Measured:
        strict: AbstractContextManager[object] = nullcontext() if choice.compile == "off" else _strictly()
        with torch.random.fork_rng(self._devices), strict:
            model = self.model(choice)
            precision = Precision(choice.put_into(self._experiment).train, self._inputs.device)
            if precision.scaler:
                precision.scaler.scale = 1.0  # a run finds its own; an overflow here would leave fp16 out
            first_s, loss = self._timed(model, precision, choice)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            precision.unscale(gradients)
            norm = float(torch.nn.utils.get_total_norm(gradients))
            taken: list[float] = []
            while len(taken) < _TIMED or (len(taken) < _MOST_TIMED and sum(taken) < _TIMED_S):
                model.zero_grad(set_to_none=True)
                taken.append(self._timed(model, precision, choice)[0])
                if best_s is not None and min(taken) > _HOPELESS * best_s:
                    break
        return Measured(statistics.median(taken), first_s, loss, norm)

    def _timed(self, model: nn.Module, precision: Precision, choice: Choice) -> tuple[float, float]:
        """Seconds and loss of a pass."""
        self._synchronize()
        started = self._clock()
        inputs = acceleration.channels_last(self._inputs) if choice.channels_last else self._inputs
        with precision.autocast():
            outputs = model(inputs)
        loss = self._task.loss(outputs, self._targets)
        torch.autograd.backward(precision.scale(loss))
        self._synchronize()
        return self._clock() - started, float(loss.detach())

    def _synchronize(self) -> None:
        if self._inputs.device.type == "cuda":
            torch.cuda.synchronize(self._inputs.device)

    def graphs(self) -> dict[str, int]:
        """Layers that each kind of compilation goes through: of blocks, those of one kind and input shape once."""
        model = self.model(Choice(threads=0))
        shapes: dict[tuple[object, ...], int] = {}
        hooks = []
        for block in acceleration.blocks(model):
            weights = tuple(tuple(parameter.shape) for parameter in block.parameters())

            def note(module: nn.Module, given: tuple[Tensor, ...], weights: tuple[object, ...] = weights) -> None:
                sizes = tuple(tuple(one.shape) for one in given if isinstance(one, Tensor))
                shapes[type(module), weights, sizes] = _leaves(module)

            hooks.append(block.register_forward_pre_hook(note))
        with torch.no_grad(), torch.random.fork_rng(self._devices), suppress(torch.OutOfMemoryError):
            model(self._inputs)
        return {"blocks": sum(shapes.values()), "model": _leaves(model)}


def _strictly() -> AbstractContextManager[object]:
    import torch._dynamo

    patched: AbstractContextManager[object] = torch._dynamo.config.patch(suppress_errors=False)
    return patched


def _leaves(module: nn.Module) -> int:
    return sum(1 for part in module.modules() if not any(True for _ in part.children()))
