"""What rank 0 writes about an attempt: TensorBoard, metrics.jsonl, state.json, stop.json, figures, result.json."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets.layout import VolumeFile
from hpc import steptimes, usage
from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.metrics import DIRECTIONS, STEP_METRIC, decimals, defined
from hpc.rundir import DATA_CHANGED, RunDir, read_json, write_json
from jobs.drawing import LOSS_TAG, RATE_TAG, Drawer
from jobs.samples import FEW
from jobs.tasks.contract import Scores
from jobs.tracking import Tracker
from jobs.validation import Evaluation

_LOG = logging.getLogger(__name__)
_STATE_EVERY_S = 1.0
STOP_S = 5.0
"""What figures may still take at a stop."""
_BEFORE_SAVE_S = 3.0


class Recorder:
    """The records of one attempt; the only writer of these files while it runs."""

    def __init__(
        self,
        run: RunDir,
        experiment: Experiment,
        names: Sequence[str],
        generation: int,
        steps: tuple[int, int, int],
        volumes: VolumeFile | None = None,
    ) -> None:
        """`steps`: done so far, in all, per epoch; volumes: what the samples of the pictures are read from."""
        self._run, self._names, self._generation = run, list(names), generation
        self._epochs, self._task = experiment.train.epochs, experiment.task
        self._monitor, self._step_metric = experiment.monitor, STEP_METRIC[experiment.task]
        resumed, self._total, self._per_epoch = steps
        self._tracker = Tracker(run, generation, resumed, experiment.train.stage_logs)
        self._drawer = Drawer(run, experiment, names, self._tracker, volumes)
        self._written_at = 0.0
        self.sample_usage: Callable[[], None] = lambda: None
        """Brings what is known of this node's use up to date."""
        self.parameters = 0
        """Of the model, trained and frozen ones."""
        self._refused = False
        self._mine = read_json(run.state)
        self._shown: tuple[int, dict[str, float]] = (0, {})

    def event(self, kind: str, **fields: Any) -> None:
        self._quietly(partial(self._run.event, kind, "rank0", self._generation, **fields))

    def _quietly(self, write: Callable[[], None]) -> None:
        """A full disk takes these records, never the training."""
        try:
            write()
        except OSError as error:
            self._tell_once(error)
        else:
            self._refused = False

    def _tell_once(self, error: OSError) -> None:
        if not self._refused:
            _LOG.warning("progress is not recorded for now: %s", error)
        self._refused = True

    def step(self, step: int, scores: Scores, rate: float, more: Mapping[str, float] | None = None) -> None:
        """One optimizer step, over all ranks; more: other scalars of it."""
        name = self._step_metric
        found = {f"step/{key}": value for key, value in defined(scores.metrics()).items() if key == name}
        values = {LOSS_TAG: scores.loss, **found, RATE_TAG: rate, **(more or {})}
        self._shown = (step, values)
        self._tracker.scalars(step, values)

    def times(self, step: int, timing: Mapping[str, Any]) -> None:
        """Where the time of the steps up to this one has gone, see jobs.flops.Work.timing."""
        values = _time_tags(timing)
        if self._shown[0] == step:
            self._shown = (step, {**self._shown[1], **values})
        self._tracker.scalars(step, values)

    def shown(self, step: int) -> dict[str, float]:
        """The step's own events: none where it was skipped."""
        return self._shown[1] if self._shown[0] == step else {}

    def evaluates_again(self, step: int, shown: dict[str, float]) -> None:
        """The evaluation after `step` comes again: all events of that step are taken back, but its own are kept."""
        self._drawer.go_back()
        self._tracker.go_back(step - 1)
        self._shown = (step, shown)
        self._tracker.scalars(step, shown)

    def skipped(self, step: int, samples: Sequence[str]) -> None:
        """A step whose loss or gradient was not finite on some rank: the weights are as before it."""
        self.event("skipped", step=step, samples=list(samples)[:FEW])
        _LOG.warning("step %d is skipped: its loss or gradient is not finite", step)

    def overflow(self, step: int, scaler: dict[str, Any]) -> None:
        """A step whose gradients did not fit into fp16: the weights are as before it, and the loss scale is halved."""
        self.event("overflow", step=step, scale=scaler["scale"])
        _LOG.info("step %d overflows in fp16 and is skipped; the loss scale is %g now", step, scaler["scale"])

    def data_changed(self, before: str, now: str) -> None:
        """Other data than the checkpoint was trained on, as the user has agreed."""
        self.event(DATA_CHANGED, before=before, now=now)
        _LOG.warning("goes on with other data (fingerprint %.12s, not %.12s), as was asked for", now, before)

    def spike(self, step: int, loss: float) -> None:
        self.event("loss-spike", step=step, loss=loss)
        _LOG.warning("the loss jumped to %.4g at step %d", loss, step)

    def roll_back(self, left: int, step: int, passed_over: Sequence[int]) -> None:
        """The run has gone back to a checkpoint: what was written after its step is taken back."""
        self._drawer.go_back()
        self._tracker.go_back(step)
        self.event("rollback", step=step, left=left, passed_over=list(passed_over))
        _LOG.warning("went back from step %d to %d; passed over from there: %s", left, step, list(passed_over))

    def state(self, phase: str, step: int, best: dict[str, Any] | None, force: bool = False) -> None:
        """Progress in state.json, once a second or when forced. Raises UserError when the lease was lost."""
        now = time.monotonic()
        if not force and now - self._written_at < _STATE_EVERY_S:
            return
        self._written_at = now
        try:
            held = self.hold()
        except OSError as error:  # a shared file system that does not answer for a moment
            self._tell_once(error)
            return
        progress = {"phase": phase, "step": step, "epoch": step // self._per_epoch, "steps": self._total}
        progress["parameters"] = self.parameters
        monitored = {"monitor": self._monitor, "best": _brief(best or {})}
        state = {**held, **progress, **monitored, "time": round(time.time(), 3)}
        self._quietly(partial(write_json, self._run.state, state))

    def commit(self) -> None:
        """Asked by the saver's thread before each commit: the events of its steps come first, if their disk is well.

        Raises as `hold` does.
        """
        self._tracker.flush(_BEFORE_SAVE_S)
        self.hold()

    def flush(self, wait_s: float = 0.0) -> None:
        """Events to the disk, by a thread; wait_s: for at most so long until they are there."""
        self._tracker.flush(wait_s)

    def close(self) -> None:
        """In some seconds, whatever the disk does; an attempt that fails leaves its last events, too."""
        self._drawer.close(STOP_S)
        self._tracker.close()

    def hold(self) -> dict[str, Any]:
        """state.json, while this attempt holds the run. Raises UserError when the lease was lost, OSError.

        The highest generation decides, which was taken by creating a file: a shell that outlived its node may have
        written an older state back.
        """
        newest = self._run.last_generation()
        if newest > self._generation:
            raise UserError(f"{self._run.name} is held by generation {newest}, not by this {self._generation}")
        held = read_json(self._run.state)
        if held.get("generation") != self._generation:  # or it is gone
            return self._mine
        if held.get("phase") in ("ended", "stopped"):
            raise UserError(f"{self._run.name}: its batch script has ended this attempt; nothing more is written")
        self._mine = held
        return held

    def evaluation(
        self,
        step: int,
        found: Evaluation,
        train: dict[str, float],
        speed: dict[str, float],
        waiting: float,
        timing: Mapping[str, Any],
        is_best: bool = False,
    ) -> None:
        """The end of an epoch: `train` are its training metrics, `speed` samples/s by split, `waiting` a share.

        timing: of its steps (jobs.flops.Work.timing); is_best: better than all before.
        """
        epoch, metrics, names = step // self._per_epoch, found.metrics, ("loss", self._step_metric, self._monitor)
        _LOG.info(
            "epoch %d/%d  train: %s  validation: %s  %.1f samples/s, %.1f %% waiting for data",
            *(epoch, self._epochs, _shown(train, names), _shown(metrics, names), speed["train"], 100 * waiting),
        )
        line = {"epoch": epoch, "step": step, "split": "validation", "metrics": metrics}
        extra = {"train": train, "waiting_share": waiting, "samples_per_second": speed, **timing}
        when = self._tracker.evaluation({**line, **extra})
        scalars = {f"train/{key}": value for key, value in defined(train).items()}
        scalars |= {f"validation/{key}": value for key, value in defined(metrics).items()}
        scalars |= {f"speed/{key}_samples_per_second": value for key, value in speed.items() if value}
        self._tracker.scalars(step, {**scalars, "speed/waiting_share": waiting, "epoch": epoch}, when)
        self._drawer.evaluated(step, f"validation, epoch {epoch}", found, is_best)
        self._tracker.flush()

    def stop(self, step: int, cause: str) -> None:
        """The word that the batch script's tail decides by. Raises UserError when the lease was lost."""
        self.hold()
        write_json(self._run.stop, {"generation": self._generation, "step": step, "cause": cause})
        self.close()  # after the word: a dead disk of the logs costs seconds alone
        _LOG.info("stopped by %s: saved at step %d", cause, step)

    def result(
        self, step: int, best: dict[str, Any], last: dict[str, Any], stopped_early: dict[str, Any] | None = None
    ) -> None:
        """Figures, then result.json: its presence means that the run is finished.

        stopped_early: why, where not all epochs were trained.
        """
        lines = self._run.read_metrics()
        self._drawer.finish(step, best, lines)
        self._tracker.close()
        self._total = step
        self.state("ending", step, best, force=True)
        self.sample_usage()
        used = usage.summary(self._run, finished=True)
        write_json(
            self._run.result, {**self._summary(step, best, last, lines), "stopped_early": stopped_early, "usage": used}
        )
        for line in usage.lines(used):
            _LOG.info(line)
        for line in steptimes.lines(steptimes.typical(lines)):
            _LOG.info(line)
        if stopped_early:
            _LOG.info("stopped early: %s got no better for %d epochs", *list(stopped_early.values())[:2])
        _LOG.info("finished: best %s %.4f at epoch %d", self._monitor, best["metrics"][self._monitor], best["epoch"])

    def _summary(
        self, step: int, best: dict[str, Any], last: dict[str, Any], lines: list[dict[str, Any]]
    ) -> dict[str, Any]:
        speeds = {
            split: [s for m in lines if (s := m["samples_per_second"][split])] for split in ("train", "validation")
        }
        return {
            "finished": True,
            "run": self._run.name,
            "task": self._task,
            "class_names": self._names,
            "steps": step,
            "epochs": step // self._per_epoch,
            "parameters": self.parameters,
            "monitor": self._monitor,
            "direction": DIRECTIONS[self._task][self._monitor],
            **({"majority": best["baseline"]["accuracy"]} if self._task == "classification" else {}),
            "baseline": best["baseline"],
            "best": _brief(best),
            "last": last,
            "samples_per_second": {split: statistics.median(values) for split, values in speeds.items() if values},
            "waiting_share": statistics.median([m["waiting_share"] for m in lines]) if lines else None,
            **steptimes.typical(lines),
            "attempts": self._generation,
            **({"autotune": chosen} if (chosen := read_json(self._run.autotune).get("choice")) else {}),
            "per_class": best["per_class"],
            "confusion_matrix": best["matrix"],
        }


def _brief(best: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in best.items() if key not in ("matrix", "per_class", "baseline")}


def _time_tags(timing: Mapping[str, Any]) -> dict[str, float]:
    """Tags of TensorBoard: seconds by part of a step, TFLOP/s, the share of the peak."""
    tags = {f"time/{phase}": seconds for phase, seconds in timing.get(steptimes.SECONDS, {}).items()}
    if steptimes.FLOPS in timing:
        tags["speed/tflops"] = timing[steptimes.FLOPS] / 1e12
    if steptimes.MFU in timing:
        tags["speed/mfu"] = timing[steptimes.MFU]
    return tags


def _shown(metrics: dict[str, float], names: Sequence[str]) -> str:
    """Those that there are, each once."""
    return ", ".join(f"{name} {decimals(metrics[name])}" for name in dict.fromkeys(names) if name in metrics)
