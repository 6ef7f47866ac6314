"""The training loop; `python -m jobs.train --check FILE` checks an experiment, as `python -m jobs.check FILE` does.

Everything about where a run is follows from one integer, the number of optimizer steps done: epoch and step within it,
the samples of the next batch, their augmentation, the dropout and the learning rate.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch

from datasets.loader import Batch
from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.preempt import StopFlag
from hpc.rundir import RunDir
from jobs import acceleration, autotune, check, checkpoint, resuming, undefined, validation
from jobs.engine import Engine
from jobs.epoch import EpochSums, Pace
from jobs.flops import Work, work_of
from jobs.guards import LossGuard, SpikeDetector, Verdict
from jobs.inference.facts import remember
from jobs.learner import Learner
from jobs.ledger import StepLedger
from jobs.precision import Fault
from jobs.profiling import Profiling
from jobs.record import Recorder
from jobs.samples import SampleEvents
from jobs.saving import Saver
from jobs.schedule import Schedule
from jobs.setup import Parts, load_weights, make_loaders, prepare, stage
from jobs.tasks import make_task
from jobs.watchdog import Watchdog

_LOG = logging.getLogger(__name__)
_STAGING_LIMIT_S, _SLOWEST_COPY = 600.0, 20e6
"""Seconds beside those of copying the data to the node, at so many bytes a second, before it counts as a hang."""
_SAVE_LIMIT_S, _EVALUATION_LIMIT_S = 1800.0, 600.0
"""Silence that is no hang while saving, and between two batches of an evaluation."""


class Stopped(Exception):
    """All ranks agreed to stop, and what was done is saved."""


class Diverged(RuntimeError):
    """The loss was not finite again and again: another attempt would meet the same."""


class Trainer:
    """One rank's training of one run."""

    def __init__(
        self, run: RunDir, experiment: Experiment, engine: Engine, flag: StopFlag, watchdog: Watchdog | None = None
    ) -> None:
        self.run, self.experiment, self.engine, self.flag = run, experiment, engine, flag
        self.generation = engine.allocation.generation
        self.watchdog = watchdog or Watchdog(run, engine.allocation, experiment.train.hang_after)  # asleep
        self.settings, self._identity = experiment.train, resuming.identity(experiment)
        self.parts: Parts = prepare(experiment)
        size = sum(path.stat().st_size for path in self.parts.volumes.paths)
        with self.watchdog.phase("staging", _STAGING_LIMIT_S + size / _SLOWEST_COPY):
            self.staged = stage(experiment, self.parts.volumes, lambda: flag.cause)
        try:
            if self.staged:
                self.parts = prepare(experiment, self.staged.paths)
            self.deterministic = wants_determinism(experiment, engine.device)
            self._settle()
            self._build()
        except BaseException:
            if self.staged:
                self.staged.close()
            raise
        self.step = 0
        self.state: dict[str, Any] = {"evaluated_step": 0, "best": None, "sums": None, "shown": {}, "last": None}
        self.samples = SampleEvents(run, engine, self.parts.volumes)
        self.guard, self.spikes = LossGuard(), SpikeDetector()
        self.clock, self.work = engine.clock, Work()
        self.profiling = Profiling(run, self.settings.profile, engine, self.watchdog)
        self.recorder: Recorder | None = None
        self.saver: Saver | None = None
        self.schedule = Schedule(self.settings.checkpoint_every, engine.allocation, self._save_seconds)
        self._saved_step, self._has_saved = -1, False

    def _settle(self) -> None:
        """What train.autotune finds takes the place of the file's settings."""
        if fault := self.experiment.batch_fault(self.engine.world_size):
            raise UserError(fault)
        given = (self.run, self.experiment, self.engine, self.parts, self.deterministic, self.flag)
        with self.watchdog.phase("autotune", autotune.LIMIT_S):
            self.experiment, self.parts = autotune.settle(*given)
        self.settings = self.experiment.train

    def _build(self) -> None:
        settings, engine = self.settings, self.engine
        torch.manual_seed(settings.seed)
        self.model = self.parts.build_model(self.experiment.model.name, self.deterministic).to(engine.device)
        self.task = make_task(self.experiment, self.parts.volumes, engine.device)
        place = (engine.device, engine.rank, engine.world_size, settings.seed)
        self.loader, self.validation = make_loaders(self.experiment, self.parts, *place)
        self.steps_per_epoch = min(len(self.loader), settings.limit_steps or len(self.loader))
        self.total_steps = settings.epochs * self.steps_per_epoch
        acceleration.prepare(self.model, settings, engine, self.loader, self.watchdog, self.flag)
        self._num_parameters = sum(p.numel() for p in self.model.parameters())  # once sharded, a rank has some of them
        self.learner = Learner(self.experiment, engine, self.model, self.task, self.steps_per_epoch)
        weights = partial(self.learner.strategy.weights, self.model)
        self.ledger = StepLedger(self.run, self.generation, engine.rank, weights) if settings.ledger else None

    # Where a run goes on.

    def resume(self) -> None:
        """Load the newest good checkpoint, if there is one. Raises checkpoint.Damaged when there are only bad ones."""
        folder, quarantine, found = self.run.checkpoints, self.run.quarantine, None
        if self.engine.is_main:
            checkpoint.sweep(folder)
            found = checkpoint.load_newest(folder, quarantine)
        self.engine.barrier()
        if not self.engine.is_main:
            found = checkpoint.load_newest(folder, quarantine, keep_bad=True)
        started_from = []
        resuming.agree(self.engine, folder, found)
        resuming.refuse_fresh(self.run, found)
        resuming.refuse_another(self.run, self._identity, found)
        before = resuming.compare_data(self.run, self.experiment, self.parts.volumes, found)
        if found is not None:
            self._restore(found)
        else:
            started_from = load_weights(self.experiment, self.parts, self.model)
            self.learner.started()
        if self.engine.is_main:
            steps = (self.step, self.total_steps, self.steps_per_epoch)
            names = self.task.class_names
            self.recorder = Recorder(self.run, self.experiment, names, self.generation, steps, self.parts.volumes)
            self.recorder.parameters = self._num_parameters
            if self._evaluation_due():
                self.recorder.evaluates_again(self.step, self.state["shown"])
            resuming.check_room(folder, self.learner.checkpoint_bytes, fresh=found is None)
            self._open_saver()
            remember(self.run, self.parts.volumes)
            self.work = work_of(self.experiment, self.parts, self.engine)
            if before:
                self.recorder.data_changed(before, self.parts.volumes.fingerprint)
            where = f"goes on from {found.name}" if found else "starts"
            _LOG.info("%s %s at step %d of %d", self.run.name, where, self.step, self.total_steps)
            for line in started_from:
                _LOG.info(line)

    def _open_saver(self) -> None:
        assert self.recorder
        epochs = self.settings.keep_every * self.steps_per_epoch
        self.saver = Saver(
            self.run.checkpoints,
            self.generation,
            keep=self.settings.keep,
            device=self.engine.device,
            fence=self.recorder.commit,
            report=self.recorder.event,
            keeps=lambda step: bool(epochs) and step % epochs == 0,
        )

    def _save_seconds(self) -> float | None:
        return self.saver.slow_s if self.saver else None

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        self.learner.restore(found)
        self.step, self.state, self._has_saved = found.step, found.state(), True
        self._forget_best({path.name for path in checkpoint.newest_first(self.run.checkpoints)}.__contains__)
        self.guard = LossGuard.from_state(self.state["guard"])
        self.spikes = SpikeDetector.from_state(self.state["spikes"])

    # The loop.

    def fit(self) -> None:
        """Train to the end and write result.json. Raises Stopped after a clean stop."""
        self._begin_epoch()
        self._boundary()
        while (self.step < self.total_steps and not self.learner.ended_early) or self._evaluation_due():
            self._begin_epoch()
            if self._evaluation_due() or self._train_epoch():  # due: a stop, or the way back, came before its end
                self._finish_epoch()
        if self.state["best"] is None:
            epochs = self.step // self.steps_per_epoch
            if math.isfinite(self.state["last"]["metrics"]["loss"]):
                raise undefined.never(self.experiment, self.parts.volumes, epochs)
            raise Diverged(f"the validation loss was never finite in {epochs} epoch(s)")
        self._save(wait=True)
        if self.recorder and (saver := self.saver):
            with self.watchdog.phase("save", _SAVE_LIMIT_S):
                saver.close()  # it asks for the run until the last deletion
                self._forget_best(lambda name: name not in saver.failed)
                self.recorder.result(self.step, self.state["best"], self.state["last"], self.learner.ended_early)

    def _train_epoch(self) -> bool:
        """The rest of the epoch; False where the run has gone back to a checkpoint instead."""
        if self.learner.enter_due(self.step) and self.engine.is_main:
            _LOG.info("stage %d begins at step %d", self.learner.number, self.step)
        self.loader.seek(*divmod(self.step, self.steps_per_epoch))
        for batch in islice(self.loader, self.steps_per_epoch - self.step % self.steps_per_epoch):
            with self.profiling.step(self.step):
                verdict = self._train_step(batch)
            if verdict is Verdict.ROLL_BACK:
                self._roll_back()
                return False
            self._boundary()
        self.loader.close()
        return True

    def _begin_epoch(self) -> None:
        self.sums = EpochSums(self.engine, self.task, self.state["sums"])
        self.pace = Pace(self.step, self.loader.waited)
        self.clock.begin(self.loader.waited)

    def _train_step(self, batch: Batch) -> Verdict:
        """One optimizer step, or none where a loss is not finite on any rank. Raises Diverged."""
        step, counts, verdict = self.step + 1, self.learner.passes.counts(), Verdict.SKIP
        if not self.guard.skipped(step):
            with self._first_of_stage():
                counts, fault = self.learner.update.gradients(batch, self.step)
            fault = Fault(self.engine.max([fault])[0])
            overflow = fault is Fault.OVERFLOW
            verdict = Verdict.SKIP if overflow else self.guard.verdict(step, bool(fault))
            self.learner.update.apply() if verdict is Verdict.OK else self.learner.update.drop(overflow)
            if overflow and self.recorder:
                self.recorder.overflow(step, self.learner.precision.state())
            elif verdict is not Verdict.OK and not overflow:
                own = [] if math.isfinite(counts.total_loss()) else self.samples.ids(batch)
                tell = self.recorder or self.samples
                tell.skipped(step, own)
                if not self._has_saved:  # a row of such steps needs a place to go back to
                    self._save()
        loss = counts.total_loss()
        if self.ledger:
            self.ledger.write(step, batch, loss, skipped=verdict is not Verdict.OK)
        if verdict is not Verdict.OK:
            counts = self.learner.passes.counts()
        if verdict is Verdict.STOP:
            raise Diverged(self.guard.reason([] if math.isfinite(loss) else self.samples.ids(batch)))
        self.step = step
        self.sums.add(step, counts)
        self.clock.end(self.loader.waited)
        if self.sums.full:
            self._flush(newest=False)
        return verdict

    def _first_of_stage(self) -> AbstractContextManager[None]:
        """A stage trains other parameters: what is compiled is compiled once more."""
        if self.settings.compile == "off" or not self.learner.begun():
            return nullcontext()
        return self.watchdog.phase("compile", acceleration.COMPILE_LIMIT_S)

    def _roll_back(self) -> None:
        """Load a checkpoint from before the bad steps, and pass over these from there. Raises Diverged without one."""
        self._flush()
        with self.watchdog.phase("rollback", _SAVE_LIMIT_S):
            self._go_back()

    def _go_back(self) -> None:
        guard, left = self.guard, self.step
        if self.saver:
            self.saver.close()
        self.engine.barrier()  # the same checkpoints for all
        found = resuming.choose(self.run.checkpoints, guard)
        resuming.agree(self.engine, self.run.checkpoints, found)
        if found is None:
            raise Diverged(f"{guard.reason()}; there is no checkpoint to go back to")
        self.engine.barrier()  # all have read what is about to be moved
        if self.engine.is_main:
            resuming.take_back(self.run.checkpoints, self.run.quarantine, found.step)
        self._restore(found)
        self.guard, self._saved_step = guard, -1
        passed_over = guard.roll_back(found.step)
        if self.recorder:
            self.recorder.roll_back(left, found.step, passed_over)
            if self._evaluation_due():
                self.recorder.evaluates_again(self.step, self.state["shown"])
            self._open_saver()

    def _flush(self, newest: bool = True) -> None:
        """Sum the last steps over the ranks, log them, and add them to the epoch's sums; newest: see StepClock."""
        self.samples.tell_replaced(self.step, self.loader, self.validation)
        for step, scores in self.sums.flush():
            assert self.recorder  # rank 0 alone has any
            self.recorder.step(step, scores, self.learner.rate(step - 1), self.learner.precision.shown(step))
            if self.spikes.seen(step, scores.loss):
                self.recorder.spike(step, scores.loss)
        seconds = self.clock.flush(self.engine, newest)
        if self.recorder:
            self.recorder.times(self.step, self.work.timing(self.learner.number, seconds))
            self.recorder.state("training", self.step, self.state["best"])

    def _boundary(self, saving: bool = True) -> None:
        """Between two steps, on every rank: stop when any was told to, save when it is time."""
        self.watchdog.beat(self.step)
        due = bool(self.saver and self.schedule.save_due() and not self.saver.busy)
        if self.saver and self.schedule.ending():
            self.flag.notice()

        def agree(number: int) -> int:
            nonlocal due
            number, due_anywhere = self.engine.max([number, int(due)])
            due = bool(due_anywhere)
            return number

        cause = self.flag.agree(agree)
        if cause:
            self._stop(cause)
        later = self._evaluation_due() or self.guard.in_streak  # after the evaluation; with weights that are known good
        if due and saving and not later:
            self._save()

    def _stop(self, cause: str) -> None:
        """Save, wait for every rank, leave word in stop.json, then leave together."""
        if self.recorder:
            self.recorder.event("signal", cause=cause, step=self.step, received=self.flag.received)
        self._save(wait=True)
        self.engine.barrier()
        if self.recorder:
            self.recorder.state("stopping", self.step, self.state["best"], force=True)
            self.recorder.stop(self.step, cause)
        self.profiling.close()
        self.engine.barrier()
        raise Stopped(cause)

    def close(self) -> None:
        """Leave the other ranks, and end what runs beside the training."""
        with self.watchdog.phase("save", _SAVE_LIMIT_S):
            if self.saver:
                self.saver.close()
        self.watchdog.close()
        self.leave_data()
        self.engine.close()

    def leave_data(self) -> None:
        """End reading and logging; the last rank of a node to leave removes the copy on it."""
        self.profiling.close()
        if self.recorder:
            self.recorder.close()
        self.loader.close()
        self.validation.close()
        if self.staged:
            self.staged.close()

    # The end of an epoch.

    def _evaluation_due(self) -> bool:
        return self.step > 0 and self.step % self.steps_per_epoch == 0 and self.state["evaluated_step"] < self.step

    def _finish_epoch(self) -> None:
        self._flush()
        self.pace.stop(self.step, self.loader.waited)
        if self.recorder:
            self.recorder.state("evaluating", self.step, self.state["best"], force=True)
        started = time.monotonic()
        with self.watchdog.phase("validation", _EVALUATION_LIMIT_S):
            found = self._evaluate()
            self.samples.tell_replaced(self.step, self.loader, self.validation)
            speed = {
                "train": self.pace.steps_per_second * self.experiment.data.batch_size,
                "validation": found.scores.samples / (time.monotonic() - started),
            }
            self._judge(found)
            if self.recorder:
                seen = self.sums.scores().metrics()
                best = bool(self.state["best"]) and self.state["best"]["step"] == self.step
                timing = self.work.timing(self.learner.number, self.clock.epoch())
                self.recorder.evaluation(self.step, found, seen, speed, self.pace.waiting_share, timing, best)
            if self.experiment.data.on_bad_sample == "skip":
                self.samples.count_replaced()
        self.state.update(evaluated_step=self.step, sums=None, shown={})
        if self.state["best"] and self.state["best"]["step"] == self.step:
            self._save()

    def _evaluate(self) -> validation.Evaluation:
        """The validation split. Raises Stopped when a stop comes meanwhile."""
        return validation.evaluate(
            self.engine,
            self.task,
            self.learner.evaluated,
            self.learner.passes,
            self.validation,
            self.settings.limit_steps,
            between=partial(self._boundary, saving=False),
        )

    def _judge(self, found: validation.Evaluation) -> None:
        where = {"epoch": self.step // self.steps_per_epoch, "step": self.step}
        name = checkpoint.name_of(self.generation, self.step)
        validation.judge(self.state, where, found, self.experiment.monitor, name)
        self.learner.judged(where["epoch"], found.metrics)

    # What is left behind.

    def _save(self, wait: bool = False) -> None:
        """Every rank; rank 0 writes beside the training. With `wait`: until all is durable."""
        started = time.monotonic()
        with self.clock.phase("save"), self.watchdog.phase("save", _SAVE_LIMIT_S):
            if self._saved_step != self.step:
                self._flush()
                self._snapshot()
                self._saved_step, self._has_saved = self.step, True
                self.schedule.saved()
            if wait and self.saver:
                self.saver.wait()
        self.pace.aside += time.monotonic() - started

    def _snapshot(self) -> None:
        (weights, trained), moments = self.learner.weights(), self.learner.strategy.optimizer_state()
        if (saver := self.saver) is None:
            return
        if self.step % self.steps_per_epoch or self._evaluation_due():
            self.state["sums"] = self.sums.state()
        if self._evaluation_due() and self.recorder:
            self.state["shown"] = self.recorder.shown(self.step)
        self.state |= {"guard": self.guard.state(), "spikes": self.spikes.state(), "learner": self.learner.state()}
        self._forget_best(lambda name: name not in saver.failed)
        best = self.state["best"]
        protect = {best["checkpoint"]} if best and best["checkpoint"] else set()
        protect |= resuming.needed(self.run.checkpoints, self.guard)
        saver.save(self.step, weights, moments, self.state, self._facts(), protect, trained=trained)

    def _forget_best(self, there: Callable[[str], bool]) -> None:
        """A best checkpoint that never became durable, or was damaged, is not named; its metrics stay."""
        best = self.state["best"]
        if best and best["checkpoint"] and not there(best["checkpoint"]):
            self.state["best"] = {**best, "checkpoint": None}

    def _facts(self) -> dict[str, Any]:
        return {
            "world_size": self.engine.world_size,
            "experiment": self._identity,
            "data": self.parts.volumes.fingerprint,
            "torch": torch.__version__,
        }


def wants_determinism(experiment: Experiment, device: torch.device) -> bool:
    """`auto` is on where it costs nothing: on the CPU."""
    wanted = experiment.train.deterministic
    return wanted in ("run", "layout") or (wanted == "auto" and device.type == "cpu")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.train", description=__doc__)
    parser.add_argument("--check", required=True, metavar="FILE", help="experiment (YAML) or run folder; - for stdin")
    return check.report(parser.parse_args().check)


if __name__ == "__main__":
    sys.exit(main())
