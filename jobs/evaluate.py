"""A checkpoint on a split: `python -m jobs.evaluate RUN [--split test] [--checkpoint best|last|NAME]`."""

from __future__ import annotations

import argparse
import io
import json
import sys
from typing import Any

import numpy as np
import torch

from datasets import Loader
from datasets.partition import SPLITS
from hpc.allocation import Allocation
from hpc.errors import UserError, nearest
from hpc.experiment import load
from hpc.preempt import ExitCode
from hpc.rundir import RunDir, read_json, write_bytes
from jobs import checkpoint, figures
from jobs.engine import BadNode, choose_device
from jobs.setup import prepare
from jobs.tasks import make_task
from jobs.tasks.contract import Scores, Stored
from jobs.tasks.counts import Counts, Kept


def find_checkpoint(run: RunDir, wanted: str) -> checkpoint.Checkpoint:
    """best, last, or a folder's name; its sums compared. Raises as checkpoint.verify, and UserError."""
    names = [path.name for path in checkpoint.newest_first(run.checkpoints)]
    if not names:
        raise UserError(f"{run.name} has no checkpoint yet; see 'hpc show {run.name}'")
    known = read_json(run.result) or read_json(run.state)
    best = known.get("best", {}).get("checkpoint")
    name = {"best": best or names[0], "last": names[0]}.get(wanted, wanted)
    if name not in names:
        raise UserError(f"--checkpoint {wanted!r}: {nearest(name, ['best', 'last', *names])}")
    return checkpoint.verify(run.checkpoints / name)


def evaluate(run: RunDir, split: str, wanted: str) -> tuple[str, Scores, list[str]]:
    """Scores of one split, each sample once; writes predictions and figure. Returns the checkpoint's name, too."""
    experiment, _ = load(run.experiment)
    parts = prepare(experiment)
    if not len(parts.volumes.indices(split)):
        full = [name for name in SPLITS if len(parts.volumes.indices(name))]
        raise UserError(f"--split {split}: {experiment.data.file} has no such samples; it has {', '.join(full)}")
    found = find_checkpoint(run, wanted)
    device = choose_device(experiment.train.device, Allocation.current())
    model = parts.build_model(experiment.model.name).to(device).eval()
    model.load_state_dict(found.model())
    data, bf16 = experiment.data, experiment.train.precision == "bf16"
    options: dict[str, Any] = {"threads": data.threads, "device": device, "dtype": torch.float32, "verify": 1.0}
    loader = Loader(parts.volumes, split, data.batch_size, patch=data.patch, shuffle=False, **options)
    task = make_task(experiment, parts.volumes, device)
    counts, kept = Counts(task.cells, device), Kept(task)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in loader:
            outputs = model(batch.inputs)
            losses = task.losses(outputs, batch.targets)
            counts.add(task, outputs, batch.targets, losses.mean())
            kept.add(batch.samples, outputs, batch.targets, losses)
    order, targets, rows, own = (column.numpy() for column in kept.columns())
    labels = None if experiment.task == "segmentation" else targets
    stored = Stored(order, labels, rows, own)
    result = task.scores(counts.cells.cpu().numpy(), counts.total_loss() / counts.samples, counts.samples, stored)
    volumes, names = parts.volumes, list(parts.volumes.class_names)
    buffer = io.BytesIO()
    ids = np.array([str(volumes.ids[sample]) for sample in order])
    np.savez(buffer, ids=ids, targets=targets, scores=rows, class_names=np.array(names))
    write_bytes(run.prediction(split), buffer.getvalue())
    if result.matrix.ndim == 2:
        majority = result.baseline["accuracy"]
        title = f"{split}, {found.name}: accuracy {result.metrics()['accuracy']:.3f} (majority {majority:.3f})"
        write_bytes(
            run.figure(f"confusion_matrix_{split}"), figures.png(figures.confusion_matrix(result.matrix, names, title))
        )
    return found.name, result, names


def main() -> int:
    parser = argparse.ArgumentParser(prog="hpc evaluate", description="Evaluate a run's checkpoint on a split.")
    parser.add_argument("run")
    parser.add_argument("--split", default="validation", choices=SPLITS)
    parser.add_argument("--checkpoint", default="best", help="best (default), last, or a folder's name")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    run = RunDir(options.run)
    try:
        name, scores, _ = evaluate(run, options.split, options.checkpoint)
    except (UserError, ValueError, BadNode) as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    except (checkpoint.StorageError, OSError) as error:
        print(error, file=sys.stderr)
        return ExitCode.STORAGE
    metrics, table = scores.metrics(), scores.per_class()
    if options.json:
        summary = {"checkpoint": name, "split": options.split, "baseline": scores.baseline, "metrics": metrics}
        print(json.dumps({**summary, "per_class": table, "confusion_matrix": scores.matrix.tolist()}, indent=1))
        return ExitCode.DONE
    print(f"{run.name} {name} on {options.split}: {scores.samples} samples")
    for key, value in metrics.items():
        alone = scores.baseline.get(key)
        print(f"  {key:<20}{value:.4f}" + ("" if alone is None else f"   (commonest class alone {alone:.4f})"))
    last = "dice" if "dice" in table[0] else "f1"
    print(f"  {'class':<20}{'support':>8}{'precision':>11}{'recall':>9}{last:>9}")
    for row in sorted(table, key=lambda row: float(row["recall"])):
        own = row[last] if row[last] is not None else float("nan")
        print(f"  {row['name']:<20}{row['support']:>8}{row['precision']:>11.3f}{row['recall']:>9.3f}{own:>9.3f}")
    print(f"  {run.figure(f'confusion_matrix_{options.split}')}\n  {run.prediction(options.split)}")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
