"""The figures of a run while it trains: to TensorBoard, and at its end as PNG. None of them can stop the training.

At each evaluation the confusion matrix is drawn; at a new best all figures, as far as that takes a twentieth of the
time at most; both by a thread beside the training. At the end those of the best evaluation, as PNG and to TensorBoard.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.census import spacings
from datasets.layout import VolumeFile
from hpc.experiment import Experiment
from hpc.logs import series
from hpc.metrics import STEP_METRIC, decimals, defined
from hpc.rundir import RunDir, write_bytes
from jobs import bestrows
from jobs.pictured import Pictured
from jobs.renderer import Renderer
from jobs.tasks.contract import Stored
from jobs.tracking import Tracker
from jobs.validation import Evaluation

if TYPE_CHECKING:  # matplotlib: a resumed run need not wait for it
    from jobs.figures import Example, History, Shown

_LOG = logging.getLogger(__name__)
LOSS_TAG, RATE_TAG = "step/loss", "step/learning_rate"
SHARE = 1 / 20
"""of the time that all figures at new bests may take"""
FIRST_S = 60.0
"""into an attempt before they are drawn at a new best"""
MOST_EVENT_BYTES = 32 << 20
"""of event files that are read for the losses of single steps: some ten seconds"""
_FLUSH_S = 30.0
"""until the run's own losses are in its files"""
FEW = ("confusion_matrix", "curves")
"""with train.figures=few"""


@dataclass(frozen=True)
class BestScores:
    """The part of the best evaluation's scores that checkpoints keep."""

    matrix: np.ndarray
    baseline: Mapping[str, float]
    rows: list[dict[str, Any]]

    def per_class(self) -> list[dict[str, Any]]:
        return self.rows


