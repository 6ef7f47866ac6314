"""`train.autotune`: before a run builds its model, find the fastest way to compute the same steps, within a minute.

The file's settings are where the search begins. In turn: precision (only under `auto`) x layout, checkpointing of the
model's activations, compilation of the best so far, threads of the loader. A choice must give the same loss and norm
of the gradient as the plain one on the same batch and weights. All ranks try the same together; the slowest counts.

The budget is kept by not beginning what is not expected to end in time: passes by the plain one's seconds, compilation
by a figure for each layer and device, corrected by the first compilation. Only a stop signal breaks off what is begun.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hpc.experiment import Experiment
from hpc.preempt import StopFlag
from hpc.rundir import RunDir
from jobs import acceleration
from jobs import choice as choices
from jobs.choice import Choice
from jobs.engine import Engine
from jobs.precision import Precision, emulates_bf16, say_idle
from jobs.probe import Measured, Probe
from jobs.setup import Parts, make_loaders
from jobs.tasks import make_task

_LOG = logging.getLogger(__name__)
BUDGET_S = 60.0
LIMIT_S = 1800.0
"""Silence that is no hang meanwhile."""
_COMPILE_S, _COMPILE_GPU_S = 1.5, 0.4
"""For each layer, on a CPU and on a GPU; 1.5: the seed's ResNet by blocks, 49 layers, in 75 to 83 s on two cores."""
_PASSES = 5
"""In whose time, of the plain choice, a candidate should be through."""
_GAIN = 0.97
"""Of the best one's seconds: what a choice must take at most to be taken instead."""
_LOADER_BATCHES, _LOADER_S = 16, 2.0
_TOLERANCE = {False: (1e-3, 1e-2), True: (3e-2, 1e-1)}
"""Of loss and norm of the gradients, relative; True: where either computes in half precision or TF32."""

Agree = Callable[[Sequence[int]], list[int]]


@dataclass
class Search:
    """The order of trying, for any measure; what it does is the same on all ranks by `agree` (their maximum)."""

    plain: Choice
    measure: Callable[[Choice, float | None], Measured]
    agree: Agree
    left: Callable[[], float]
    """Seconds of the budget."""
    compile_s: Callable[[str], float]
    """Expected, of a kind of compilation."""
    tried: list[dict[str, Any]] = field(default_factory=list)
    """A line for each, in order: choice, ms, first_s, outcome."""
    best: Choice | None = None
    best_s: float = math.inf
    _reference: Measured | None = None
    _compile_factor: float = 1.0

    def run(self, precisions: Sequence[str], checkpoint: bool) -> Choice | None:
        """The fastest; None where nothing works. checkpoint: whether the model has that option."""
        self._try(self.plain)
        if self._reference is None and checkpoint and not self.plain.checkpoint:
            self._try(replace(self.plain, checkpoint=True))
        if self.best is None:
            return None
        base = self.best
        for precision in precisions:
            for layout in (False, True):
                self._try(replace(base, precision=precision, channels_last=layout))
        if checkpoint and base == self.plain:
            self._try(replace(self.best, checkpoint=not self.best.checkpoint))
        eager = self.best
        for kind in ("blocks", "model"):
            self._try(replace(eager, compile=kind))
        return self.best

    def _expected(self, candidate: Choice) -> float:
        passes = 0.0 if self._reference is None else _PASSES * self._reference.seconds
        compiled = 0.0 if candidate.compile == "off" else self._compile_factor * self.compile_s(candidate.compile)
        return passes + compiled

    def _try(self, candidate: Choice) -> None:
        if any(line["choice"] == candidate for line in self.tried):
            return
        expected = self._expected(candidate)
        if self.agree([int(expected > self.left())])[0]:
            self._note(candidate, f"not begun: about {expected:.0f} s more than the rest of the budget would be needed")
            return
        found = self.measure(candidate, None if self.best is None else self.best_s)
        fault = found.fault or self._unlike(candidate, found)
        micro, first, bad = self.agree([int(1e6 * found.seconds), int(1e6 * found.first_s), int(bool(fault))])
        seconds = micro / 1e6
        if bad:
            self._note(candidate, fault or "fails on another rank", seconds, first / 1e6)
            return
        if self._reference is None:
            self._reference = replace(found, seconds=seconds)
        if candidate.compile != "off":
            self._compile_factor *= max(first / 1e6, 0.1) / max(self._expected(candidate), 0.1)
        self._note(candidate, "", seconds, first / 1e6)
        if self.best is None or seconds < _GAIN * self.best_s:
            self.best, self.best_s = candidate, seconds

    def _unlike(self, candidate: Choice, found: Measured) -> str:
        if not (math.isfinite(found.loss) and math.isfinite(found.norm)):
            return "loss or gradient is not finite"
        if (plain := self._reference) is None:
            return ""
        for_loss, for_norm = _TOLERANCE[candidate.precision != "fp32"]
        if abs(found.loss - plain.loss) > for_loss * max(abs(plain.loss), 1e-3):
            return f"loss {found.loss:.6g}, not {plain.loss:.6g}"
        if abs(found.norm - plain.norm) > for_norm * max(plain.norm, 1e-6):
            return f"gradient {found.norm:.6g}, not {plain.norm:.6g}"
        return ""

    def _note(self, candidate: Choice, outcome: str, seconds: float = 0.0, first_s: float = 0.0) -> None:
        line = {"choice": candidate, "ms": round(1e3 * seconds, 3), "first_s": round(first_s, 2), "outcome": outcome}
        self.tried.append(line)


