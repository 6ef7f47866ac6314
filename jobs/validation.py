"""A split evaluated over all ranks, each sample once, and whether its metrics are the best so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from datasets import Loader
from hpc.metrics import DIRECTIONS
from jobs.engine import Engine
from jobs.passes import Passes
from jobs.pictured import Gallery
from jobs.tasks.contract import Scores, Stored, Task
from jobs.tasks.counts import Kept, total

State = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    scores: Scores
    """Of the rows of all ranks on rank 0; on others of the counts alone."""
    stored: Stored | None
    """Of all ranks, on rank 0."""
    metrics: dict[str, float]
    """Rank 0's on every rank, so that all decide alike."""
    gallery: Gallery = field(default_factory=Gallery)
    """Label maps of this rank, for pictures."""


def evaluate(
    engine: Engine,
    task: Task,
    model: nn.Module,
    passes: Passes,
    loader: Loader,
    limit: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The loader's split in evaluation mode, `limit` batches at most; `between` is called after each batch."""
    engine.share_buffers(model)
    model.eval()
    counts, kept = passes.counts(), Kept(task)
    loader.seek(0, 0)
    with torch.no_grad():  # weights in shards are gathered into tensors that the next step uses again
        for batch in islice(loader, limit):
            passes.forward(batch, counts, kept)
            between()
    cells, samples = engine.sum(counts.cells).numpy(), int(engine.sum(torch.tensor([counts.samples]))[0])
    loss = total(engine.sum(counts.loss)) / max(samples, 1)
    stored = gather(engine, kept)
    scores = task.scores(cells, loss, samples, stored)
    names = sorted(DIRECTIONS[task.name])
    metrics = scores.metrics() if engine.is_main else dict.fromkeys(names, 0.0)
    shared = dict(zip(names, engine.broadcast([metrics[name] for name in names]), strict=True))
    metrics = {name: shared[name] for name in scores.metrics()} if engine.is_main else shared
    return Evaluation(scores, stored, metrics, kept.gallery)


def gather(engine: Engine, kept: Kept) -> Stored | None:
    """The rows of all ranks in the order of sample numbers, on rank 0; None on others."""
    samples, targets, rows, losses = (engine.gather(column).numpy() for column in kept.columns())
    if not engine.is_main:
        return None
    order = np.argsort(samples, kind="stable")
    labels = targets[order] if targets.ndim == 1 or targets.shape[1] else None
    return Stored(samples[order], labels, rows[order], losses[order])


def judge(state: State, line: State, evaluation: Evaluation, monitor: str, checkpoint: str) -> None:
    """Keep the last metrics in `state`, and the best ones with the name of the checkpoint that is saved next.

    line: the position, {"epoch", "step"}. Metrics whose loss is not finite, or whose `monitor` is undefined, are never
    the best.
    """
    metrics, best = evaluation.metrics, state["best"]
    state["last"] = line = {**line, "metrics": metrics}
    if not math.isfinite(metrics["loss"]) or math.isnan(metrics[monitor]):
        return
    scores = evaluation.scores
    sign = 1 if DIRECTIONS[scores.task][monitor] == "max" else -1
    if best is None or sign * metrics[monitor] > sign * best["metrics"][monitor]:
        details = {"matrix": scores.matrix.tolist(), "per_class": scores.per_class(), "baseline": scores.baseline}
        state["best"] = {**line, "checkpoint": checkpoint, **details}
