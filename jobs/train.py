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
from typing import Any

import torch

from datasets import Loader
from datasets.loader import Batch
from hpc.errors import UserError
from hpc.experiment import Experiment
from hpc.preempt import StopFlag
from hpc.rundir import RunDir
from jobs import check, checkpoint
from jobs.engine import Engine
from jobs.ledger import StepLedger
from jobs.optimize import build_optimizer, learning_rate
from jobs.record import Recorder
from jobs.setup import Parts, prepare
from jobs.tasks.classification import DIRECTION, Classification, Counts, Scores
from jobs.update import Updater

_LOG = logging.getLogger(__name__)
_FLUSH_STEPS = 10


class Stopped(Exception):
    """All ranks agreed to stop, and what was done is saved."""


class Trainer:
    """One rank's training of one run."""

    def __init__(self, run: RunDir, experiment: Experiment, engine: Engine, flag: StopFlag, generation: int) -> None:
        self.run, self.experiment, self.engine, self.flag, self.generation = run, experiment, engine, flag, generation
        self.settings = experiment.train
        self.parts: Parts = prepare(experiment)
        self.deterministic = wants_determinism(experiment, engine.device)
        self._build()
        self.step = 0
        self.state: dict[str, Any] = {"evaluated_step": 0, "best": None, "sums": None, "last": None}
        self.recorder: Recorder | None = None
        self._saved_at, self._saved_step = time.monotonic(), -1

    def _build(self) -> None:
        settings, engine, data = self.settings, self.engine, self.experiment.data
        if fault := self.experiment.batch_fault(engine.world_size):
            raise UserError(fault)
        torch.manual_seed(settings.seed)
        self.model = self.parts.build_model(self.experiment.model.name, self.deterministic).to(engine.device)
        self.optimizer = build_optimizer(settings.optimizer, self.model)
        self.task = Classification(settings.loss, self.parts.weights, engine.device)
        common: dict[str, Any] = {
            "batch_size": data.batch_size,
            "seed": settings.seed,
            "rank": engine.rank,
            "world_size": engine.world_size,
            "threads": data.threads,
            "device": engine.device,
            "dtype": torch.float32,
        }
        augment = data.augment or None
        self.loader = Loader(self.parts.volumes, split="train", augment=augment, verify=data.verify, **common)
        self.validation = Loader(self.parts.volumes, split="validation", **common)
        self.steps_per_epoch = len(self.loader)
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.rate = learning_rate(settings.scheduler, settings.optimizer.lr, self.total_steps, self.steps_per_epoch)
        classes = self.parts.num_classes
        self.update = Updater(settings, engine, self.model, self.optimizer, self.task, classes, self.rate)
        self.ledger = StepLedger(self.run, self.generation, engine.rank, self.model) if settings.ledger else None

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
        if found is not None:
            self._restore(found)
        if self.engine.is_main:
            steps = (self.step, self.total_steps, self.steps_per_epoch)
            names = self.parts.volumes.class_names
            self.recorder = Recorder(self.run, self.experiment, names, self.generation, steps)
            where = f"goes on from {found.name}" if found else "starts"
            _LOG.info("%s %s at step %d of %d", self.run.name, where, self.step, self.total_steps)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        fingerprint = found.manifest["data"]
        if fingerprint != self.parts.volumes.fingerprint:
            raise UserError(
                f"{self.experiment.data.file} is not the data that {found.name} was trained on "
                f"(fingerprint {self.parts.volumes.fingerprint[:12]}, not {fingerprint[:12]}): restore the file, "
                f"or start a new run with 'hpc submit'"
            )
        self.model.load_state_dict(found.model())
        self.optimizer.load_state_dict(found.optimizer())
        self.step, self.state = found.step, found.state()

    # The loop.

    def fit(self) -> None:
        """Train to the end and write result.json. Raises Stopped after a clean stop."""
        self._begin_epoch()
        self._boundary()
        if self._evaluation_due():  # a stop came before or during it
            self._finish_epoch()
            self._save()  # or a kill would have the events show this evaluation twice
        while self.step < self.total_steps:
            self._begin_epoch()
            self.loader.seek(*divmod(self.step, self.steps_per_epoch))
            for batch in self.loader:
                self._train_step(batch)
                self._boundary()
            self._finish_epoch()
        self._save()
        if self.recorder:
            self.recorder.result(self.step, self.state["best"], self.state["last"])

    def _begin_epoch(self) -> None:
        self.counts = Counts(self.parts.num_classes, self.engine.device)
        self.pending: list[tuple[int, Counts]] = []
        sums = self.state["sums"]
        if sums and self.engine.is_main:
            self.counts.matrix += torch.tensor(sums["matrix"], device=self.engine.device)
            self.counts.loss += float.fromhex(sums["loss"])
        self._epoch_start = time.monotonic()
        self._epoch_from_step = self.step
        self._waited_before = self.loader.waited
        self._aside = 0.0

    def _train_step(self, batch: Batch) -> None:
        counts, bad = self.update.gradients(batch, self.step)
        self.update.apply()
        self.step += 1
        if self.ledger:
            self.ledger.write(self.step, batch, float(counts.loss), skipped=bad)
        self.pending.append((self.step, counts))
        if len(self.pending) >= _FLUSH_STEPS:
            self._flush()

    def _flush(self) -> None:
        """Sum the last steps over the ranks, log them, and add them to the epoch's sums."""
        if not self.pending:
            return
        steps = [step for step, _ in self.pending]
        matrices = self.engine.sum(torch.stack([counts.matrix for _, counts in self.pending]))
        losses = self.engine.sum(torch.stack([counts.loss for _, counts in self.pending]))
        self.pending = []
        for step, matrix, loss in zip(steps, matrices, losses, strict=True):
            samples = int(matrix.sum())
            mean = float(loss) / samples
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss is {mean} at step {step}: lower train.optimizer.lr, or set train.clip_norm"
                )
            accuracy = float(matrix.trace()) / samples
            if self.recorder:
                self.recorder.step(step, mean, accuracy, self.rate(step - 1))
                self.counts.matrix += matrix.to(self.engine.device)
                self.counts.loss += loss.to(self.engine.device)
        if self.recorder:
            self.recorder.state("training", self.step, self.state["best"])

    def _boundary(self, saving: bool = True) -> None:
        """Between two steps, on every rank: stop when any was told to, save when it is time."""
        due = time.monotonic() - self._saved_at > self.settings.checkpoint_every if self.engine.is_main else False

        def agree(number: int) -> int:
            nonlocal due
            number, due_anywhere = self.engine.max([number, int(due)])
            due = bool(due_anywhere)
            return number

        cause = self.flag.agree(agree)
        if cause:
            self._stop(cause)
        if due and saving and not self._evaluation_due():  # at the end of an epoch the save follows the evaluation
            self._save()

    def _stop(self, cause: str) -> None:
        """Save, wait for every rank, leave word in stop.json, then leave together."""
        if self.recorder:
            self.recorder.event("signal", cause=cause, step=self.step, received=self.flag.received)
        self._save()
        self.engine.barrier()
        if self.recorder:
            self.recorder.stop(self.step, cause)
        self.engine.barrier()
        raise Stopped(cause)

    # The end of an epoch.

    def _evaluation_due(self) -> bool:
        return self.step > 0 and self.step % self.steps_per_epoch == 0 and self.state["evaluated_step"] < self.step

    def _finish_epoch(self) -> None:
        self._flush()
        trained = time.monotonic() - self._epoch_start - self._aside
        steps = self.step - self._epoch_from_step
        waited = self.loader.waited - self._waited_before
        if self.recorder:
            self.recorder.state("evaluating", self.step, self.state["best"], force=True)
        started = time.monotonic()
        scores = self.evaluate()
        speed = {
            "train": steps * self.experiment.data.batch_size / trained if steps else 0.0,
            "validation": scores.samples / (time.monotonic() - started),
        }
        waiting = waited / trained if steps else 0.0
        self._judge(scores)
        if self.recorder:
            seen = Scores(self.counts.matrix.cpu().numpy(), float(self.counts.loss) / int(self.counts.matrix.sum()))
            self.recorder.evaluation(self.step, scores, seen.metrics(), speed, waiting)
        self.state.update(evaluated_step=self.step, sums=None)
        if self.state["best"]["step"] == self.step:
            self._save()

    def evaluate(self) -> Scores:
        """The validation split, each sample once. Raises Stopped when a stop comes meanwhile."""
        self.engine.share_buffers(self.model)
        self.model.eval()
        counts = Counts(self.parts.num_classes, self.engine.device)
        self.validation.seek(0, 0)
        with torch.inference_mode():
            for batch in self.validation:
                if len(batch.targets):
                    with self.update.autocast():
                        outputs = self.model(batch.inputs)
                    counts.add(outputs, batch.targets, self.task.loss(outputs, batch.targets))
                self._boundary(saving=False)
        matrix, loss = self.engine.sum(counts.matrix).numpy(), float(self.engine.sum(counts.loss))
        return Scores(matrix, loss / max(int(matrix.sum()), 1))

    def _judge(self, scores: Scores) -> None:
        """Keep the last metrics, and the best with the name of the checkpoint that is saved next."""
        metrics, monitor, best = scores.metrics(), self.settings.monitor, self.state["best"]
        line = {"epoch": self.step // self.steps_per_epoch, "step": self.step, "metrics": metrics}
        sign = 1 if DIRECTION[monitor] == "max" else -1
        if best is None or sign * metrics[monitor] > sign * best["metrics"][monitor]:
            name = checkpoint.name_of(self.generation, self.step)
            self.state["best"] = {**line, "checkpoint": name, "matrix": scores.matrix.tolist()}
        self.state["last"] = line

    # What is left behind.

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        started = time.monotonic()
        self._flush()
        if self.recorder:
            if self.step % self.steps_per_epoch or self._evaluation_due():
                self.state["sums"] = {"matrix": self.counts.matrix.tolist(), "loss": float(self.counts.loss).hex()}
            folder, facts = self.run.checkpoints, self._facts()
            weights, moments = self.model.state_dict(), self.optimizer.state_dict()
            path = checkpoint.save(folder, self.generation, self.step, weights, moments, self.state, facts)
            best = self.state["best"]
            checkpoint.prune(folder, self.settings.keep, {best["checkpoint"]} if best else set())
            took = round(time.monotonic() - started, 3)
            self.recorder.event("checkpoint", step=self.step, name=path.name, seconds=took)
        self._saved_at, self._saved_step = time.monotonic(), self.step
        self._aside += self._saved_at - started

    def _facts(self) -> dict[str, Any]:
        return {
            "world_size": self.engine.world_size,
            "data": self.parts.volumes.fingerprint,
            "torch": torch.__version__,
        }


def wants_determinism(experiment: Experiment, device: torch.device) -> bool:
    """`auto` is on where it costs nothing: on the CPU."""
    wanted = experiment.train.deterministic
    return wanted == "run" or (wanted == "auto" and device.type == "cpu")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.train", description=__doc__)
    parser.add_argument("--check", required=True, metavar="FILE", help="experiment (YAML) or run folder; - for stdin")
    return check.report(parser.parse_args().check)


if __name__ == "__main__":
    sys.exit(main())