def precisions(experiment: Experiment, device: torch.device) -> list[str]:
    """What is tried: the file's; under `auto` those of the device, fp32 first, with which the others are compared."""
    if experiment.train.precision != "auto":
        return [experiment.train.precision]
    if device.type != "cuda":
        return ["fp32"] if emulates_bf16(device) else ["fp32", "bf16"]
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return ["fp32", "tf32", half]


def settle(
    run: RunDir,
    experiment: Experiment,
    engine: Engine,
    parts: Parts,
    deterministic: bool,
    flag: StopFlag,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Experiment, Parts]:
    """Both with what was chosen for this run: by an earlier attempt, an earlier run of its like, or now.

    Called on every rank, before the model is built; nothing of the run is touched. A stop signal ends the search at
    once; nothing is remembered of it then, and the run has to stop before its first step. Raises UserError.
    """
    acceleration.use_cache(run, experiment.train)
    if experiment.train.autotune:
        experiment = _found(run, experiment, engine, parts, deterministic, flag, clock).put_into(experiment)
    say_idle(experiment.train, engine.device)
    return experiment, replace(parts, model_options=parts.model_options | experiment.model.options)


def _found(
    run: RunDir,
    experiment: Experiment,
    engine: Engine,
    parts: Parts,
    deterministic: bool,
    flag: StopFlag,
    clock: Callable[[], float],
) -> Choice:
    """The same on every rank."""
    started, key = clock(), _key(experiment, engine, parts)
    known, origin = _known(run, key) if engine.is_main else (None, 0)
    origin, *codes = engine.max([origin, *(known.codes() if known else [0] * len(Choice().codes()))])
    if origin:
        found = Choice.decode(codes)
        if engine.is_main:
            _LOG.info("autotune: %s, %s", found, _ORIGINS[origin])
            if origin == _CACHE:
                choices.remember(run, found, {"from": str(choices.cache_folder())})
        return found

    def left() -> float:
        return -1.0 if flag.cause else BUDGET_S - (clock() - started)

    tuner = _Tuner(experiment, engine, parts, deterministic, flag, left)
    found = tuner.run()
    if engine.max([int(flag.cause is not None)])[0]:
        return found
    about = {"tried": tuner.lines(), "seconds": round(clock() - started, 1), "from": "measured"}
    if engine.is_main:
        measured, found = found, choices.publish(key, found, about)
        about |= {} if found == measured else {"from": "another run, which measured at the same time"}
        choices.remember(run, found, about)
        _tell(found, about)
    return Choice.decode(engine.max(found.codes() if engine.is_main else [0] * len(found.codes())))


_RUN, _CACHE = 1, 2
_ORIGINS = {_RUN: "as this run has begun", _CACHE: "as measured before for this model, shape and machine"}


def _known(run: RunDir, key: dict[str, Any]) -> tuple[Choice | None, int]:
    if found := choices.recall(run):
        return found, _RUN
    found = choices.look_up(key)
    return found, _CACHE if found else 0


def _tell(found: Choice, about: dict[str, Any]) -> None:
    for line in about["tried"]:
        took = f"{line['ms']:10.2f} ms  first {line['first_s']:6.2f} s" if line["ms"] else " " * 30
        _LOG.info("autotune: %s  %s%s", took, line["what"], f"  ({line['outcome']})" if line["outcome"] else "")
    _LOG.info("autotune: %s, found in %.0f s", found, about["seconds"])


