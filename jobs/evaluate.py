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
from jobs.tasks.classification import Classification, Counts, Scores


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
    task = Classification(experiment.train.loss, parts.weights, device)
    counts, scores, samples = Counts(parts.num_classes, device), [], []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in loader:
            outputs = model(batch.inputs).float()
            counts.add(outputs, batch.targets, task.loss(outputs, batch.targets))
            scores.append(outputs.softmax(1).cpu().numpy())
            samples.append(batch.samples.cpu().numpy())
    result = Scores(counts.matrix.cpu().numpy(), counts.total_loss() / int(counts.matrix.sum()))
    order = np.concatenate(samples)
    volumes, names = parts.volumes, list(parts.volumes.class_names)
    buffer = io.BytesIO()
    ids = np.array([str(volumes.ids[sample]) for sample in order])
    np.savez(
        buffer, ids=ids, targets=volumes.targets[order], scores=np.concatenate(scores), class_names=np.array(names)
    )
    write_bytes(run.prediction(split), buffer.getvalue())
    title = f"{split}, {found.name}: accuracy {result.metrics()['accuracy']:.3f} (majority {result.majority:.3f})"
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
        name, scores, names = evaluate(run, options.split, options.checkpoint)
    except (UserError, ValueError, BadNode) as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    except (checkpoint.StorageError, OSError) as error:
        print(error, file=sys.stderr)
        return ExitCode.STORAGE
    metrics, table = scores.metrics(), scores.per_class(names)
    if options.json:
        summary = {"checkpoint": name, "split": options.split, "majority": scores.majority, "metrics": metrics}
        print(json.dumps({**summary, "per_class": table, "confusion_matrix": scores.matrix.tolist()}, indent=1))
        return ExitCode.DONE
    print(f"{run.name} {name} on {options.split}: {scores.samples} samples")
    for key, value in metrics.items():
        print(f"  {key:<20}{value:.4f}" + (f"   (majority class {scores.majority:.4f})" if key == "accuracy" else ""))
    print(f"  {'class':<20}{'samples':>8}{'precision':>11}{'recall':>9}{'f1':>9}")
    for row in sorted(table, key=lambda row: float(row["recall"])):
        print(f"  {row['name']:<20}{row['support']:>8}{row['precision']:>11.3f}{row['recall']:>9.3f}{row['f1']:>9.3f}")
    print(f"  {run.figure(f'confusion_matrix_{options.split}')}\n  {run.prediction(options.split)}")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