class Drawer:
    """Of one attempt, on rank 0."""

    def __init__(
        self, run: RunDir, experiment: Experiment, names: Sequence[str], tracker: Tracker, volumes: VolumeFile | None
    ) -> None:
        """volumes: where samples are read for pictures; without, there are none."""
        self._run, self._names, self._tracker, self._volumes = run, list(names), tracker, volumes
        self._task, self._monitor = experiment.task, experiment.monitor
        self._all = experiment.train.figures == "all"
        self._best: tuple[int, Stored, bestrows.Pictures] | None = None
        self._free_at, self._warned = time.monotonic() + FIRST_S, False
        self._renderer, self._lock = Renderer(), threading.Lock()
        self._round = self._drawn_round = 0

    def evaluated(self, step: int, words: str, found: Evaluation, is_best: bool) -> None:
        """After each evaluation: drawn beside the training."""
        of_round = self._round

        def draw() -> None:
            self._drawn_round = of_round
            self._safely(lambda: self._evaluated(step, words, found, is_best))

        self._renderer.put(draw)

    def go_back(self) -> None:
        """The training has gone back: what is not drawn yet is not to be seen."""
        with self._lock:
            self._round += 1
        self._renderer.forget()

    def close(self, most_s: float) -> None:
        """Draw what waits, for at most so long."""
        self._renderer.wait(most_s)

    def _evaluated(self, step: int, words: str, found: Evaluation, is_best: bool) -> None:
        from jobs import figures

        scores = found.scores
        title = self._title(words, found.metrics, scores.baseline)
        if scores.matrix.ndim == 2:
            draw = figures.plans(self._task, scores, None, self._names, title)["confusion_matrix"]
            self._draw(step, "confusion_matrix/validation", draw)
        if not (is_best and self._all and found.stored):
            return
        pictures = {"predictions": found.gallery.evenly(), "worst_samples": found.gallery.worst}
        self._best = (step, found.stored, pictures)
        self._keep(step, found.stored, pictures)
        if (began := time.monotonic()) < self._free_at:
            return
        shown = self._shown(found.stored, pictures)
        plans = figures.plans(self._task, scores, found.stored, self._names, title, None, shown)
        for name, draw in plans.items():
            if name != "confusion_matrix":
                self._safely(partial(self._draw, step, f"{name}/validation", draw))
        now = time.monotonic()
        self._free_at = now + (now - began) / SHARE

    def finish(self, step: int, best: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """Of the best evaluation: figures/*.png, and TensorBoard at `step`, the last one. Waits for all before."""
        self._renderer.wait()
        self._safely(lambda: self._finish(step, best, lines))

    def _finish(self, step: int, best: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        from jobs import figures

        scores = BestScores(np.array(best["matrix"]), best["baseline"], best["per_class"])
        title = self._title(f"validation, best epoch {best['epoch']}", best["metrics"], scores.baseline)
        history = self._history(best["epoch"], lines)
        stored, shown = None, None
        if self._all and (kept := self._kept(best["step"])):
            stored, shown = kept[0], self._shown(*kept)
        plans = figures.plans(self._task, scores, stored, self._names, title, history, shown)
        for name, draw in plans.items():
            if self._all or name in FEW:
                self._safely(partial(self._write, step, name, draw))

    def _write(self, step: int, name: str, draw: Callable[[], Any]) -> None:
        from jobs.figures import canvas

        pixels = canvas.rendered(draw())
        write_bytes(self._run.figure(name), canvas.encoded(pixels))
        if self._all:
            self._tracker.picture(step, f"{name}/best", pixels)

    def _draw(self, step: int, tag: str, draw: Callable[[], Any]) -> None:
        from jobs.figures import canvas

        pixels = canvas.rendered(draw())
        with self._lock:
            if self._drawn_round == self._round:
                self._tracker.picture(step, tag, pixels)

    def _safely(self, draw: Callable[[], None]) -> None:
        """An error is one warning of the attempt."""
        try:
            draw()
        except Exception as error:
            if not self._warned:
                _LOG.warning("figures are missing: %s: %s", type(error).__name__, error)
            self._warned = True

    # What is drawn.

    def _title(self, words: str, metrics: Mapping[str, float], baseline: Mapping[str, float]) -> str:
        names = [self._monitor, *([STEP_METRIC[self._task]] if self._monitor == "loss" else [])]
        told = ", ".join(f"{name} {decimals(metrics[name], 3)}" for name in names if name in metrics)
        known = defined(dict(baseline))
        alone = next((f" (commonest class alone {known[name]:.3f})" for name in names if name in known), "")
        return f"{words}: {told}{alone}"

    def _keep(self, step: int, stored: Stored, pictures: bestrows.Pictures) -> None:
        ids = [str(self._volumes.ids[sample]) for sample in stored.samples.tolist()] if self._volumes else []
        if not bestrows.save(self._run, step, stored, pictures, self._names, ids):
            _LOG.info("the rows of %d samples are too many to keep in %s", len(stored), self._run.prediction("best"))

    def _kept(self, step: int) -> tuple[Stored, bestrows.Pictures] | None:
        if self._best and self._best[0] == step:
            return self._best[1:]
        return bestrows.load(self._run, step)

    def _shown(self, stored: Stored, pictures: bestrows.Pictures) -> Shown | None:
        from jobs import figures

        if self._volumes is None:
            return None
        if self._task == "segmentation":
            both = (self._examples(pictures.get(kind, [])) for kind in ("predictions", "worst_samples"))
            return figures.Shown(*both)
        spread = figures.read_examples(self._volumes, stored, figures.spread(stored, len(self._names)))
        worst = figures.read_examples(self._volumes, stored, figures.worst(stored, len(spread) or 1))
        return figures.Shown(spread, worst)

    def _examples(self, shown: Sequence[Pictured]) -> list[Example]:
        from jobs.figures import Example

        assert self._volumes is not None
        voxels, ids = spacings(self._volumes), self._volumes.ids
        return [
            Example(str(ids[one.sample]), one.image, one.truth, one.loss, one.found, None, voxels[one.sample].tolist())
            for one in shown
        ]

    def _history(self, best_epoch: int, lines: Sequence[Mapping[str, Any]]) -> History:
        from jobs import figures

        self._tracker.flush(_FLUSH_S)
        size = sum(path.stat().st_size for path in self._run.tensorboard.glob("*tfevents*"))
        loss = rate = None
        if self._all and 0 < size <= MOST_EVENT_BYTES:
            steps = series.scalars(self._run.tensorboard)
            loss, rate = figures.step_series(steps, LOSS_TAG), figures.step_series(steps, RATE_TAG)
        return figures.History(lines, best_epoch, self._monitor, loss, rate)