class _Tuner:
    """The search on this rank's share of a real batch."""

    def __init__(
        self,
        experiment: Experiment,
        engine: Engine,
        parts: Parts,
        deterministic: bool,
        flag: StopFlag,
        left: Callable[[], float],
    ) -> None:
        self._experiment, self._engine, self._parts, self._left = experiment, engine, parts, left
        self._deterministic, self._flag = deterministic, flag
        self.search: Search | None = None
        self._loaders: list[dict[str, Any]] = []

    def run(self) -> Choice:
        experiment, engine, start = self._experiment, self._engine, Choice.of(self._experiment)
        tried = precisions(experiment, engine.device)
        plain = replace(start, precision=tried[0], channels_last=False, compile="off")
        pieces, probe = self._probe(replace(start, precision=tried[0]).put_into(experiment))
        layers = probe.graphs()
        each = _COMPILE_S if engine.device.type == "cpu" else _COMPILE_GPU_S
        self.search = Search(plain, probe.measure, engine.max, self._left, lambda kind: each * layers[kind])
        fallback = replace(start, precision=tried[0])
        if not layers["blocks"]:
            self.search.tried.append(_no_blocks(plain))
        best = self.search.run(tried, probe.takes_checkpoint)
        Precision(fallback.put_into(experiment).train, engine.device)
        return fallback if best is None else replace(best, threads=self._threads(best, pieces * self.search.best_s))

    def _probe(self, experiment: Experiment) -> tuple[int, Probe]:
        """Passes of a step on this rank, and the probe of one."""
        train, engine = experiment.train, self._engine
        loader = self._loader(experiment.data.threads)
        batch = next(iter(loader))
        loader.close()
        pieces = train.virtual_ranks // engine.world_size if train.deterministic == "layout" else train.accumulate
        inputs, targets = batch.inputs.chunk(pieces)[0].clone(), batch.targets.chunk(pieces)[0].clone()
        task = make_task(experiment, self._parts.volumes, engine.device)
        return pieces, Probe(experiment, self._parts, task, inputs, targets, self._deterministic, self._flag.breaks_off)

    def _loader(self, threads: int) -> Any:
        experiment, engine = self._experiment, self._engine
        data = experiment.model_copy(update={"data": experiment.data.model_copy(update={"threads": threads})})
        place = (engine.device, engine.rank, engine.world_size, experiment.train.seed)
        return make_loaders(data, self._parts, *place)[0]

    def _threads(self, best: Choice, step_s: float) -> int:
        """More threads than the file has, while the loader alone is slower than the step, and they make it faster."""
        threads, most = best.threads, self._engine.allocation.cpus_per_task or len(os.sched_getaffinity(0))
        seconds = self._load(threads)
        while threads and seconds > step_s and 2 * threads <= most:
            if self._engine.max([int(self._left() < 2 * _LOADER_S)])[0]:
                break
            more = self._load(2 * threads)
            if more > 0.9 * seconds:
                break
            threads, seconds = 2 * threads, more
        return threads

    def _load(self, threads: int) -> float:
        """Seconds for a batch, by the slowest rank. Each time other batches: those before are in memory now."""
        loader = self._loader(threads)
        loader.seek(len(self._loaders) + 1)
        taken, started = 0, time.monotonic()
        for number, _ in enumerate(islice(loader, _LOADER_BATCHES + 1)):
            if not number:
                started = time.monotonic()  # threads and files are open now
            taken = number
            if time.monotonic() - started > _LOADER_S:
                break
        seconds = (time.monotonic() - started) / max(taken, 1)
        loader.close()
        seconds = self._engine.max([int(1e6 * seconds)])[0] / 1e6
        self._loaders.append({"what": f"loader alone, {threads} threads", "ms": round(1e3 * seconds, 3)})
        return seconds

    def lines(self) -> list[dict[str, Any]]:
        """What was tried, as JSON."""
        tried = self.search.tried if self.search else []
        found = [{**line, "what": str(line["choice"])} for line in tried]
        found += [{**line, "first_s": 0.0, "outcome": ""} for line in self._loaders]
        return [{key: value for key, value in line.items() if key != "choice"} for line in found]


def _no_blocks(plain: Choice) -> dict[str, Any]:
    return {"choice": replace(plain, compile="blocks"), "ms": 0.0, "first_s": 0.0, "outcome": "no repeated blocks"}


# What a choice depends on.


def _key(experiment: Experiment, engine: Engine, parts: Parts) -> dict[str, Any]:
    train, data = experiment.train, experiment.data
    source, options = experiment.model.source, sorted(parts.model_options.items(), key=str)
    return {
        "device": device_name(engine.device),
        "cpus": [torch.get_num_threads(), engine.allocation.cpus_per_task],
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "model": [source[1], options, _digest(source[0])] if source else [experiment.model.name, options],
        "shape": list(parts.shape),
        "classes": parts.num_classes,
        "batch": [data.batch_size, engine.world_size, train.accumulate, train.virtual_ranks],
        "data": [str(parts.volumes.dtype), data.threads, data.views, str(data.augment), data.patch],
        "precision": train.precision,
        "deterministic": train.deterministic,
    }


def _digest(path: Path) -> str:
    """Of the code, wherever it is: each run has a copy in its own folder."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else device.type
